"""Opens untrusted image files: regular files only (reading a pipe would block), six formats (some of Pillow's others
start programs), a limit on pixels. `decode_budget` bounds the memory of all threads. decode.py converts the pixels.
"""

from __future__ import annotations

import contextlib
import logging
import os
import stat
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from u2mamba.runtime.errors import UserError

MAX_PIXELS = 1 << 26  # 67 megapixels: 0.2 GB of RGB, 1 to 4 s to decode; larger images are refused unread
MAX_SIDE = 65_535  # JPEG's own limit
DECODE_LIMIT = 128  # megapixels that all threads together decode at a time; each takes 10 to 20 MB of memory
_free, _turn = threading.Semaphore(DECODE_LIMIT), threading.Lock()
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # detected by content, whatever the file name

# limit on PNG color profiles and texts; with Pillow's default, PNGs with a profile above 1 MB are unreadable
PNG_TEXT, PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_CHUNK, 1 << 24

# glibc returns freed blocks above 32 MB to the system at once; Pillow's own 16 MB stay with the thread that freed them:
# 12 threads that decoded 67 megapixels held 3.5 GB
Image.core.set_block_size(1 << 26)

# Pillow's warnings about odd metadata do not name the file, so a user cannot act on them.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def printable(text: object) -> str:
    """Text as one line for a terminal: control characters and undecodable bytes of a file name become escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class DataError(UserError):
    """The data cannot be trained on; the message is the one line to print (exit code 2)."""


class BadFile(DataError):
    """A file that cannot be used. `path`: the file, `reason`: why, `retry`: the next start may be able to read it."""

    def __init__(self, path: str | os.PathLike, reason: str, retry: bool = False):
        super().__init__(printable(f"{path}: {reason}"))
        self.path, self.reason, self.retry = Path(path), printable(reason), retry


@contextlib.contextmanager
def decode_budget(pixels: int) -> Iterator[None]:
    """Waits until `pixels` more fit into DECODE_LIMIT, and holds them inside the `with` block. Not reentrant."""
    megapixels = min(DECODE_LIMIT, 1 + (pixels >> 20))
    with _turn:  # two threads that each hold a part of what they need would wait for each other
        for _ in range(megapixels):
            _free.acquire()
    try:
        yield
    finally:
        _free.release(megapixels)


@contextlib.contextmanager
def errors_as_bad_file(path: str | os.PathLike) -> Iterator[None]:
    """Raises any error inside the block as a BadFile of `path`."""
    try:
        yield
    except BadFile:
        raise
    except UnidentifiedImageError:
        raise BadFile(path, "not an image (JPEG, PNG, WebP, BMP, TIFF or GIF)") from None
    except MemoryError:
        raise BadFile(path, "does not fit into memory", retry=True) from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        system = getattr(error, "strerror", None)  # set in errors of the operating system alone
        reason = system or str(error) or type(error).__name__
        raise BadFile(path, reason.splitlines()[0], retry=bool(system)) from None


@contextlib.contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Pillow's image of a file, its declared size checked, its pixels not yet decoded. Raises BadFile."""
    with errors_as_bad_file(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(path, "not a regular file")
        if not status.st_size:
            raise BadFile(path, "empty file")
        with open(path, "rb") as file:  # Pillow would map a path into memory, and a file cut meanwhile kill the process
            image = Image.open(file, formats=FORMATS)
            width, height = image.size
            if not 0 < width * height <= MAX_PIXELS or max(width, height) > MAX_SIDE:
                limits = f"MAX_PIXELS = {MAX_PIXELS:,}, MAX_SIDE = {MAX_SIDE:,}"
                raise BadFile(path, f"declares {width}x{height} pixels; {limits}")
            if image.format == "BMP" and image.mode == "1" and image.tile[0].args[1] > (width + 31) // 32 * 4:
                raise BadFile(path, "an 8-bit BMP of two colors, which Pillow reads as black: convert it to PNG")
            if image.format == "PNG":  # decoding does not verify the checksums of pixel data
                image.verify()
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:  # opened again, as verify() requires
                yield image


SWAPPED = {"16B": "16L", "16L": "16B", "16N": "16B" if sys.byteorder == "little" else "16L"}  # Pillow's byte orders
FULL_RANGES = 255, 1023, 4095, 16383, 65535  # of 8, 10, 12, 14 and 16 bits stored in 16


def to_bytes(file: Image.Image) -> tuple[np.ndarray, int]:
    """Modes I, I;16* and F -> uint8 and the full range that became 255: the first of 1 (floats only), FULL_RANGES and
    the maximum that no value exceeds."""
    values = np.nan_to_num(np.asarray(file), posinf=0, neginf=0).clip(min=0)
    maximum, scales = float(values.max()), (1, 255, 65535) if file.mode == "F" else FULL_RANGES
    scale = next((s for s in scales if maximum <= s), maximum)
    scaled = np.multiply(values, 255 / scale, dtype=np.float64)
    return np.rint(scaled, out=scaled).astype(np.uint8), scale


def load_pixels(path: str | os.PathLike, image: Image.Image) -> Image.Image:
    """Decodes an opened file. Raises BadFile.

    Of 16-bit colors Pillow keeps the high byte, which 10 to 14 bits leave nearly empty. Read with the other byte order,
    the file gives the low byte.
    """
    image.load()
    is_deep = image.format in ("PNG", "TIFF") and image.mode in ("RGB", "RGBA")
    if not is_deep or max(maximum for _, maximum in image.getextrema()[:3]) >= 64:
        return image
    with open_image(path) as low:
        for k, tile in enumerate(low.tile):
            rawmode, *more = (tile.args,) if isinstance(tile.args, str) else tile.args
            bands, _, depth = rawmode.partition(";")
            if depth not in SWAPPED:
                return image
            low.tile[k] = tile._replace(args=(f"{bands};{SWAPPED[depth]}", *more))
        low.load()
        values = np.asarray(image)[..., :3] * np.uint16(256) + np.asarray(low)[..., :3]
    full_range = next(full for full in FULL_RANGES if values.max() <= full)
    out = Image.fromarray(np.rint(values * (255 / full_range)).astype(np.uint8))
    if image.mode == "RGBA":
        out.putalpha(image.getchannel("A"))
    return out
