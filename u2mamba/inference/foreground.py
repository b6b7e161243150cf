"""Foreground estimation for cut-outs: the object's colors at soft edges, where the photo blends it with its background.

Blur-fusion (Forte and Pitié, ICIP 2021): foreground and background means by box filters, coarse to fine, then a
correction from the photo's own pixel. The means are smooth, so they are computed on a reduced image.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

WORKING_SIZE = 320  # pixels: longest side of the reduced image; that of a saliency map
RADII = (45, 10, 3)  # pixels of the reduced image
BLOCK = 1 << 20  # pixels of the photo that are processed at once


def foreground_colors(image: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """image: (H, W, 3) uint8, alpha: (H, W) uint8 -> (H, W, 3) uint8: the object's colors where 0 < alpha < 255.

    Other pixels are copied from the image. `image` is left unchanged.
    """
    height, width = alpha.shape
    factor = -(-max(height, width) // WORKING_SIZE)
    # every `factor`-th pixel: the box filters average enough of them
    colors, a = (torch.from_numpy(part[::factor, ::factor] / 255.0) for part in (image, alpha))
    means = _means(colors.permute(2, 0, 1), a[None]).float()  # (6, h, w)
    result = image.copy()
    for top in range(0, height, step := max(1, BLOCK // width)):
        pixels, rows = (array[top : top + step].reshape(-1, *array.shape[2:]) for array in (image, alpha))
        soft = np.flatnonzero((rows > 0) & (rows < 255))
        own, a = (torch.from_numpy(array[soft] / np.float32(255)) for array in (pixels, rows))
        y, x = np.divmod(soft, width)
        at = torch.from_numpy(np.stack((x, y + top), 1).astype(np.float32))
        at = (2 * at / factor + 1) / torch.tensor(means.shape[:0:-1]) - 1  # grid_sample's coordinates, from -1 to 1
        mean = F.grid_sample(means[None], at[None, None].float(), padding_mode="border", align_corners=False)
        fused = _fuse(own.T, *mean[0, :, 0].chunk(2), a)
        result[top : top + step].reshape(-1, 3)[soft] = (fused * 255).round().byte().T.numpy()
    return result


def _means(image: Tensor, alpha: Tensor) -> Tensor:
    """(3, h, w), (1, h, w) -> local means of the foreground's and the background's colors, (6, h, w)."""
    foreground = background = mean = image
    for radius in RADII:
        mean = _weighted_mean(foreground, alpha, radius)
        background = _weighted_mean(background, 1 - alpha, radius)
        foreground = (mean + alpha * (image - alpha * mean - (1 - alpha) * background)).clamp(0, 1)
    return torch.cat((mean, background))


def _fuse(image: Tensor, foreground: Tensor, background: Tensor, alpha: Tensor) -> Tensor:
    """The foreground's mean, corrected by what the pixel of the photo, (3, N), differs from the mixture of the means.

    A saliency map is often low inside the object. There the pixel's color gives its fraction of foreground.
    """
    line = foreground - background
    share = ((image - background) * line).sum(0) / (line.square().sum(0) + 1e-3)
    alpha = torch.maximum(alpha, share.clamp(0, 1))
    return (foreground + alpha * (image - alpha * foreground - (1 - alpha) * background)).clamp(0, 1)


def _weighted_mean(colors: Tensor, weight: Tensor, radius: int) -> Tensor:
    """Mean over a window of 2 radius + 1 pixels, truncated at the border; `colors` where all weights are 0."""
    return (_box_sum(colors * weight, radius) + 1e-5 * colors) / (_box_sum(weight, radius) + 1e-5)


def _box_sum(x: Tensor, radius: int) -> Tensor:
    for dim in (1, 2):
        size, i = x.shape[dim], torch.arange(x.shape[dim])
        sums = torch.cat((torch.zeros_like(x.narrow(dim, 0, 1)), x.cumsum(dim)), dim)
        high, low = (i + radius + 1).clamp(max=size), (i - radius).clamp(min=0)
        x = sums.index_select(dim, high) - sums.index_select(dim, low)
    return x
