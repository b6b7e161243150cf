"""Checkpoints: written whole or not at all, read with weights_only=True, refused by name when they are not ours."""

import contextlib
import errno
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from model import weights
from u2mamba.runtime.config import pretrained_file
from u2mamba.runtime.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be read, or does not fit."""


class Damaged(CheckpointError):
    """A checkpoint that is cut short, differs from its checksums, or that the disk does not give."""


def weight_file(model_name: str, iteration: int, train_loss: float, tar_loss: float) -> str:
    """The published name of a weight file, which users sort and parse by eye."""
    return f"{model_name}_bce_itr_{iteration}_train_{train_loss:3f}_tar_{tar_loss:3f}.pth"


def weight_files(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, file) of the weight files of the run in `folder`, oldest first.

    From the names, since these files hold plain keys and nothing else; no run needs them while `last.pth` is whole.
    """
    name = re.compile(rf"{re.escape(folder.name)}_bce_itr_(\d+)_train_[^_]+_tar_[^_]+\.pth")
    return sorted((int(match[1]), folder / match[0]) for match in map(name.fullmatch, os.listdir(folder)) if match)


def prune(folder: Path, keep: int, iteration: int) -> None:
    """Deletes all but the `keep` newest weight files up to `iteration`'s; 0 keeps all. best.pth and last.pth are no
    such files. Later ones are left of a run that went on from an earlier checkpoint."""
    written = [path for number, path in weight_files(folder) if number <= iteration]
    for path in written[:-keep] if keep else []:
        with contextlib.suppress(OSError):
            path.unlink()


plain_state = weights.cpu_state_dict


def save(content: Any, path: Path, keep_as: Path | None = None) -> None:
    """Writes `content` to a temporary name beside `path`, flushes it to the disk, then renames it.

    A reader of `path` sees the old file or the new one, never a part; the old one goes on as `keep_as`.
    Raises OSError when the disk refuses.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            try:
                torch.save(content, file)
            except RuntimeError as error:  # torch's zip writer hides what the disk answered
                refusal = error.__context__
                raise refusal if isinstance(refusal, OSError) else OSError(errno.EIO, os.strerror(errno.EIO)) from None
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide a shared folder's checkpoints from its other users
        if keep_as and path.exists():
            _keep(path, keep_as)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink(missing_ok=True)
        raise


def _keep(path: Path, keep_as: Path) -> None:
    """Gives the file at `path` a second name in place of the file there: at any moment `path` is whole."""
    link = keep_as.with_name(f".{keep_as.stem}-.tmp")
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:  # a file system without hard links: for a moment there is `keep_as` alone
        link = path
    os.replace(link, keep_as)


def save_or_warn(content: Any, path: Path, say: Callable[[str], None]) -> bool:
    """`save`; a disk that refuses costs a warning and not the run. True when the file was written."""
    try:
        save(content, path)
    except OSError as error:
        say(f"warning: {path} could not be written ({error.strerror or error}); training goes on")
        return False
    return True


class LastFile:
    """`last.pth`, from which a run goes on: when it was written last, and when it is due again.

    The one before stays as `last_before.pth`, for the day on which a disk gives the newest back damaged. `is_good`:
    whether the file there now was read whole, and so may take that place.
    """

    def __init__(self, folder: Path, minutes: float, say: Callable[[str], None], is_good: bool):
        self.path, self._minutes, self._say, self._is_good = folder / "last.pth", minutes, say, is_good
        self._written, self._took = time.monotonic(), 0.0  # when it ended, how many seconds it took
        self.is_safe = True  # whether the last writing succeeded

    def is_due(self) -> bool:
        return time.monotonic() - self._written > 60 * self._minutes

    def is_cheap(self) -> bool:
        """Whether one more adds less than 2 % to the run, by the time that the one before took."""
        return time.monotonic() - self._written > 50 * self._took

    def write(self, content: dict[str, Any]) -> None:
        started = time.monotonic()
        before = self.path.with_name("last_before.pth")
        try:
            save(content, self.path, before if self._is_good else None)
            self.is_safe = True
        except OSError as error:
            if error.errno in (errno.ENOSPC, getattr(errno, "EDQUOT", None)) and self._is_good and self.path.exists():
                before.unlink(missing_ok=True)  # room for the new one counts more, and last.pth is whole
            self.is_safe = save_or_warn(content, self.path, self._say)
        self._is_good |= self.is_safe
        self._written = time.monotonic()
        self._took = self._written - started

    def promise(self, resume: str) -> str:
        """What a run that stops now can tell; resume: that constant."""
        there = "there" if self.is_safe else f"what was saved before, for {self.path} could not be written"
        return f"the same command{' without --resume never' * (resume == 'never')} goes on from {there}"


_taken: list[FileLock] = []


@contextlib.contextmanager
def folders_released() -> Iterator[None]:
    """Gives back at its end what `open_folder` took in it; as a decorator, at the function's end."""
    try:
        yield
    finally:
        while _taken:
            _taken.pop().release()


def open_folder(folder: Path) -> None:
    """Makes the folder of a run, and takes it for this process alone until `folders_released` or the process ends.

    Raises UserError when it cannot be written, or another run uses it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=0)
        _taken.append(lock)
        for file in folder.glob(".*.tmp"):  # of a run that was killed while it wrote
            file.unlink()
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another model_name") from None
    except OSError as error:
        mend = "set saved_models to a folder that can"
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): {mend}") from None


def load(path: Path) -> Any:
    """`model.weights.read_file`. Raises CheckpointError with one line for whatever is wrong with the file."""
    with _named():
        return weights.read_file(path)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in `path`. Raises CheckpointError when it holds none."""
    with _named():
        return weights.read_state_dict(path)[0]


def start_from(net: nn.Module, path: Path, size: int) -> str:
    """`model.weights.load_pretrained`. Raises CheckpointError when the weights are those of another network."""
    with _named():
        return weights.load_pretrained(net, pretrained_file(path), size)


def fill(net: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads `state` into `net`, every key. Raises CheckpointError naming the first that does not fit."""
    with _named():
        weights.load_state_dict(net, state, path)


@contextlib.contextmanager
def _named() -> Iterator[None]:
    try:
        yield
    except weights.CorruptFileError as error:
        raise Damaged(str(error)) from None
    except ValueError as error:
        raise CheckpointError(str(error)) from None
