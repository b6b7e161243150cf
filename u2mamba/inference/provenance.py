"""OUT/<mode>/settings.json: the settings and the version of the image that each output was predicted from."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from u2mamba.dataset.pairs import SETTINGS_FILE
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.files import atomic_write

ENDINGS = (b"IEND\xaeB`\x82", b"\xff\xd9")  # of a complete PNG, JPEG


class Provenance:
    """The record of one output folder; `outputs`: relative paths of the recorded outputs.

    Outputs are recorded before they are written, since a killed process could not record them afterward. A file at a
    recorded path counts as done, if it is complete.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]):
        self.folder, self.settings, self.path = folder, settings, folder / SETTINGS_FILE
        self._read()

    def _read(self) -> None:
        try:
            content = json.loads(self.path.read_bytes())
            self._variants, self.outputs = list(content["settings"]), dict(content["outputs"])
            for entry in self.outputs.values():  # raises for anything but a record
                self._variants[entry["settings"]].keys(), entry["bytes"], entry["modified"]
        except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError):
            self._variants, self.outputs = [], {}

    def is_done(self, output: Path, image: Path) -> bool:
        """Whether `output` was predicted from `image` with these settings.

        Raises UserError if it exists but was not: such a file must neither count as done nor be overwritten.
        """
        if not os.path.lexists(output):
            return False
        entry = self.outputs.get(output.relative_to(self.folder).as_posix())
        before = self._variants[entry["settings"]] if entry else {}
        changed = [f"{k} {before.get(k)}" for k, v in self.settings.items() if k != "weights" and before.get(k) != v]
        if not entry or not output.is_file():
            reason = f"but {self.path} does not list it"
        elif changed:
            reason = f"predicted by {before.get('weights')} with {', '.join(changed)}"
        elif _state(image) != {key: entry[key] for key in _state(image)}:
            reason = f"predicted from another image, or before {image} changed"
        else:
            with output.open("rb") as file:  # a power cut may truncate outputs, since they are not flushed
                file.seek(-min(8, output.stat().st_size), os.SEEK_END)
                return file.read().endswith(ENDINGS)
        raise UserError(f"{output} exists, {reason}: choose another --out, or give --overwrite")

    def start(self, images: Mapping[Path, Path]) -> None:
        """Records {output: image}, and deletes existing outputs, which would otherwise count as done."""
        self._read()  # another process may have recorded outputs since
        if self.settings not in self._variants:
            self._variants.append(self.settings)
        for output, image in images.items():
            with contextlib.suppress(OSError):
                output.unlink()
            entry = {"input": str(image), **_state(image), "settings": self._variants.index(self.settings)}
            self.outputs[output.relative_to(self.folder).as_posix()] = entry
        atomic_write(self.path, json.dumps({"settings": self._variants, "outputs": self.outputs}, indent=1).encode())


def _state(path: Path) -> dict[str, int]:
    try:
        status = path.stat()
    except OSError:  # reading the image will fail too, with the reason
        return {"bytes": -1, "modified": -1}
    return {"bytes": status.st_size, "modified": status.st_mtime_ns}
