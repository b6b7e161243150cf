"""Checkpoints: written whole or not at all, read with weights_only=True, refused by name when they are not ours."""

import contextlib
import errno
import os
import pickle
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from engine.run import UserError
from model import ARCHS


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit."""


def weight_file(model_name: str, iteration: int, train_loss: float, tar_loss: float) -> str:
    """The published name of a weight file, which users sort and parse by eye."""
    return f"{model_name}_bce_itr_{iteration}_train_{train_loss:3f}_tar_{tar_loss:3f}.pth"


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, contiguous: what every file holds whatever the run used."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in net.state_dict().items()}


def save(content: Any, path: Path) -> None:
    """Writes `content` to a temporary name beside `path`, flushes it to the disk, then renames it.

    A reader of `path` sees the old file or the new one, never a part. Raises OSError when the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's zip writer says a full disk in its own words
                raise OSError(errno.EIO, f"disk full or refusing: {str(error).splitlines()[0]}") from error
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared folder's checkpoints from its other users
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def save_or_warn(content: Any, path: Path, say: Callable[[str], None]) -> bool:
    """`save`; a disk that refuses costs a warning and not the run. True when the file was written."""
    try:
        save(content, path)
    except OSError as error:
        say(f"warning: {path} could not be written ({error.strerror or error}); training goes on")
        return False
    return True


class LastFile:
    """`last.pth`, from which a run goes on: when it was written last, and when it is due again."""

    def __init__(self, path: Path, minutes: float, say: Callable[[str], None]):
        self.path, self._minutes, self._say = path, minutes, say
        self._written = time.monotonic()
        self.is_safe = True  # whether the last writing succeeded

    def is_due(self) -> bool:
        return time.monotonic() - self._written > 60 * self._minutes

    def write(self, content: dict[str, Any]) -> None:
        self._written = time.monotonic()
        self.is_safe = save_or_warn(content, self.path, self._say)


def open_folder(folder: Path) -> FileLock:
    """Makes the folder of a run, and takes it for this process alone; the lock ends with the process, however it ends.

    Raises UserError when it cannot be written, or another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=0)
        for part in folder.glob(".*.tmp"):  # of a checkpoint, by a run that was killed while it wrote
            part.unlink()
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another model_name") from None
    except OSError as error:
        mend = "set saved_models to a folder that can"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): {mend}") from None
    return lock


def find_last(folder: Path, resume: str) -> dict[str, Any] | None:
    """What `last.pth` in `folder` holds, or None where there is none, or resume is "never"; then what an earlier run
    left is put aside under a number.

    Raises CheckpointError when it cannot be read or is not a run's.
    """
    path = folder / "last.pth"
    mend = "move it away, or give --resume never"
    if resume == "never" or not path.exists():
        _put_aside([folder / name for name in ("last.pth", "best.pth", "log.csv")])
        return None
    try:
        content = load(path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {mend}") from None
    keys = {"config", "progress", "step", "model", "random"}
    if not isinstance(content, dict) or not keys <= content.keys():
        raise CheckpointError(f"{path}: does not hold a run to go on from; {mend}")
    return content


def _put_aside(files: list[Path]) -> None:
    files = [f for f in files if f.exists()]
    number = 1
    while any(f.with_stem(f"{f.stem}_{number}").exists() for f in files):
        number += 1
    for f in files:
        f.rename(f.with_stem(f"{f.stem}_{number}"))
    if files:
        print(f"starting anew: of the earlier run, {', '.join(f.name for f in files)} now end in _{number}")


@contextlib.contextmanager
def contents_of(path: Path) -> Iterator[None]:
    """Turns what odd contents of a checkpoint raise into a CheckpointError that names it."""
    try:
        yield
    except UserError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise CheckpointError(
            f"{path}: does not hold a run to go on from ({reason}); move it away, or give --resume never"
        ) from None


def load(path: Path) -> Any:
    """What `path` holds, on the CPU. Raises CheckpointError with one line for whatever is wrong with the file."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks users to file an issue about pickles that are refused here
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a checkpoint") from None
    except pickle.UnpicklingError as error:
        # torch answers so for code in a pickle, and for a file that is no pickle at all
        if "Unsupported" in str(error) or "GLOBAL" in str(error):
            raise CheckpointError(f"{path}: refused, it holds code and not only weights") from None
        raise CheckpointError(f"{path}: is not a checkpoint, or is damaged") from None
    except (RuntimeError, EOFError, ValueError, KeyError, OSError, IndexError, AttributeError, UnicodeDecodeError):
        raise CheckpointError(f"{path}: is not a checkpoint, or is truncated or damaged") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in `path`, be it a weight file or a `last.pth`. Raises CheckpointError when it holds none."""
    content = load(path)
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content.get("ema") or content["model"]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no state dict")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def build_network(state: Mapping[str, Tensor], path: Path, backend: str = "auto") -> nn.Module:
    """The network whose weights `state` are, found from its keys and shapes, loaded and in eval mode.

    Raises CheckpointError when they are not those of one of this project's networks.
    """
    first = state.get("stage1.rebnconv1.conv_s1.weight")
    if first is None:
        raise CheckpointError(f"{path}: holds the weights of another network than U²-Net")
    mamba = any(".mamba" in k for k in state)
    arch = ("u2mamba" if mamba else "u2net") + ("p" if first.shape[0] == 16 else "")
    options = {"backend": backend, "mamba_at": "encoder" if "stage1.mamba1.norm.weight" in state else "bottleneck"}
    net = ARCHS[arch](**options if mamba else {})
    fill(net, state, path, arch)
    return net.eval()


def fill(net: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads `state` into `net`, every key. Raises CheckpointError naming the first that does not fit."""
    own = net.state_dict()
    wrong = [k for k in own if k not in state or own[k].shape != state[k].shape] + [k for k in state if k not in own]
    if wrong:
        raise CheckpointError(
            f"{path}: does not fit arch {arch!r} ({len(wrong)} tensors differ, first {wrong[0]}); "
            "set arch and mamba_at to those it was trained with"
        )
    net.load_state_dict(state)
