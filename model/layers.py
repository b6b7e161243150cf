"""The operations between U²-Net's convolutions and around Mamba's scan, in plain PyTorch: the reference definitions.

Modules call them as `self.ops.<operation>(...)`; an object with faster, equivalent methods may replace `ops`.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainOps:
    @staticmethod
    def batch_norm_relu(conv: nn.Conv2d, norm: nn.Module, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """relu(norm(conv(x))) [+ residual]: (B, in, H, W) -> (B, out, H, W)."""
        y = F.relu(norm(conv(x)), inplace=True)
        return y if residual is None else y + residual

    @staticmethod
    def side_output(conv: nn.Conv2d, x: Tensor) -> Tensor:
        """conv(x), 3x3: (B, C, H, W) -> (B, out_ch, H, W)."""
        return conv(x)

    @staticmethod
    def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
        """2x2, odd sizes rounded up: (B, C, H, W) -> (B, C, H/2, W/2), and x for the skip connection."""
        return F.max_pool2d(x, 2, stride=2, ceil_mode=True), x

    @staticmethod
    def upsample_to(x: Tensor, size: torch.Size) -> Tensor:
        """Bilinear, corners not aligned: (B, C, h, w) -> (B, C, *size)."""
        return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)

    @staticmethod
    def upsample_cat(x: Tensor, skip: Tensor) -> Tensor:
        """x upsampled to skip's size, then skip: (B, C, h, w), (B, D, H, W) -> (B, C + D, H, W)."""
        same = x.shape[2:] == skip.shape[2:]
        return torch.cat((x if same else PlainOps.upsample_to(x, skip.shape[2:]), skip), 1)

    @staticmethod
    def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        """(B, L, C) -> the same, in at least fp32."""
        dtype = torch.promote_types(norm.weight.dtype, torch.float32)
        return F.layer_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)

    @staticmethod
    def project(layer: nn.Linear, v: Tensor, parts: int = 1, tokens_first: bool = False):
        """layer.weight @ v, without the bias: (B, columns, L) -> (B, rows, L), with `tokens_first` in the memory layout
        (B, L, rows). parts > 1: a tuple of the result's rows in that many tensors."""
        weight = layer.weight.to(v.dtype)
        if tokens_first:
            return F.linear(v.transpose(1, 2), weight).transpose(1, 2)
        results = [torch.bmm(w.expand(v.shape[0], -1, -1), v) for w in weight.chunk(parts)]
        return results[0] if parts == 1 else tuple(results)

    @staticmethod
    def conv_silu(conv: nn.Conv1d, x: Tensor) -> Tensor:
        """SiLU of the causal depthwise convolution: (B, d, L) -> (B, d, L)."""
        y = F.conv1d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=conv.padding, groups=x.shape[1])
        return F.silu(y[..., : x.shape[2]])

    @staticmethod
    def rms_norm(norm: nn.RMSNorm, x: Tensor) -> Tensor:
        """Over the rows of each token: (B, rows, L) -> the same."""
        y = x * torch.rsqrt(x.square().mean(1, keepdim=True) + norm.eps)
        return y * norm.weight.to(x.dtype)[:, None]
