"""What happens to each training picture: the published flip and crop, and stronger changes: window, rotation, colour,
pasted objects; of a whole batch at once, on any device.

All is drawn into the plan of an epoch, a tensor made from (seed, epoch), so that a run which goes on in the middle of
an epoch, on any device, sees what the unbroken run would have seen.
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

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet

INDEX, TOP, LEFT, FLIP = range(4)  # columns of a plan
UPSIDE_DOWN, MIRROR = 1, 2  # bits of the column FLIP
NUMBERS = 9  # random numbers a picture
SCALE = 1 << 24  # they are stored as whole numbers below this, which float32 holds exactly
SIDE, ASPECT, ANGLE, ACROSS, DOWN, BRIGHTNESS, CONTRAST, SATURATION, PASTE = range(NUMBERS)
LARGEST_ASPECT = 4 / 3  # of a window, either way
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, which Pillow and torchvision use


class Changes(NamedTuple):
    """How far pictures are changed at random; all 0: not at all."""

    window: float = 0.0  # smallest window that fills the training size, as a share of the picture's size; 0: all
    beyond: float = 0.0  # by how much the largest window is larger than the picture, which is mirrored at its edges
    rotate: float = 0.0  # degrees, either way
    colour: float = 0.0  # share by which brightness, contrast and saturation rise or fall
    paste: float = 0.0  # probability that the object of another picture of the batch is put in

    @classmethod
    def of(cls, constants) -> Changes:
        """As a `Config` has them."""
        return cls(*(getattr(constants, name) for name in cls._fields))


def change(pictures: Tensor, masks: Tensor, numbers: Tensor, flips: Tensor, size: int, by: Changes) -> Tensor:
    """pictures (B, 3, S, S) and masks (B, 1, S, S) in [0, 1] -> both, changed alike: (B, 4, size, size).

    numbers: (B, NUMBERS) in [0, 1). flips: (B, 2), 1 or -1: along x and along y. Nothing waits for the device.
    """
    x = torch.cat((pictures, masks), 1)
    if by.paste:
        other = x.roll(1, 0)
        here = other[:, 3:] * (numbers[:, PASTE] < by.paste).view(-1, 1, 1, 1)
        x = torch.lerp(x, other, here)  # what shines through a soft edge stays; of hard masks it is the union
    grid = F.affine_grid(_windows(numbers, flips, by), [len(x), 4, size, size], align_corners=False)
    x = F.grid_sample(x, grid, padding_mode="reflection", align_corners=False)
    return torch.cat((_recolour(x[:, :3], numbers, by.colour), x[:, 3:]), 1) if by.colour else x


def _windows(numbers: Tensor, flips: Tensor, by: Changes) -> Tensor:
    """(B, 2, 3): from places in the result to places in the picture, both from -1 to 1."""
    spread = 2 * numbers - 1  # (B, NUMBERS) in [-1, 1)
    least, most = by.window or 1.0, 1 + by.beyond
    side = least + (most - least) * numbers[:, SIDE]
    aspect = (spread[:, ASPECT] * (0.5 * math.log(LARGEST_ASPECT) * (least < most))).exp()
    width, height = (side * aspect).clamp(max=most), (side / aspect).clamp(max=most)
    angle = spread[:, ANGLE] * math.radians(by.rotate)
    cos, sin = angle.cos(), angle.sin()
    centre = torch.stack((spread[:, ACROSS] * (1 - width), spread[:, DOWN] * (1 - height)), 1)
    sizes = torch.stack((width, height), 1)[:, None] * flips[:, None]  # of the result's two axes
    turn = torch.stack((cos, -sin, sin, cos), 1).view(-1, 2, 2)
    return torch.cat((turn * sizes, centre[:, :, None]), 2)


def _recolour(x: Tensor, numbers: Tensor, by: float) -> Tensor:
    """Brightness, contrast about the mean grey, saturation about each pixel's grey: factors from 1 - by to 1 + by."""
    factor = (1 + by * (2 * numbers - 1)).view(len(x), NUMBERS, 1, 1, 1)
    x = x * factor[:, BRIGHTNESS]
    x = torch.lerp(_grey(x).mean((2, 3), keepdim=True), x, factor[:, CONTRAST])
    return torch.lerp(_grey(x), x, factor[:, SATURATION]).clamp(0, 1)


def _grey(x: Tensor) -> Tensor:
    return sum(weight * channel for weight, channel in zip(GREY, x.split(1, dim=1), strict=True))


def epoch_plan(
    n: int,
    epoch: int,
    seed: int,
    rescale: int = 320,
    crop: int = 288,
    p_flip: float = 0.5,
    p_mirror: float = 0.0,
    numbers: bool = False,
) -> Tensor:
    """What happens to each of `n` pictures in an epoch: (n, 4) int64, columns INDEX, TOP, LEFT, FLIP.

    The order is shuffled; the window's offset goes from 0 to rescale - crop, both included; FLIP holds the bits
    UPSIDE_DOWN (p = 0.5 as published) and MIRROR. With `numbers` as many more columns as `change` draws
    from. A function of its arguments alone. Raises ValueError.
    """
    if not 0 < crop <= rescale:
        raise ValueError(f"crop = {crop} must be from 1 to rescale = {rescale}")
    # PyTorch's CPU generator looks at 32 bits of its seed only
    generator = torch.Generator().manual_seed(crc32(f"{seed} {epoch}".encode()))
    order = torch.randperm(n, generator=generator)
    offsets = torch.randint(rescale - crop + 1, (n, 2), generator=generator)
    chance = torch.rand((n, 2), generator=generator)
    flip = (chance[:, 0] < p_flip) * UPSIDE_DOWN + (chance[:, 1] < p_mirror) * MIRROR
    more = torch.randint(SCALE, (n, NUMBERS), generator=generator) if numbers else order.new_empty((n, 0))
    return torch.cat([order[:, None], offsets, flip[:, None], more], dim=1)


@functools.lru_cache(maxsize=16)
def _offsets(device: torch.device, crop: int) -> Tensor:
    """0..crop-1 on a device; made once, outside any graph."""
    return torch.arange(crop, device=device)


@functools.lru_cache(maxsize=16)
def _scale_and_bias(device: torch.device) -> tuple[Tensor, Tensor]:
    """1/STD and -MEAN/STD on a device; made once, outside any graph."""
    inverse, bias = [1 / s for s in STD], [-m / s for m, s in zip(MEAN, STD, strict=True)]
    return torch.tensor(inverse, device=device), torch.tensor(bias, device=device)


def _cut_by_index(images: Tensor, masks: Tensor, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The windows (B, crop, crop, 3) and (B, crop, crop) of a plan's rows, without looking at the rows' values."""
    index, top, left, flip = rows[:, :4, None].unbind(1)  # (B, 1) each
    y, x = top + offsets, left + offsets  # (B, crop)
    y = torch.where((flip & UPSIDE_DOWN) > 0, images.shape[1] - 1 - y, y)[:, :, None]
    x = torch.where((flip & MIRROR) > 0, images.shape[2] - 1 - x, x)[:, None, :]
    return images[index[:, :, None], y, x], masks[index[:, :, None], y, x]


def _cut_by_slice(images: Tensor, masks: Tensor, rows: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
    """The same on the CPU: 0.3 ms for 12 windows, where `_cut_by_index` takes 12.8 (2 cores)."""
    crop, wholes = len(offsets), (images.numpy(), masks.numpy())
    cuts = np.empty((len(rows), crop, crop, 3), np.uint8), np.empty((len(rows), crop, crop), np.uint8)
    for place, (index, top, left, flip) in enumerate(rows[:, :4].tolist()):
        step_y, step_x = -1 if flip & UPSIDE_DOWN else 1, -1 if flip & MIRROR else 1
        for whole, cut in zip(wholes, cuts, strict=True):
            cut[place] = whole[index, ::step_y, ::step_x][top : top + crop, left : left + crop]
    return torch.from_numpy(cuts[0]), torch.from_numpy(cuts[1])


def normalise(pixels: Tensor, channels_last: bool = False) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) float32: over the maximum of each picture, then ImageNet mean and deviation.

    What ToTensorLab(0) does. On a GPU without synchronisation, and fit for a CUDA graph after one call to warm up.
    """
    count, height, width, _ = pixels.shape
    inverse, bias = _scale_and_bias(pixels.device)
    largest = pixels.reshape(count, -1).amax(1).clamp_min(1)  # a black image stays black
    scale = inverse / largest[:, None].float()  # (B, 3)
    # in place: on the CPU a second tensor of floats costs more than the arithmetic (12 pictures: 14 ms, in place 0.8)
    if channels_last:
        x = pixels.reshape(count, height, width * 3).float()  # long rows: broadcasting over 3 is slow on the CPU
        torch.addcmul(bias.repeat(width), x, scale.repeat(1, width)[:, None], out=x)
        return x.view(count, height, width, 3).permute(0, 3, 1, 2)
    x = pixels.permute(0, 3, 1, 2).contiguous().float()
    return torch.addcmul(bias[:, None, None], x, scale[:, :, None, None], out=x)


def augment(
    images: Tensor,
    masks: Tensor,
    rows: Tensor,
    crop: int = 288,
    channels_last: bool = False,
    changes: Changes | None = None,
) -> tuple[Tensor, Tensor]:
    """Rows of a plan -> (x (B, 3, crop, crop) float32 as ToTensorLab(0) makes it, y (B, 1, crop, crop) float32 in 0-1).

    images (N, S, S, 3) and masks (N, S, S) uint8, rows (B, 4) int64, all on one device. On a GPU: no synchronisation,
    and after one call to warm up it can be captured in a CUDA graph, with `rows` as the tensor to fill. The cache is
    channels_last by nature, so channels_last=True saves a pass. With `changes` the rows must hold the numbers for them,
    and a window of any size is brought to crop x crop pixels.
    """
    if changes and any(changes):
        return _changed(images, masks, rows, crop, channels_last, changes)
    cut = _cut_by_slice if images.device.type == "cpu" else _cut_by_index
    pixels, mask = cut(images, masks, rows, _offsets(images.device, crop))
    return normalise(pixels, channels_last), mask[:, None].float().div_(255)


def _changed(
    images: Tensor, masks: Tensor, rows: Tensor, crop: int, channels_last: bool, changes: Changes
) -> tuple[Tensor, Tensor]:
    pictures, flip = images[rows[:, INDEX]].permute(0, 3, 1, 2).float(), rows[:, FLIP]
    pictures = pictures / pictures.amax((1, 2, 3), keepdim=True).clamp_min(1)
    flips = 1 - 2 * torch.stack(((flip & MIRROR) > 0, (flip & UPSIDE_DOWN) > 0), 1).float()
    numbers = rows[:, FLIP + 1 :].float() / SCALE
    both = change(pictures, masks[rows[:, INDEX]][:, None].float() / 255, numbers, flips, crop, changes)
    inverse, bias = _scale_and_bias(images.device)
    x = torch.addcmul(bias[:, None, None], both[:, :3], inverse[:, None, None])
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x, both[:, 3:].contiguous()
