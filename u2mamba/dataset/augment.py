"""Data augmentation of a whole batch at once, on any device: the published flip and crop, or flips, rotation, random
resized crop, color jitter, sharpness and noise.

All random numbers are drawn into the plan of an epoch, a tensor that depends on (seed, epoch) alone. A run that resumes
in the middle of an epoch, on any device, sees what the uninterrupted run would have seen.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple
from zlib import crc32

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from u2mamba.dataset.decode import MEAN, STD

INDEX, TOP, LEFT, FLIP = range(4)  # columns of a plan
VFLIP, HFLIP = 1, 2  # bits of the column FLIP
NUM_RANDOM = 12  # random numbers per image
RANDOM_STEPS = 1 << 24  # they are stored as integers below this, which float32 represents exactly
SCALE, ASPECT, ANGLE, CENTER_X, CENTER_Y, BRIGHTNESS, CONTRAST, SATURATION = range(8)  # what each one decides
SHARPNESS, NOISE, NOISE_X, NOISE_Y = range(8, NUM_RANDOM)
NOISE_SHIFT = 256  # pixels: the noise of an image is a random crop of one field, larger by this than the image
MAX_ASPECT = 4 / 3  # of a random resized crop, wide or high
LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as in Pillow and torchvision


class Augmentation(NamedTuple):
    """Strength of the augmentation; all 0: the published random crop alone.

    With both scales 0 and anything else above 0, whole images are resized to the crop size.
    """

    scale_min: float = 0.0  # side of the random resized crop over the image's side
    scale_max: float = 0.0  # above 1: with reflection padding; both 1: whole images are resized to the crop size
    rotation_degrees: float = 0.0  # maximum, in both directions
    color_jitter: float = 0.0  # brightness, contrast and saturation are multiplied by 1 - color_jitter to 1 + it
    sharpness: float = 0.0  # the difference from the smoothed image is multiplied by exp(-sharpness) to exp(sharpness)
    noise: float = 0.0  # maximum standard deviation of Gaussian noise, of images in [0, 1]

    @classmethod
    def from_config(cls, cfg) -> Augmentation:
        return cls(*(getattr(cfg, name) for name in cls._fields))


def augment_batch(
    images: Tensor, masks: Tensor, random: Tensor, flips: Tensor, size: int, augmentation: Augmentation
) -> Tensor:
    """images (B, C, S, S) and masks (B, 1, S, S) in [0, 1] -> both, augmented alike: (B, C + 1, size, size).

    random: (B, NUM_RANDOM) in [0, 1). flips: (B, 2), 1 or -1: along x and along y. Does not synchronize with a GPU.
    """
    x = torch.cat((images, masks), 1)
    grid = F.affine_grid(_affine_params(random, flips, augmentation), [*x.shape[:2], size, size], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    colors = 3 if images.shape[1] > 2 else 1  # further channels, such as depth, keep their values
    image, mask = x[:, :colors], x[:, colors:]
    if augmentation.color_jitter:
        image = _color_jitter(image, random, augmentation.color_jitter)
    if augmentation.sharpness:
        image = _sharpen(image, random, augmentation.sharpness)
    if augmentation.noise:
        image = _add_noise(image, random, augmentation.noise)
    return torch.cat((image, mask), 1)


def _affine_params(random: Tensor, flips: Tensor, augmentation: Augmentation) -> Tensor:
    """(B, 2, 3): from positions in the result to positions in the image, both from -1 to 1."""
    signed = 2 * random - 1  # (B, NUM_RANDOM) in [-1, 1)
    low, high = augmentation.scale_min or 1.0, augmentation.scale_max or 1.0
    side = low + (high - low) * random[:, SCALE]
    aspect = (signed[:, ASPECT] * (0.5 * math.log(MAX_ASPECT) * (low < high))).exp()
    width, height = (side * aspect).clamp(max=high), (side / aspect).clamp(max=high)
    angle = signed[:, ANGLE] * math.radians(augmentation.rotation_degrees)
    cos, sin = angle.cos(), angle.sin()
    center = torch.stack((signed[:, CENTER_X] * (1 - width), signed[:, CENTER_Y] * (1 - height)), 1)
    sizes = torch.stack((width, height), 1)[:, None] * flips[:, None]  # of the result's two axes
    rotation = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2)
    return torch.cat((rotation * sizes, center[:, :, None]), 2)


def _color_jitter(x: Tensor, random: Tensor, strength: float) -> Tensor:
    """Brightness, contrast about the mean gray, saturation about each pixel's gray."""
    factor = (1 + strength * (2 * random - 1)).view(len(x), NUM_RANDOM, 1, 1, 1)
    x = x * factor[:, BRIGHTNESS]
    x = torch.lerp(_gray(x).mean((2, 3), keepdim=True), x, factor[:, CONTRAST])
    return torch.lerp(_gray(x), x, factor[:, SATURATION]).clamp(0, 1)


def _sharpen(x: Tensor, random: Tensor, strength: float) -> Tensor:
    """Factor < 1 blurs toward Pillow's SMOOTH filter (1 around 5, over 13), > 1 sharpens away from it."""
    factor = (strength * (2 * random[:, SHARPNESS] - 1)).exp().view(-1, 1, 1, 1)
    smooth = (9 * F.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False) + 4 * x) / 13
    return torch.lerp(smooth, x, factor).clamp(0, 1)


def _add_noise(x: Tensor, random: Tensor, strength: float) -> Tensor:
    """From one fixed noise field, so that the noise depends on the plan alone, on every device."""
    size = x.shape[2]
    top, left = (random[:, (NOISE_Y, NOISE_X)] * NOISE_SHIFT).long()[:, :, None].unbind(1)  # (B, 1)
    rows, columns = (start + torch.arange(size, device=x.device) for start in (top, left))
    field = _noise_field(x.device, size + NOISE_SHIFT)[: x.shape[1]]
    noise = field[:, rows[:, :, None], columns[:, None, :]].transpose(0, 1)
    return (x + noise * (strength * random[:, NOISE]).view(-1, 1, 1, 1)).clamp(0, 1)


@functools.lru_cache(maxsize=4)
def _noise_field(device: torch.device, size: int) -> Tensor:
    """Standard normal noise (3, size, size) on a device; created once, outside any CUDA graph."""
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(0)).to(device)


def _gray(x: Tensor) -> Tensor:
    return x if x.shape[1] == 1 else sum(w * channel for w, channel in zip(LUMA, x.split(1, dim=1), strict=True))


def epoch_plan(
    n: int,
    epoch: int,
    seed: int,
    rescale: int = 320,
    crop: int = 288,
    vflip_prob: float = 0.5,
    hflip_prob: float = 0.0,
    random: bool = False,
) -> Tensor:
    """The augmentation plan of an epoch for `n` images: (n, 4) int64, columns INDEX, TOP, LEFT, FLIP.

    The order is shuffled; the crop's offset goes from 0 to rescale - crop, both included; FLIP holds the bits VFLIP
    (probability 0.5 as published) and HFLIP. random: NUM_RANDOM more columns, for an `Augmentation`. A function of its
    arguments alone. Raises ValueError.
    """
    if not 0 < crop <= rescale:
        raise ValueError(f"crop = {crop} must be from 1 to rescale = {rescale}")
    # PyTorch's CPU generator uses 32 bits of its seed only
    generator = torch.Generator().manual_seed(crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(rescale - crop + 1, (n, 2), generator=generator)
    chance = torch.rand((n, 2), generator=generator)
    flip = (chance[:, 0] < vflip_prob) * VFLIP + (chance[:, 1] < hflip_prob) * HFLIP
    more = torch.randint(RANDOM_STEPS, (n, NUM_RANDOM), generator=generator) if random else order.new_empty((n, 0))
    return torch.cat([order[:, None], offsets, flip[:, None], more], dim=1)


@functools.lru_cache(maxsize=16)
def _scale_and_bias(device: torch.device) -> tuple[Tensor, Tensor]:
    """1/STD and -MEAN/STD on a device; created once, outside any CUDA graph."""
    scale, bias = [1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
    return torch.tensor(scale, device=device), torch.tensor(bias, device=device)


def _crop_gather(images: Tensor, masks: Tensor, rows: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """The crops (B, crop, crop, 3) and (B, crop, crop) of a plan's rows, whose values stay on the device."""
    index, top, left, flip = rows[:, :4, None].unbind(1)  # (B, 1) each
    y, x = (start + torch.arange(crop, device=images.device) for start in (top, left))  # (B, crop)
    y = torch.where((flip & VFLIP) > 0, images.shape[1] - 1 - y, y)[:, :, None]
    x = torch.where((flip & HFLIP) > 0, images.shape[2] - 1 - x, x)[:, None, :]
    return images[index[:, :, None], y, x], masks[index[:, :, None], y, x]


def _crop_slice(images: Tensor, masks: Tensor, rows: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """The same on the CPU: 0.3 ms for 12 crops, where `_crop_gather` takes 12.8 (2 cores)."""
    sources = images.numpy(), masks.numpy()
    crops = np.empty((len(rows), crop, crop, len(MEAN)), np.uint8), np.empty((len(rows), crop, crop), np.uint8)
    for place, (index, top, left, flip) in enumerate(rows[:, :4].tolist()):
        step_y, step_x = -1 if flip & VFLIP else 1, -1 if flip & HFLIP else 1
        for source, out in zip(sources, crops, strict=True):
            out[place] = source[index, ::step_y, ::step_x][top : top + crop, left : left + crop]
    return torch.from_numpy(crops[0]), torch.from_numpy(crops[1])


def normalize(pixels: Tensor, channels_last: bool = False) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32: divided by the maximum of each image, then ImageNet mean and std.

    As ToTensorLab(0). On a GPU it does not synchronize, and can be captured in a CUDA graph after one warm-up call.
    """
    count, height, width, channels = pixels.shape
    inverse, bias = _scale_and_bias(pixels.device)
    maximum = pixels.reshape(count, -1).amax(1).clamp_min(1)  # a black image stays black
    scale = inverse / maximum[:, None].float()  # (B, 3)
    # in place: on the CPU a second tensor of floats costs more than the arithmetic (12 images: 14 ms, in place 0.8)
    if channels_last:
        x = pixels.reshape(count, height, width * channels).float()  # long rows: broadcasting over 3 is slow on the CPU
        torch.addcmul(bias.repeat(width), x, scale.repeat(1, width)[:, None], out=x)
        return x.view(count, height, width, channels).permute(0, 3, 1, 2)
    x = pixels.permute(0, 3, 1, 2).contiguous().float()
    return torch.addcmul(bias[:, None, None], x, scale[:, :, None, None], out=x)


def augment(
    images: Tensor,
    masks: Tensor,
    rows: Tensor,
    crop: int = 288,
    channels_last: bool = False,
    augmentation: Augmentation | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of a plan -> x (B, 3, crop, crop) as ToTensorLab(0) makes it, y (B, 1, crop, crop) in [0, 1], both float32.

    images (N, S, S, 3) and masks (N, S, S) uint8, rows (B, 4) int64, all on one device. On a GPU there is no
    synchronization, and after one warm-up call a CUDA graph can capture it, with `rows` as the tensor to fill. The
    cache is stored channels-last, so channels_last=True saves a copy. An `augmentation` other than all 0 requires the
    random numbers in `rows`.
    """
    if not augmentation or not any(augmentation):
        crop_batch = _crop_slice if images.device.type == "cpu" else _crop_gather
        pixels, mask = crop_batch(images, masks, rows, crop)
        return normalize(pixels, channels_last), mask[:, None].float().div_(255)
    chosen, flip = images[rows[:, INDEX]].permute(0, 3, 1, 2).float(), rows[:, FLIP]
    chosen = chosen / chosen.amax((1, 2, 3), keepdim=True).clamp_min(1)
    flips = 1 - 2 * torch.stack(((flip & HFLIP) > 0, (flip & VFLIP) > 0), 1).float()
    random = rows[:, FLIP + 1 :].float() / RANDOM_STEPS
    both = augment_batch(chosen, masks[rows[:, INDEX]][:, None].float() / 255, random, flips, crop, augmentation)
    inverse, bias = _scale_and_bias(images.device)
    x = torch.addcmul(bias[:, None, None], both[:, :-1], inverse[:, None, None])
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, both[:, -1:].contiguous()
