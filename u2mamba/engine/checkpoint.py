"""Checkpoints: written whole or not at all, read with weights_only=True, refused by name when they are not ours."""

import contextlib
import errno
import os
import pickle
import re
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor, nn

from model import ARCHS, load_u2net_weights
from model.u2mamba import variant_of
from u2mamba.runtime.config import input_size, pretrained_file
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


def plain_state(net: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights on the CPU, contiguous: what every file holds whatever the run used."""
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in net.state_dict().items()}


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
    """What `path` holds, on the CPU. Raises CheckpointError with one line for whatever is wrong with the file.

    torch.save stores a CRC-32 of each record, which torch.load does not look at; zipfile does.
    """
    try:
        if zipfile.is_zipfile(path):  # the public weights of 2020 are of an older format, without checksums
            with zipfile.ZipFile(path) as records:
                if record := records.testzip():
                    raise Damaged(f"{path}: is damaged, {record} differs from its checksum")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch asks users to file an issue about pickles that are refused here
            return torch.load(path, map_location="cpu", weights_only=True)
    except UserError:
        raise
    except FileNotFoundError:
        others = ", ".join(sorted(p.name for p in Path(path).parent.glob("*.pth"))[-5:])
        there = f"; in that folder there are {others}" if others else ""
        raise CheckpointError(f"{path}: there is no such checkpoint{there}") from None
    except IsADirectoryError:
        raise CheckpointError(f"{path}: is a folder, not a checkpoint") from None
    except OSError as error:
        # a file cut short makes the readers seek to a place before its beginning: Invalid argument
        raise Damaged(f"{path}: is truncated, or cannot be read ({error.strerror or error})") from None
    except Exception as error:  # zipfile, pickle and torch answer damage with whatever their parsers stumble over
        # operand 149 begins the pickles of today's Python, which torch.save does not write
        if isinstance(error, pickle.UnpicklingError) and (m := re.search(r"GLOBAL ([\w.]+)|operand 149", str(error))):
            what = m[1] or "a plain pickle"
            raise CheckpointError(f"{path}: refused, it holds code ({what}) and not only weights") from None
        raise Damaged(f"{path}: is not a checkpoint, or is truncated or damaged") from None


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in `path`, a weight file; of a `last.pth` those being trained, not their averages.

    Raises CheckpointError when it holds none.
    """
    content = load(path)
    for key in ("model", "state_dict"):  # our last.pth; other trainers'
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
    if not isinstance(content, Mapping) or not content or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: holds no state dict")
    return {str(k).removeprefix("module."): v for k, v in content.items()}


def start_from(net: nn.Module, path: Path, size: int) -> str:
    """Fills `net` with the weights in `path`, public U²-Net's or ours -> a line on what matched, what is new, what is
    left out, and one more where they were trained for pictures of clearly another size than `size` pixels.
    Raises CheckpointError naming the first tensor when they are those of another network."""
    path = pretrained_file(path)
    state = load_weights(path)
    try:
        line = f"pretrained: {load_u2net_weights(net, state)} ({path})"
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    trained = input_size(0, path)
    if not 2 / 3 < size / trained < 3 / 2:
        line += f"\nwarning: weights for pictures of {trained} pixels; what they know may be lost at {size}"
    return line


def build_network(state: Mapping[str, Tensor], path: Path, backend: str = "auto") -> nn.Module:
    """The network whose weights `state` are, found from its keys and shapes, loaded and in eval mode.
    Raises CheckpointError when they are not those of one of this project's networks."""
    first = state.get("stage1.rebnconv1.conv_s1.weight")
    if first is None:
        raise CheckpointError(f"{path}: holds the weights of another network than U²-Net")
    mamba = any(".mamba" in k for k in state)
    arch = ("u2mamba" if mamba else "u2net") + ("p" if first.shape[0] == 16 else "")
    net = ARCHS[arch](backend=backend, **variant_of(state)) if mamba else ARCHS[arch]()
    fill(net, state, path, arch)
    return net.eval()


def fill(net: nn.Module, state: Mapping[str, Tensor], path: Path, arch: str) -> None:
    """Loads `state` into `net`, every key. Raises CheckpointError naming the first that does not fit."""
    own = net.state_dict()
    wrong = [k for k in own if k not in state or own[k].shape != state[k].shape] + [k for k in state if k not in own]
    if wrong:
        mend = "set arch and the constants mamba_... to those it was trained with"
        raise CheckpointError(
            f"{path}: does not fit arch {arch!r} ({len(wrong)} tensors differ, first {wrong[0]}); {mend}"
        )
    net.load_state_dict(state)
