"""Image and mask files -> arrays: any mode Pillow knows, upright, as bytes; or `BadFile`, which names file and reason.

Files come from anywhere, so what one of them can cost is bounded by what it declares, the same on every machine:
regular files only (a pipe would block), six formats (others of Pillow's start programs or are rare), so many pixels,
JPEG scans and reads. The memory of all threads together is bounded by `_Room`.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import re
import stat
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from u2mamba.runtime.errors import UserError

MAX_PIXELS = 1 << 26  # an image that declares more is refused unread: 67 megapixels, 0.2 GB of RGB, 1 to 4 s to decode
MAX_SIDE = 65_535  # JPEG's own limit
MAX_SCANNED = 30 * MAX_PIXELS  # pixels times scans of a JPEG: 100 kB can hold thousands of scans, each a full pass
MAX_READS = 1_000_000  # pieces of a file that Pillow may ask for: it passes junk before a JPEG marker byte by byte
DECODED_AT_ONCE = 2 * MAX_PIXELS  # pixels, by all threads together; decoding takes 10 to 20 bytes of memory a pixel
LARGE = 1 << 24  # pixels of a pair; before decoding it, freed memory goes back to the system
NOISE_BELOW = 64  # a mask of many values that never gets this bright is compression noise on an empty mask
MOST_LABELS, MOST_CLASSES, LEAST_PIECE = 8, 20, 0.05  # of a map of labels: values, largest class, one's share of it
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # whatever the file is called

# Pillow's remarks on odd metadata, which name no file: nothing a user can act on.
warnings.filterwarnings("ignore", module=r"PIL\.")
logging.getLogger("PIL").addHandler(logging.NullHandler())


def printable(text: object) -> str:
    """One line for a terminal: line breaks, control characters and undecodable bytes of a file name as escapes."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in str(text))


class DataError(UserError):
    """The data cannot be trained on; the message is the one line to print (exit code 2)."""


class BadFile(DataError):
    """One file that cannot be used. `path`: the file, `reason`: why, in words."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(printable(f"{path}: {reason}"))
        self.path, self.reason = Path(path), printable(reason)

    def __reduce__(self):  # a worker process hands it over; the default would call BadFile(message)
        return BadFile, (self.path, self.reason)


# ----------------------------------------------------------------------------------------------------- opening


class _Room:
    """Pixels that may be decoded at once: `with room.take(n)` waits until n of them are free."""

    def __init__(self, pixels: int):
        self._free, self._changed = pixels, threading.Condition()

    @contextlib.contextmanager
    def take(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._free >= pixels)
            self._free -= pixels
        if pixels >= LARGE and sys.platform == "linux":
            # glibc keeps what a thread has freed for that thread: 12 of them held 2.1 GB where one picture takes 0.2
            with contextlib.suppress(AttributeError, OSError):  # another C library
                ctypes.CDLL(None).malloc_trim(0)
        try:
            yield
        finally:
            with self._changed:
                self._free += pixels
                self._changed.notify_all()


ROOM = _Room(DECODED_AT_ONCE)


class _CountedFile(io.BufferedReader):
    """A file that Pillow may read MAX_READS pieces of."""

    _reads = 0

    def read(self, size: int | None = -1, /) -> bytes:
        self._reads += 1
        if self._reads > MAX_READS:
            raise ValueError("its header cannot be made sense of")
        return super().read(size)


def _check_declared(path: str | os.PathLike, image: Image.Image, file: io.BufferedReader) -> None:
    width, height = image.size
    if not 0 < width * height <= MAX_PIXELS:
        raise BadFile(path, f"declares {width}x{height} pixels; MAX_PIXELS = {MAX_PIXELS:,}")
    if max(width, height) > MAX_SIDE:
        raise BadFile(path, f"declares {width}x{height} pixels; MAX_SIDE = {MAX_SIDE:,}")
    if image.format in ("JPEG", "MPO"):
        file.seek(0)
        blocks = iter(lambda: file.read(1 << 20), b"")
        scans = sum(len(re.findall(rb"\xff\xda\x00(?:\x08\x01|\x0a\x02|\x0c\x03|\x0e\x04)", block)) for block in blocks)
        most = MAX_SCANNED // (width * height)
        if scans > most:
            raise BadFile(path, f"a JPEG of {scans:,} scans; of this size {most:,} are read")


@contextlib.contextmanager
def _naming(path: str | os.PathLike) -> Iterator[None]:
    """Whatever Pillow raises inside becomes the BadFile of `path`."""
    try:
        yield
    except BadFile:
        raise
    except UnidentifiedImageError:
        raise BadFile(path, "not an image (JPEG, PNG, WebP, BMP, TIFF or GIF)") from None
    except Image.DecompressionBombError:
        raise BadFile(path, f"declares more than MAX_PIXELS = {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise BadFile(path, "does not fit into memory") from None
    except Exception as error:  # its decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadFile(path, reason.splitlines()[0]) from None


@contextlib.contextmanager
def opened(path: str | os.PathLike) -> Iterator[Image.Image]:
    """A file as Pillow opens it, what it declares checked, pixels not decoded yet. Raises BadFile."""
    with _naming(path):
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise BadFile(path, "not a regular file")
        if not status.st_size:
            raise BadFile(path, "empty file")
        with _CountedFile(io.FileIO(path)) as file:
            image = Image.open(file, formats=FORMATS)
            _check_declared(path, image, file)
            if image.format == "PNG":  # decoding does not look at the check sums of pixel data
                image.verify()
            file.seek(0)
            with Image.open(file, formats=FORMATS) as image:  # afresh, as verify() demands
                yield image


# ---------------------------------------------------------------------------------------------------- decoding


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored -> as seen, for the values 1-8 of EXIF tag 0x0112."""
    if orientation >= 5:  # stored with rows and columns exchanged
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _orientation(file: Image.Image) -> int:
    try:
        value = int(file.getexif().get(0x0112, 1))
        return value if 1 <= value <= 8 else 1
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _by_rows(function: Callable[[np.ndarray], np.ndarray], array: np.ndarray) -> np.ndarray:
    """function(array), some rows at a time: its floats would take 8 times the memory of the result."""
    return np.concatenate([function(rows) for rows in np.array_split(array, min(len(array), 1 + (array.size >> 20)))])


def _to_bytes(file: Image.Image) -> np.ndarray:
    """Modes I, I;16* and F -> uint8, by the smallest of 1 (floats only), 255, 65535 and the maximum that holds all."""

    def light(rows: np.ndarray) -> np.ndarray:
        return np.nan_to_num(rows.astype(np.float64), posinf=0, neginf=0).clip(min=0)

    values = np.asarray(file)
    largest = _by_rows(lambda rows: light(rows).max(keepdims=True), values).max()
    scales = (1, 255, 65535) if file.mode == "F" else (255, 65535)
    scale = next((s for s in scales if largest <= s), largest)
    return _by_rows(lambda rows: np.rint(light(rows) * (255 / scale)).astype(np.uint8), values)


def _has_alpha(file: Image.Image) -> bool:
    return file.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in file.info


def rgb(file: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3) uint8, transparency on white."""
    if file.mode == "F" or file.mode.startswith("I"):
        return np.repeat(_to_bytes(file)[..., None], 3, axis=2)
    if _has_alpha(file):  # on white, as a page shows it: what lies under transparent pixels is often arbitrary
        rgba = file.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(file.convert("RGB"))


def _is_cut_out(rgba: np.ndarray, light: np.ndarray, seen: np.ndarray) -> bool:
    """Whether a photograph is seen where alpha leaves something to be seen: colours, which no matte has, and many."""
    if seen.all() or not seen.any():
        return False
    coloured = np.ptp(rgba[..., :3], axis=2)[seen] > 8
    return bool(coloured.mean() > 0.05 and np.count_nonzero(np.bincount(light[seen], minlength=256)) > 16)


def grey(file: Image.Image) -> np.ndarray:
    """Any mode -> (H, W) uint8, transparency on black."""
    if file.mode == "F" or file.mode.startswith("I"):
        return _to_bytes(file)
    if _has_alpha(file):  # on black; a cut-out, and a mask of one colour drawn in its alpha, are their alpha
        rgba = file.convert("RGBA")
        light, alpha = (np.asarray(band) for band in rgba.convert("LA").split())
        drawn_in_alpha = light.min() == light.max() and alpha.min() < alpha.max()
        if drawn_in_alpha or _is_cut_out(np.asarray(rgba), light, alpha > 127):
            return alpha
        return np.rint(light * (alpha / np.float32(255))).astype(np.uint8)
    return np.asarray(file.convert("L" if file.mode in ("1", "L", "P", "RGB") else "RGB").convert("L"))


def decode(
    path: str | os.PathLike, image: Image.Image, convert: Callable[[Image.Image], np.ndarray]
) -> tuple[np.ndarray, int]:
    """First frame of an opened file by `rgb` or `grey`, upright, and its orientation as stored. Raises BadFile."""
    with _naming(path):
        orientation = _orientation(image)
        image.load()
        # Pillow turns TIFFs itself while loading, and takes the tag out
        turned = orientation != 1 and _orientation(image) == 1
        array = convert(image)
        return np.ascontiguousarray(array if turned else turn(array, orientation)), orientation


def _read(path: str | os.PathLike, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    with opened(path) as image, ROOM.take(image.width * image.height):
        return decode(path, image, convert)[0]


def scale_mask(grey: np.ndarray, counts: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
    """Luminance (H, W) uint8 -> (mask uint8 with the object at 255, whether it was taken for noise on an empty mask).

    Values 0 and 1, or 0 and any one value, become 0 and 255; other masks are divided by their maximum. The published
    code does that to every mask and so turns the compression noise of an empty one (values of 1 to 5) into foreground.
    counts: of its values, (256,), where they are known.
    """
    levels = np.flatnonzero(np.bincount(grey.ravel(), minlength=256) if counts is None else counts)
    top = int(levels[-1])
    if top in (0, 255):
        return grey, False
    if top == 1 or (len(levels) == 2 and levels[0] == 0):
        return np.where(grey == top, np.uint8(255), np.uint8(0)), False
    if top < NOISE_BELOW:
        return np.zeros_like(grey), True
    return np.rint(np.arange(256) * 255 / top).clip(max=255).astype(np.uint8)[grey], False


def labels_in(light: np.ndarray, counts: np.ndarray) -> str | None:
    """Of a (H, W) uint8 that is a map of labels (classes, instances, a trimap) and no mask: its values in words.

    counts: of its values, (256,).
    Told by few values: none bright enough for an object, in large pieces; or small ones, and less of 255, which is the
    border that other tools are to ignore. Soft and graded masks have values between, and compression noise no pieces.
    """
    levels = np.flatnonzero(counts)
    top = int(levels[-1])
    if not 2 <= len(levels) <= MOST_LABELS or (len(levels) == 2 and levels[0] == 0):
        return None
    if top < NOISE_BELOW:
        width = light.shape[1]
        changes = (light[:, 1:] != light[:, :-1]).mean() if width > 1 else 1.0
        labels = np.sort(counts)[-2] >= LEAST_PIECE * light.size and changes < max(0.02, 4 / width)
    else:
        ids = counts[1 : MOST_CLASSES + 1].sum()
        labels = levels[0] == 0 and top == 255 and levels[-2] <= MOST_CLASSES and ids > counts[255]
    return ", ".join(map(str, levels[:6])) + (", ..." if len(levels) > 6 else "") if labels else None


def as_mask(path: str | os.PathLike, light: np.ndarray) -> tuple[np.ndarray, bool]:
    """`scale_mask` of a file's luminance. Raises BadFile for labels."""
    counts = np.bincount(light.ravel(), minlength=256)
    if labels := labels_in(light, counts):
        raise BadFile(path, f"holds labels ({labels}), no mask of bright object and dark ground: make one of 0 and 255")
    return scale_mask(light, counts)


def read_image(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: transparency on white, 16-bit and float as bytes, of an animation the first frame.

    Raises BadFile.
    """
    return _read(path, rgb)


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """(H, W) uint8, 0 background to 255 object (`as_mask` of the luminance), upright. Raises BadFile."""
    return as_mask(path, _read(path, grey))[0]


def _probabilities(file: Image.Image) -> np.ndarray:
    if file.mode == "F":
        return np.asarray(file, np.float64)
    return np.asarray(file, np.float64) / 65535 if file.mode.startswith("I") else grey(file) / 255.0


def read_map(path: str | os.PathLike) -> np.ndarray:
    """A saved saliency map as (H, W) float64 in [0, 1], upright: 8 bits / 255, 16 bits / 65535, floats as they are.

    Floats come from a TIFF, or from a .npy of shape (H, W), (1, H, W) or the like. Raises BadFile, also for values that
    are not finite or not in [0, 1].
    """
    if Path(path).suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadFile(path, f"not an array that numpy reads ({str(error).splitlines()[0]})") from None
        if array.ndim > 2:
            array = array.squeeze()
        if array.ndim != 2 or not array.size or (array.dtype.kind not in "fb" and array.dtype != np.uint8):
            raise BadFile(path, f"holds {array.dtype} of shape {array.shape}; a map is (H, W), floating point or uint8")
        array = array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)
    else:
        array = _read(path, _probabilities)
    if not np.isfinite(array).all():
        raise BadFile(path, "holds values that are not numbers (NaN or infinite)")
    low, high = array.min(), array.max()
    if low < -1e-6 or high > 1 + 1e-6:  # resampling in fp32 may leave [0, 1] by a rounding
        raise BadFile(path, f"holds values from {low:.4g} to {high:.4g}; a map holds probabilities, 0 to 1")
    return array.clip(0, 1)
