"""The folder of a run: its lock, the names of its weights files, and the archiving of an earlier run."""

import contextlib
import os
import re
from collections.abc import Iterator
from pathlib import Path

from filelock import FileLock, Timeout

from u2mamba.runtime.errors import UserError
from u2mamba.runtime.files import check_folder

CONFIG_FILE = "config.json"
WEIGHTS_NAME = re.compile(r".+_bce_itr_(\d+)_train_[^_]+_tar_[^_]+\.pth")


def weights_name(model_name: str, iteration: int, train_loss: float, tar_loss: float) -> str:
    """The file name of weights in U-2-Net's format."""
    return f"{model_name}_bce_itr_{iteration}_train_{train_loss:3f}_tar_{tar_loss:3f}.pth"


def weights_files(folder: Path) -> list[tuple[int, Path]]:
    """(iteration, file) of the weights files of the run in `folder`, oldest first."""
    return sorted(
        (int(match[1]), folder / match[0]) for match in map(WEIGHTS_NAME.fullmatch, os.listdir(folder)) if match
    )


def prune(folder: Path, keep: int, iteration: int) -> None:
    """Deletes all but the `keep` newest weights files up to `iteration`'s; 0 keeps all. Later ones belong to a run that
    was resumed from an earlier checkpoint."""
    written = [path for number, path in weights_files(folder) if number <= iteration]
    for path in written[:-keep] if keep else []:
        with contextlib.suppress(OSError):
            path.unlink()


_locks: list[FileLock] = []


@contextlib.contextmanager
def release_run_locks() -> Iterator[None]:
    """Releases at the end of the block all locks of `acquire_run_dir`; also a decorator."""
    try:
        yield
    finally:
        while _locks:
            _locks.pop().release()


def acquire_run_dir(folder: Path) -> None:
    """Creates the folder of a run and locks it until `release_run_locks` or the end of the process.

    Raises UserError if it cannot be written, or another run uses it.
    """
    check_folder(folder)
    try:
        lock = FileLock(folder / "run.lock")
        lock.acquire(timeout=0)
        _locks.append(lock)
    except Timeout:
        raise UserError(f"{folder} is in use by another run: wait for it, or choose another model_name") from None
    except (OSError, NotImplementedError) as error:  # a file system without locks
        print(f"warning: {folder} cannot be locked ({error}): do not start a second run in it")
    for file in folder.glob(".*.tmp"):  # left by a killed run
        with contextlib.suppress(OSError):
            file.unlink()


def archive_run(folder: Path) -> None:
    """Renames the files of an earlier run in `folder`, appending a number."""
    names = ("last.pth", "last_before.pth", "best.pth", "preview.png", "log.csv", CONFIG_FILE, "tensorboard")
    files = [folder / name for name in names]
    files = [f for f in (*files, *(path for _, path in weights_files(folder))) if f.exists()]
    number = 1
    while any(f.with_stem(f"{f.stem}_{number}").exists() for f in files):
        number += 1
    for f in files:
        f.rename(f.with_stem(f"{f.stem}_{number}"))
    if files:
        print(f"new run: the {len(files)} files of the earlier one ({files[0].name}, ...) now end in _{number}")
