"""Image, mask and map files -> arrays: any mode that Pillow knows, upright; or `BadFile`, which names the reason.

The cache of decoded pairs is keyed on a checksum of this file and of rescale.py: an edit here rebuilds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from u2mamba.dataset.image_file import DECODE_BUDGET, BadFile, DataError, errors_as_bad_file, open_image

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; one value for each channel of an image
ASPECT_TOLERANCE = 0.01  # a mask of another size is used if its aspect ratio is within 1 % of the image's
NOISE_BELOW = 64  # a mask of many values that are all darker is compression noise on an empty mask
MAX_LABELS, MAX_CLASSES, MIN_REGION = 8, 20, 0.05  # of a label map: values, largest class, a class's share of pixels


def apply_orientation(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored -> upright, for the values 1-8 of EXIF tag 0x0112."""
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


def _to_bytes(file: Image.Image) -> np.ndarray:
    """Modes I, I;16* and F -> uint8, scaled by the first of 1 (floats only), 255, 65535, maximum that no value exceeds.

    Rows are converted in groups, since their float64 values would take 8 times the memory of the result.
    """
    values = np.asarray(file)
    groups = np.array_split(values, min(len(values), 1 + (values.size >> 20)))

    def positive(rows: np.ndarray) -> np.ndarray:
        return np.nan_to_num(rows.astype(np.float64), posinf=0, neginf=0).clip(min=0)

    maximum = max(positive(rows).max() for rows in groups)
    scales = (1, 255, 65535) if file.mode == "F" else (255, 65535)
    scale = next((s for s in scales if maximum <= s), maximum)
    return np.concatenate([np.rint(positive(rows) * (255 / scale)).astype(np.uint8) for rows in groups])


def _has_alpha(file: Image.Image) -> bool:
    return file.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in file.info


def to_rgb(file: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3) uint8. Transparent parts become white, since the colors under them are often arbitrary."""
    if file.mode == "F" or file.mode.startswith("I"):
        return np.repeat(_to_bytes(file)[..., None], 3, axis=2)
    if _has_alpha(file):
        rgba = file.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(file.convert("RGB"))


def _is_cutout(rgba: np.ndarray, luminance: np.ndarray, opaque: np.ndarray) -> bool:
    """Whether the opaque part shows a photo: many gray levels, and colors, which no mask has."""
    if opaque.all() or not opaque.any():
        return False
    colored = np.ptp(rgba[..., :3], axis=2)[opaque] > 8
    return bool(colored.mean() > 0.05 and np.count_nonzero(np.bincount(luminance[opaque], minlength=256)) > 16)


def to_gray(file: Image.Image) -> np.ndarray:
    """Any mode -> (H, W) uint8. The alpha channel is the mask of a cut-out and of an image of a single color;
    otherwise transparent parts become black."""
    if file.mode == "F" or file.mode.startswith("I"):
        return _to_bytes(file)
    if _has_alpha(file):
        rgba = file.convert("RGBA")
        luminance, alpha = (np.asarray(band) for band in rgba.convert("LA").split())
        single_color = luminance.min() == luminance.max() and alpha.min() < alpha.max()
        if single_color or _is_cutout(np.asarray(rgba), luminance, alpha > 127):
            return alpha
        return np.rint(luminance * (alpha / np.float32(255))).astype(np.uint8)
    return np.asarray(file.convert("L" if file.mode in ("1", "L", "P", "RGB") else "RGB").convert("L"))


def decode(
    path: str | os.PathLike, image: Image.Image, convert: Callable[[Image.Image], np.ndarray]
) -> tuple[np.ndarray, int]:
    """The first frame of an opened file, converted by `to_rgb` or `to_gray`, upright, and its EXIF orientation as
    stored. Raises BadFile."""
    with errors_as_bad_file(path):
        orientation = _orientation(image)
        image.load()
        # Pillow turns TIFFs itself while loading them, and removes the tag
        upright = orientation != 1 and _orientation(image) == 1
        array = convert(image)
        if array.ndim == 3 and array.shape[2] != len(MEAN):
            raise DataError(f"{path}: {array.shape[2]} channels, but MEAN in u2mamba/dataset/decode.py has {len(MEAN)}")
        return np.ascontiguousarray(array if upright else apply_orientation(array, orientation)), orientation


def _read(path: str | os.PathLike, convert: Callable[[Image.Image], np.ndarray]) -> np.ndarray:
    with open_image(path) as image, DECODE_BUDGET.hold(image.width * image.height):
        return decode(path, image, convert)[0]


def read_image(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: transparent parts white, 16 bits and floats scaled to bytes, the first frame of an
    animation. Raises BadFile."""
    return _read(path, to_rgb)


# ---------------------------------------------------------------------------------------------------- masks, maps


def _label_values(gray: np.ndarray, counts: np.ndarray) -> str | None:
    """The values of a (H, W) uint8 that is a label map (classes, instances, a trimap); None for a mask.

    counts: (256,), the histogram. Label maps have few values. Either all are too dark for an object and cover large
    regions, or they are small and outnumber 255, the border that other tools ignore. Soft masks have values in between,
    and compression noise has no large regions.
    """
    levels = np.flatnonzero(counts)
    top = int(levels[-1])
    if not 2 <= len(levels) <= MAX_LABELS or (len(levels) == 2 and levels[0] == 0):
        return None
    if top < NOISE_BELOW:
        width = gray.shape[1]
        changes = (gray[:, 1:] != gray[:, :-1]).mean() if width > 1 else 1.0
        labels = np.sort(counts)[-2] >= MIN_REGION * gray.size and changes < max(0.02, 4 / width)
    else:
        classes = counts[1 : MAX_CLASSES + 1].sum()
        labels = levels[0] == 0 and top == 255 and levels[-2] <= MAX_CLASSES and classes > counts[255]
    return ", ".join(map(str, levels[:6])) + (", ..." if len(levels) > 6 else "") if labels else None


def scale_mask(path: str | os.PathLike, gray: np.ndarray) -> tuple[np.ndarray, bool]:
    """(H, W) uint8 -> (mask uint8 with the object at 255, whether the file was compression noise on an empty mask).

    Values 0 and 1, or 0 and any other single value, become 0 and 255; other masks are divided by their maximum. The
    published code divides every mask, which turns the noise of an empty one (values 1 to 5) into foreground.
    Raises BadFile, which names `path`, for label maps.
    """
    counts = np.bincount(gray.ravel(), minlength=256)
    if labels := _label_values(gray, counts):
        raise BadFile(path, f"is a label map ({labels}), not a mask; convert it to 0 (background) and 255 (object)")
    levels = np.flatnonzero(counts)
    top = int(levels[-1])
    if top in (0, 255):
        return gray, False
    if top == 1 or (len(levels) == 2 and levels[0] == 0):
        return np.where(gray == top, np.uint8(255), np.uint8(0)), False
    if top < NOISE_BELOW:
        return np.zeros_like(gray), True
    return np.rint(np.arange(256) * 255 / top).clip(max=255).astype(np.uint8)[gray], False


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """(H, W) uint8, 0 background to 255 object, upright; see `scale_mask`. Raises BadFile."""
    return scale_mask(path, _read(path, to_gray))[0]


def _to_probabilities(file: Image.Image) -> np.ndarray:
    if file.mode == "F":
        return np.asarray(file, np.float64)
    return np.asarray(file, np.float64) / 65535 if file.mode.startswith("I") else to_gray(file) / 255.0


def read_map(path: str | os.PathLike) -> np.ndarray:
    """A saved saliency map as (H, W) float64 in [0, 1], upright: 8 bits / 255, 16 bits / 65535, floats unchanged.

    Floats come from a TIFF, or from a .npy of shape (H, W), (1, H, W) or similar. Raises BadFile, also for values that
    are NaN, infinite or outside [0, 1].
    """
    if Path(path).suffix.lower() == ".npy":
        try:
            array = np.load(path, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise BadFile(path, f"not a NumPy array ({str(error).splitlines()[0]})") from None
        if array.ndim > 2:
            array = array.squeeze()
        if array.ndim != 2 or not array.size or (array.dtype.kind not in "fb" and array.dtype != np.uint8):
            raise BadFile(path, f"holds {array.dtype} of shape {array.shape}; a map is (H, W), floating point or uint8")
        array = array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)
    else:
        array = _read(path, _to_probabilities)
    if not np.isfinite(array).all():
        raise BadFile(path, "holds NaN or infinite values")
    low, high = array.min(), array.max()
    if low < -1e-6 or high > 1 + 1e-6:  # resampling in fp32 may leave [0, 1] by a rounding
        raise BadFile(path, f"holds values from {low:.4g} to {high:.4g}; a map holds probabilities, 0 to 1")
    return array.clip(0, 1)


# ----------------------------------------------------------------------------------------------------------- pairs


class Pair(NamedTuple):
    """An image file and its mask file. split: "train" or "val" where their folder decides it."""

    stem: str
    image: Path
    mask: Path
    split: str = ""


class DecodedPair(NamedTuple):
    """image (H, W, 3) uint8, mask (h, w) uint8, and what the data report counts."""

    image: np.ndarray
    mask: np.ndarray
    low: int  # range of values in the mask file
    high: int
    noise: bool  # the mask file is compression noise on an empty mask
    resized: bool  # the mask is of another size than the image


@contextlib.contextmanager
def open_pair(pair: Pair) -> Iterator[DecodedPair]:
    """`read_pair` for many threads: DECODE_BUDGET counts the pair until the `with` block ends.

    A mask without EXIF tag that was drawn on the image as stored is turned with it. Raises BadFile, also for a mask
    whose aspect ratio is not the image's.
    """
    with contextlib.ExitStack() as budget:
        with open_image(pair.image) as image_file, open_image(pair.mask) as mask_file:
            pixels = image_file.width * image_file.height + mask_file.width * mask_file.height
            budget.enter_context(DECODE_BUDGET.hold(pixels))
            image, orientation = decode(pair.image, image_file, to_rgb)
            gray, mask_orientation = decode(pair.mask, mask_file, to_gray)
        size = image.shape[:2]
        if orientation >= 5 and mask_orientation == 1 and gray.shape == size[::-1] != size:
            gray = np.ascontiguousarray(apply_orientation(gray, orientation))
        (height, width), (rows, columns) = size, gray.shape
        if abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
            raise BadFile(pair.mask, f"mask is {columns}x{rows}, its image {width}x{height}")
        mask, noise = scale_mask(pair.mask, gray)
        yield DecodedPair(image, mask, int(gray.min()), int(gray.max()), noise, gray.shape != size)


def read_pair(pair: Pair) -> DecodedPair:
    """Decodes an image and its mask; see `open_pair`."""
    with open_pair(pair) as decoded:
        return decoded
