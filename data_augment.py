"""Stronger changes of training pictures than the published flip and crop: window, rotation, colour, pasted objects.

Each is drawn from numbers that the plan of an epoch holds (`data_loader.epoch_plan`), so that a run which goes on in
the middle of an epoch, on any device, sees what the unbroken run would have seen.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

NUMBERS = 9  # random numbers a picture
SCALE = 1 << 24  # they are stored as whole numbers below this, which float32 holds exactly
SIDE, ASPECT, ANGLE, ACROSS, DOWN, BRIGHTNESS, CONTRAST, SATURATION, PASTE = range(NUMBERS)
LARGEST_ASPECT = 4 / 3  # of a window, either way
GREY = (0.299, 0.587, 0.114)  # luma of ITU-R BT.601, which Pillow and torchvision use


class Changes(NamedTuple):
    """How far pictures are changed at random; all 0: not at all."""

    window: float = 0.0  # smallest window that fills the training size, as a share of the picture's size; 0: all
    rotate: float = 0.0  # degrees, either way
    colour: float = 0.0  # share by which brightness, contrast and saturation rise or fall
    paste: float = 0.0  # probability that the object of another picture of the batch is put in


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
    least = by.window or 1.0
    side = least + (1 - least) * numbers[:, SIDE]
    aspect = (spread[:, ASPECT] * (0.5 * math.log(LARGEST_ASPECT) * (least < 1))).exp()
    width, height = (side * aspect).clamp(max=1), (side / aspect).clamp(max=1)
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
