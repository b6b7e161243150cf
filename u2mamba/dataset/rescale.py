"""Images and masks of any size -> the square that the network sees, and saliency maps of that square -> any size.

Both directions are in one file because every command uses both: an edit to one (say, padding) requires the other.
`skimage.transform.resize`, which `RescaleT` uses, is linear and works on one axis at a time. It is therefore a product
with one small sparse matrix per axis: 0.8 ms instead of 30 ms for an image of 400x300 on one core.
"""

from __future__ import annotations

import functools

import numpy as np
from scipy import sparse


@functools.lru_cache(maxsize=512)
def axis_operator(length: int, size: int, published: bool = True) -> sparse.csr_array:
    """Linear interpolation along one axis, sparse: (size, length).

    published: what `skimage.transform.resize(..., mode="constant")` does, float32: after a Gaussian low-pass filter
    truncated at 4 standard deviations, and with black around the image. Otherwise without either, float64.
    """
    center = (np.arange(size)[:, None] + 0.5) * length / size - 0.5
    low = np.floor(center)
    weights, columns = np.hstack((1 - (center - low), center - low)), np.hstack((low, low + 1)).astype(np.int64)
    sigma = max(0.0, (length / size - 1) / 2) if published else 0
    radius = int(4 * sigma + 0.5)
    reach = np.arange(-radius, radius + 1)
    low_pass = np.exp(-0.5 / (sigma * sigma or 1) * reach**2)
    weights, columns = weights[..., None] * (low_pass / low_pass.sum()), columns[..., None] + reach
    if not published:
        columns = columns.clip(0, length - 1)
    used = (weights != 0) & (columns >= 0) & (columns < length)
    rows = np.broadcast_to(np.arange(size)[:, None, None], used.shape)
    return sparse.csr_array(  # the constructor sums duplicate entries
        (weights[used], (rows[used], columns[used])), shape=(size, length)
    ).astype(np.float32 if published else np.float64)


@functools.lru_cache(maxsize=4096)
def axis_index(length: int, size: int) -> np.ndarray:
    """The input index of each output in skimage's nearest-neighbor resize (order 0) along one axis: (size,) int64."""
    from skimage.transform import resize  # takes longer to import than a map to predict, which needs no mask

    ramp = np.arange(length, dtype=np.int32)[:, None]
    return resize(ramp, (size, 1), order=0, mode="constant", preserve_range=True)[:, 0].astype(np.int64)


def rescale_image(image: np.ndarray, size: int) -> np.ndarray:
    """(H, W, C) uint8 -> (size, size, C) uint8: `RescaleT`'s image, rounded to bytes."""
    if image.shape[:2] == (size, size):
        return image
    vertical, horizontal = (axis_operator(length, size) for length in image.shape[:2])
    # by channel: all of a 48-megapixel image as float32 would take 0.6 GB per thread
    channels = [(horizontal @ (vertical @ channel.astype(np.float32)).T).T for channel in np.moveaxis(image, 2, 0)]
    # skimage clips to the range of its input; it matters at the border, where mode="constant" mixes in black
    return np.rint(np.stack(channels, axis=2)).clip(image.min(), image.max()).astype(np.uint8, order="C")


def rescale_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """(H, W) uint8 -> (size, size) uint8, exactly `RescaleT`'s (order 0)."""
    if mask.shape == (size, size):
        return mask
    return mask.take(axis_index(mask.shape[0], size), 0).take(axis_index(mask.shape[1], size), 1)


def resize_map(saliency: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """The inverse of `rescale_image`: a saliency map (h, w) in [0, 1] of the network -> (H, W), of the same float type.

    Bilinear, as `F.interpolate(..., mode="bilinear", align_corners=False)`, which other SOD evaluations use too.
    """
    if saliency.shape == shape:
        return saliency
    vertical, horizontal = (
        axis_operator(length, size, published=False).astype(saliency.dtype)
        for length, size in zip(saliency.shape, shape, strict=True)
    )
    out = vertical @ (horizontal @ saliency.T).T
    return out.clip(0, 1, out=out)
