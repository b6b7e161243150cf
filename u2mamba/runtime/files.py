"""Files that appear whole or not at all."""

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from u2mamba.runtime.errors import UserError

UMASK = os.umask(0o077)  # it can only be read by setting it
os.umask(UMASK)


def check_folder(folder: Path) -> None:
    """Makes `folder` and writes a file in it, before the work is done whose results go there. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder") from None


@contextlib.contextmanager
def replacing(path: Path, flush: bool = True, before_rename: Callable[[], None] = lambda: None) -> Iterator[BinaryIO]:
    """A file to write under a temporary name next to `path`; flushed to the disk, then renamed, where nothing failed.

    A reader of `path` sees the old file or the new one, never a part. flush: False for one of many small files, which
    a crash of the machine may lose. before_rename: called when the new file is complete. Raises OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        with contextlib.suppress(OSError):  # a file system without permissions
            os.chmod(temporary, 0o666 & ~UMASK)  # mkstemp's 0600 would hide the file from the group
        before_rename()
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            os.unlink(temporary)


def atomic_write(path: Path, content: bytes, flush: bool = True) -> None:
    """Writes `content` to `path` as `replacing` does. Raises UserError, caused by the OSError."""
    try:
        with replacing(path, flush) as file:
            file.write(content)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from error
