"""Files of results that appear whole or not at all."""

import os
import tempfile
from pathlib import Path

from engine.run import UserError


def check_folder(folder: Path) -> None:
    """Makes `folder` and tries to write in it, before the work is done that would fill it. Raises UserError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror or error}): choose another folder") from None


def write_whole(path: Path, content: bytes) -> None:
    """Writes to a temporary name beside `path`, flushes it to the disk, then renames it. Raises UserError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"{path} could not be written ({error.strerror or error})") from None
    finally:
        temporary.unlink(missing_ok=True)
