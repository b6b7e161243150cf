"""The four operations between U²-Net's convolutions, each in its plain PyTorch form.

The networks call these and nothing else, so that a faster form of one has a single place to join.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def batch_norm_relu(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(bn(conv(x))) [+ residual]: (B, in, H, W) -> (B, out, H, W)."""
    y = F.relu(bn(conv(x)))
    return y if residual is None else y + residual


def max_pool(x: Tensor) -> Tensor:
    """2x2 maximum, stride 2: (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))."""
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True)


def upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners not aligned: (B, C, h, w) -> (B, C, *size)."""
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def upsample_cat(x: Tensor, skip: Tensor) -> Tensor:
    """x brought to skip's size and put before it: (B, C, h, w), (B, D, H, W) -> (B, C + D, H, W)."""
    up = x if x.shape[2:] == skip.shape[2:] else upsample_to(x, skip.shape[2:])
    return torch.cat((up, skip), 1)
