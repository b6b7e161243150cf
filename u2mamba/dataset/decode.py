"""Image, mask and map files -> arrays: any Pillow mode, upright; or `BadFile` with the reason.

The cache of decoded pairs is keyed on a checksum of this file, masks.py and rescale.py: an edit here rebuilds it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image
from PIL.Image import Transpose as Turn

from u2mamba.dataset.image_file import (
    FULL_RANGES,
    BadFile,
    decode_budget,
    errors_as_bad_file,
    load_pixels,
    open_image,
    to_bytes,
)
from u2mamba.dataset.masks import OBJECT, MaskKind, MaskRule, RawMask, classify, is_flat

T = TypeVar("T")

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet; one value for each channel of an image
ASPECT_TOLERANCE = 0.01  # a mask of another size is used if its aspect ratio is within 1 % of the image's
COLORED = 16  # channel difference above which a pixel is colored: ignores the chroma noise of lossy files
UPRIGHT = {  # EXIF orientation -> transposition that makes the stored image upright
    2: Turn.FLIP_LEFT_RIGHT, 3: Turn.ROTATE_180, 4: Turn.FLIP_TOP_BOTTOM, 5: Turn.TRANSPOSE, 6: Turn.ROTATE_270,
    7: Turn.TRANSVERSE, 8: Turn.ROTATE_90,
}  # fmt: skip


def _orientation(file: Image.Image) -> int:
    try:
        value = int(file.getexif().get(0x0112, 1))
        return value if 1 <= value <= 8 else 1
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _is_wide(file: Image.Image) -> bool:
    """Whether pixels are integers of more than 8 bits, or floats."""
    return file.mode == "F" or file.mode.startswith("I")


def _has_alpha(file: Image.Image) -> bool:
    return file.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in file.info


def alpha_channel(file: Image.Image) -> np.ndarray | None:
    """(H, W) uint8, also from transparency of a palette or color key; None: the file has none."""
    return np.asarray(file.convert("RGBA").getchannel("A")) if _has_alpha(file) else None


def to_rgb(file: Image.Image) -> np.ndarray:
    """Any mode -> (H, W, 3) uint8. Transparent parts become white, since the colors under them are often arbitrary."""
    if _is_wide(file):
        return np.repeat(to_bytes(file)[0][..., None], 3, axis=2)
    if _has_alpha(file):
        rgba = file.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(file.convert("RGB"))


def _has_shape(alpha: np.ndarray | None) -> bool:
    """Whether an alpha channel has transparent and opaque parts."""
    return alpha is not None and bool(alpha.min() <= OBJECT < alpha.max())


def to_mask(file: Image.Image) -> tuple[np.ndarray, MaskKind]:
    """Any mode of a mask file -> its values, (H, W) uint8, and what they are.

    The alpha channel where it has a shape; the gray levels; where colors are used, the indices of a palette, or of up
    to 256 flat colors (0: black). The luminance of colors would be neither a label nor a mask.
    """
    if _is_wide(file):
        values, full_range = to_bytes(file)
        return values, classify(values, "gray", full_range=full_range if full_range in FULL_RANGES else 255)
    alpha, flat_alpha = alpha_channel(file), -1
    if alpha is not None:
        if np.count_nonzero(np.unique(alpha)) < 2:  # at most one opacity besides 0
            alpha = np.where(alpha > 0, np.uint8(255), np.uint8(0))
        if _has_shape(alpha):
            return alpha, classify(alpha, "alpha")
        flat_alpha = int(alpha.max() > OBJECT) * 255
        if flat_alpha == 0:
            return np.zeros_like(alpha), classify(np.zeros_like(alpha), "gray", alpha=0)
    source = "gray"
    if file.mode in ("1", "L", "LA"):
        values = np.asarray(file.convert("L"))
        return values, classify(values, source, alpha=flat_alpha)
    image = file.convert("RGB")
    pixels = np.asarray(image)
    spread = np.ptp(pixels, axis=2)
    pure = (pixels.min(axis=2) <= COLORED).mean() > 0.95  # red, say, whose luminance is low
    values = pixels.max(axis=2) if pure else np.asarray(image.convert("L"))
    if file.mode == "P" and spread.any():
        source, values = "labels", np.asarray(file)
    elif (spread > COLORED).any() and image.getcolors(256):
        distinct, index = np.unique(pixels @ (1 << 16, 1 << 8, 1), return_inverse=True)
        index = (index.reshape(values.shape) + (distinct[0] != 0)).astype(np.uint8)
        if is_flat(index):
            source, values = "labels", index
    return values, classify(values, source, alpha=flat_alpha)


def decode(path: str | os.PathLike, image: Image.Image, convert: Callable[[Image.Image], T]) -> tuple[T, int]:
    """The first frame of an opened file, upright and converted (`to_rgb`, `to_mask`, ...), and its EXIF orientation.
    Raises BadFile."""
    with errors_as_bad_file(path):
        orientation = _orientation(image)
        loaded = load_pixels(path, image)
        turn = _orientation(image)  # 1 for a TIFF: Pillow rotates it while loading, and removes the tag
        result = convert(loaded.transpose(UPRIGHT[turn]) if turn != 1 else loaded)
        if convert is to_rgb and result.shape[2] != len(MEAN):
            raise ValueError(f"{result.shape[2]} channels, but MEAN in u2mamba/dataset/decode.py has {len(MEAN)}")
        return result, orientation


def _read(path: str | os.PathLike, convert: Callable[[Image.Image], T]) -> T:
    with open_image(path) as image, decode_budget(image.width * image.height):
        return decode(path, image, convert)[0]


def read_image(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: transparent parts white, 10 to 16 bits and floats scaled to bytes, the first frame
    of an animation. Raises BadFile."""
    return _read(path, to_rgb)


def read_orientation(path: str | os.PathLike) -> int:
    """EXIF tag 0x0112, 1 to 8, from the header alone. Raises BadFile."""
    with open_image(path) as image:
        return _orientation(image)


def read_raw_mask(path: str | os.PathLike) -> RawMask:
    """A mask file before the rule of its dataset is known. Raises BadFile."""
    return RawMask(Path(path), *_read(path, to_mask))


def read_mask(path: str | os.PathLike, rule: MaskRule | None = None) -> np.ndarray:
    """(H, W) uint8, 0 background to 255 object, upright; see masks.py. Raises BadFile."""
    return read_raw_mask(path).by(rule)


def to_probabilities(file: Image.Image) -> np.ndarray:
    """Any mode of a saved map -> (H, W) float64; the alpha channel where it has a shape, else the gray levels."""
    if _is_wide(file):
        return np.asarray(file, np.float64) / (1 if file.mode == "F" else 65535)
    alpha, image = alpha_channel(file), file.convert("RGB")
    if _has_shape(alpha):
        return alpha / 255.0
    if np.ptp(np.asarray(image), axis=2).mean() > COLORED:
        raise ValueError("holds colors; a map is gray")
    return np.asarray(image.convert("L")) / 255.0


def read_map(path: str | os.PathLike) -> np.ndarray:
    """A saved saliency map as (H, W) float64 in [0, 1], upright: 8 bits / 255, 16 bits / 65535, floats unchanged.

    Floats come from a TIFF, or from a .npy of shape (H, W), (1, H, W) or similar. Raises BadFile, also for values that
    are NaN, infinite or outside [0, 1].
    """
    if Path(path).suffix.lower() == ".npy":
        try:
            array = np.asarray(np.load(path, allow_pickle=False))  # an .npz becomes its names
        except (OSError, ValueError, EOFError) as error:
            raise BadFile(path, f"not a NumPy array ({str(error).splitlines()[0]})") from None
        array = array if array.ndim == 2 else array.squeeze()
        if array.ndim != 2 or not array.size or (array.dtype.kind not in "fb" and array.dtype != np.uint8):
            raise BadFile(path, f"holds {array.dtype} of shape {array.shape}; a map is (H, W), floating point or uint8")
        array = array / 255.0 if array.dtype == np.uint8 else array.astype(np.float64)
    else:
        array = _read(path, to_probabilities)
    if not np.isfinite(array).all():
        raise BadFile(path, "holds NaN or infinite values")
    low, high = array.min(), array.max()
    if low < -1e-6 or high > 1 + 1e-6:  # resampling in fp32 may exceed [0, 1] by a rounding error
        raise BadFile(path, f"holds values from {low:.4g} to {high:.4g}; a map holds probabilities, 0 to 1")
    return array.clip(0, 1)


class Pair(NamedTuple):
    """An image file and its mask file. split: "train" or "val" where their folder decides it."""

    stem: str
    image: Path
    mask: Path
    split: str = ""


class RawPair(NamedTuple):
    """image (H, W, 3) uint8, the mask as stored, and what the data report counts."""

    image: np.ndarray
    mask: RawMask
    resized: bool  # the mask differs in size from the image
    untagged: str  # "" or, where the mask lacks the image's EXIF tag, "seen", "stored" or "unknown": how it was drawn


@contextlib.contextmanager
def open_pair(pair: Pair, as_stored: bool = False) -> Iterator[RawPair]:
    """Decodes a pair; `decode_budget` counts it until the `with` block ends.

    A mask without the image's EXIF tag that was drawn on the image as stored is rotated with it: where the
    shapes show that, else if as_stored. Raises BadFile, also for a mask whose aspect ratio is not the image's.
    """
    with contextlib.ExitStack() as budget:
        with open_image(pair.image) as image_file, open_image(pair.mask) as mask_file:
            pixels = image_file.width * image_file.height + mask_file.width * mask_file.height
            budget.enter_context(decode_budget(pixels))
            image, orientation = decode(pair.image, image_file, to_rgb)
            (values, kind), mask_orientation = decode(pair.mask, mask_file, to_mask)
        size, untagged = image.shape[:2], ""
        if orientation != 1 and mask_orientation == 1:
            untagged = "unknown"
            if orientation >= 5 and size[0] != size[1]:
                untagged = "stored" if values.shape == size[::-1] else "seen"
            if untagged == "stored" or (untagged == "unknown" and as_stored):
                values = np.asarray(Image.fromarray(values).transpose(UPRIGHT[orientation]))
        (height, width), (rows, columns) = size, values.shape
        if abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
            raise BadFile(pair.mask, f"mask is {columns}x{rows}, its image {width}x{height}")
        yield RawPair(image, RawMask(pair.mask, values, kind), values.shape != size, untagged)


def read_pair(pair: Pair, rule: MaskRule | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(image (H, W, 3), mask (H, W)), uint8; see `open_pair`. rule: of the dataset; None: the mask's own."""
    with open_pair(pair, rule is not None and rule.as_stored) as raw:
        return raw.image, raw.mask.by(rule)
