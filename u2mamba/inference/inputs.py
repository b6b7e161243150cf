"""Command-line inputs -> the image files, and where the outputs of each are written."""

import functools
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from u2mamba.dataset.pairs import IMAGE_TYPES, SETTINGS_FILE
from u2mamba.inference.provenance import Provenance
from u2mamba.runtime.errors import UserError


class Source(NamedTuple):
    """An image file, and the path of its outputs under OUT/MODE, without extension."""

    image: Path
    name: Path


def find_images(inputs: Iterable[str]) -> tuple[list[Source], list[str], list[str]]:
    """The files that are named, match a pattern, or have an image's extension in a folder, each once; and the names of
    other files in those folders, and of this command's outputs in folders and patterns, wherever they are.

    Raises UserError for an input without an image, and for two images that would have the same outputs.
    """
    images: dict[Path, tuple[Path, Path]] = {}  # resolved path -> path as given, path below its input
    others, outputs = [], []
    recorded = functools.cache(lambda folder: Provenance(folder, {}).outputs)
    for word in inputs:
        base, matches = _matches(word)
        before = len(images)
        for match in matches:
            for path in _images_in(match, others) if match.is_dir() else [match]:
                full = path.absolute()
                if path != Path(word) and any(full.relative_to(p).as_posix() in recorded(p) for p in full.parents):
                    outputs.append(path.name)
                else:
                    images.setdefault(path.resolve(), (path, path.relative_to(base)))
        if len(images) == before and not any(m.is_file() for m in matches):
            raise UserError(f"{word}: contains no image ({' '.join(IMAGE_TYPES)})")
    # a.jpg next to a.png: their outputs keep the extension, a.jpg.png and a.png.png
    stems = Counter(below.with_suffix("") for _, below in images.values())
    sources: dict[Path, Source] = {}
    for path, below in images.values():
        name = below if stems[below.with_suffix("")] > 1 else below.with_suffix("")
        if name in sources:
            raise UserError(f"{sources[name].image} and {path} would both become {name}: use a separate --out for each")
        sources[name] = Source(path, name)
    return list(sources.values()), others, outputs


def _matches(word: str) -> tuple[Path, list[Path]]:
    """The folder that outputs are placed relative to, and the files and folders that `word` names."""
    path = Path(word)
    if os.path.exists(word):  # False, not an error, for a name that is too long
        return path if path.is_dir() else path.parent, [path]
    for pattern, magic in ((word, {*"*?["}), (word.replace("[", "[[]"), {*"*?"})):  # a folder may be called trip[1]
        if matches := [Path(m) for m in sorted(glob.glob(pattern, recursive=True))]:
            base = itertools.takewhile(magic.isdisjoint, path.parts[:-1])
            return Path(*base), matches
    raise UserError(f"{word}: there is no such file or folder, and no file matches it as a pattern")


def _images_in(folder: Path, others: list[str]) -> Iterator[Path]:
    """Images in `folder` and below, except hidden files; the names of other files go to `others`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    seen: set[Path] = set()  # symbolic links are followed, each once, so that cycles end
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(Path(root).resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() not in seen)
        for name in sorted(f for f in files if not f.startswith(".")):
            if name.lower().endswith(IMAGE_TYPES):
                yield Path(root, name)
            elif name != SETTINGS_FILE:
                others.append(name)
