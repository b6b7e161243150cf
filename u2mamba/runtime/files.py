"""Atomic file writes: a file appears complete or not at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from u2mamba.runtime.errors import UserError


def check_folder(folder: Path) -> None:
    """Creates `folder` and checks that files can be written there, before hours of work depend on it.

    Raises UserError.
    """
    path = folder / f".check{os.getpid()}"
    try:
        with replacing(path) as file:
            file.write(b"1")
        path.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise UserError(f"{folder.absolute()} cannot be written ({reason}): choose another folder") from None


@contextlib.contextmanager
def replacing(path: Path, flush: bool = True, before: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write under a temporary name next to `path`; flushed to disk, then renamed if nothing failed.

    A reader of `path` sees the old file or the new one, never a part. flush: False for many small files, which a system
    crash may lose. before: the new name of the old file; killed between the two renames, it is the only one. Raises
    OSError.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # not tempfile: its permissions would require a chmod, which Samba, S3 and vfat refuse; cut, since names may be long
    temporary = path.with_name(f".{path.stem.lstrip('.')[:40]}-{uuid.uuid4().hex[:8]}.tmp")
    try:
        with open(temporary, "xb") as file:
            yield file
            if flush:
                file.flush()
                os.fsync(file.fileno())
        if before:
            os.replace(path, before)
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
