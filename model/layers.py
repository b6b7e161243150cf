"""The operations between U²-Net's convolutions and before Mamba's scan: plain PyTorch, or inside `fused()` the kernels
of u2mamba/fast.

Both compute the same; the plain form is the definition, and what runs on everything but the fast training step.
"""

import contextlib
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from u2mamba import fast as kernels

_fused = False


@contextlib.contextmanager
def fused(on: bool = True) -> Iterator[None]:
    """Within it the networks train through the fused kernels: for bf16 activations, channels_last."""
    global _fused
    before, _fused = _fused, on
    try:
        yield
    finally:
        _fused = before


def weight_of(layer: nn.Module) -> Tensor:
    """The weight to compute with: the low-precision copy that the fast step keeps as `layer.copy`, where it does."""
    return getattr(layer, "copy", layer.weight)


def batch_norm_relu(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """relu(bn(conv(x))) [+ residual]: (B, in, H, W) -> (B, out, H, W)."""
    if _fused and bn.training:
        return kernels.batch_norm_relu(*_kernel_arguments(conv, bn, x), residual)
    y = F.relu(bn(conv(x)), inplace=True)
    return y if residual is None else y + residual


def batch_norm_relu_pool(
    conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor, residual: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """y = `batch_norm_relu`(...) -> `max_pool`(y): y at half the size, and y for the skip connection."""
    if _fused and bn.training:
        return kernels.batch_norm_relu_pool(*_kernel_arguments(conv, bn, x), residual)
    return max_pool(batch_norm_relu(conv, bn, x, residual))


def _kernel_arguments(conv: nn.Conv2d, bn: nn.BatchNorm2d, x: Tensor) -> tuple:
    # without the bias, which batch norm cancels: its gradient is zero, and a reduction over all pixels to find that
    y = kernels.convolution(x.to(weight_of(conv).dtype), weight_of(conv), conv.padding, conv.dilation)
    return y, bn.weight, bn.bias, bn.running_mean, bn.running_var, bn.momentum, bn.eps, conv.bias


def side_output(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """conv(x) to one channel, 3x3: (B, C, H, W) -> (B, 1, H, W)."""
    if _fused and conv.out_channels == 1 and conv.bias is not None:
        return kernels.side_output(x, weight_of(conv), conv.bias)
    return conv(x)


def max_pool(x: Tensor) -> tuple[Tensor, Tensor]:
    """2x2 maximum, stride 2, odd sizes rounded up: (B, C, H, W) -> (B, C, H/2, W/2), and x for the skip connection."""
    if _fused:
        return kernels.max_pool2x2_skip(x)
    return F.max_pool2d(x, 2, stride=2, ceil_mode=True), x


def upsample_to(x: Tensor, size: torch.Size) -> Tensor:
    """Bilinear, corners not aligned: (B, C, h, w) -> (B, C, *size)."""
    if _fused:
        return kernels.upsample_to(x, tuple(size))
    return F.interpolate(x, size=tuple(size), mode="bilinear", align_corners=False)


def upsample_cat(x: Tensor, skip: Tensor) -> Tensor:
    """x brought to skip's size and put before it: (B, C, h, w), (B, D, H, W) -> (B, C + D, H, W)."""
    if x.shape[2:] == skip.shape[2:]:
        return torch.cat((x, skip), 1)
    return kernels.upsample_cat(x, skip) if _fused else torch.cat((upsample_to(x, skip.shape[2:]), skip), 1)


def layer_norm(norm: nn.LayerNorm, x: Tensor) -> Tensor:
    """(B, L, C) -> the same in the dtype to go on with: at least fp32, or x's own where the fused kernels run."""
    if _fused:
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    dtype = torch.promote_types(norm.weight.dtype, torch.float32)
    return F.layer_norm(x.to(dtype), norm.normalized_shape, norm.weight.to(dtype), norm.bias.to(dtype), norm.eps)


def project(layer: nn.Linear, v: Tensor, parts: int = 1, tokens_first: bool = False):
    """layer.weight @ v, without the bias: (B, columns, L) -> (B, rows, L), which lies in memory so, as convolution and
    scan want it, or with `tokens_first` as (B, L, rows). parts > 1: a tuple of the result's rows in so many tensors."""
    if _fused:
        return kernels.projection(weight_of(layer).to(v.dtype), v, parts, tokens_first)
    weight = layer.weight.to(v.dtype)
    if tokens_first:
        return F.linear(v.transpose(1, 2), weight).transpose(1, 2)
    results = [torch.bmm(w.expand(v.shape[0], -1, -1), v) for w in weight.chunk(parts)]
    return results[0] if parts == 1 else tuple(results)


def conv_silu(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """SiLU of the causal depthwise convolution: (B, d, L) -> (B, d, L)."""
    if _fused:
        return kernels.conv_silu(x, conv.weight, conv.bias)
    y = F.conv1d(x, conv.weight.to(x.dtype), conv.bias.to(x.dtype), padding=conv.padding, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def rms_norms(norms: Sequence[nn.RMSNorm], x: Tensor) -> Tensor:
    """Each norm over its own rows of every token: (B, rows, L) -> the same, of the norms' sizes one after the other."""
    weights = [norm.weight for norm in norms]
    return (kernels.rms_norms if _fused else kernels.rms_norms_reference)(x, weights, norms[0].eps)
