"""Files of results that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from u2mamba.runtime.errors import UserError


def check_folder(folder: Path) -> None:
    """Makes `folder` and tries to write in it, before the work is done that would fill it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder") from None


def atomic_write(path: Path, content: bytes, flush: bool = True) -> None:
    """Writes to a temporary name beside `path`, flushes it to the disk, then renames it; makes the folder.

    flush: False for one of many small files, which a crash of the machine may lose.
    Raises UserError, caused by the OSError.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".tmp")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            if flush:
                file.flush()
                os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from others
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from error
    finally:
        if temporary:
            Path(temporary).unlink(missing_ok=True)
