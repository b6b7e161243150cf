"""Batch norm + ReLU (+ residual), and the 2x2 max pooling and the skip connection behind it, channels_last.

In U²-Net the output y of an encoder level goes two ways: pooled to the next level, and as the second half of a
concatenation to the decoder. `batch_norm_relu_pool` writes both in one pass, y straight into the second half of a
tensor of twice the channels; `upsample_cat` fills the first half later, so that the concatenation copies nothing.
Backward finds each window's maximum again from the input of the batch norm: the gradient of y is never written.

Statistics are those of batch_norm_relu.py, windows those of max_pool.py.

Memory traffic in tensors of y's size, with the concatenation's second half: forward 2 reads + 1.25 writes instead of
4 + 2.25, backward 4.5 reads + 1 write instead of 6.25 + 2.
"""

import torch
from torch import Tensor

from u2mamba.fast.batch_norm_relu import (
    SMALL_M,
    _backward,
    batch_norm_relu,
    join_sums,
    statistics,
)
from u2mamba.fast.launch import constexpr, jit, on_device, rows_of, sm_count, tl, triton_runs
from u2mamba.fast.max_pool import (
    _largest,
    _load_windows,
    _pool_backward,
    _store_windows,
    _windows,
    max_pool2x2_skip,
)
from u2mamba.fast.upsample import _channels_last, _launch

APPLY, GRAD_STATS, GRAD_APPLY = (8, 16), (4, 8), (4, 8)  # warps, bytes of one load of a thread
PROGRAMS = 4  # of `_grad_stats_pool`, per multiprocessor


@jit()
def _vectors(w, b, mean_in, rstd_in, cols, C):
    """Mean, 1 / deviation, scale and shift of the channels `cols` (1, BLOCK_C)."""
    ok = cols < C
    rstd = tl.load(rstd_in + cols, mask=ok, other=0.0)
    scale = rstd * tl.load(w + cols, mask=ok, other=0.0).to(tl.float32)
    return (
        tl.load(mean_in + cols, mask=ok, other=0.0),
        rstd,
        scale,
        tl.load(b + cols, mask=ok, other=0.0).to(tl.float32),
    )


@jit()
def _relu(d, scale, shift):
    z = d * scale + shift
    return tl.where(z < 0.0, 0.0, z)  # not maximum(): NaN has to pass


@jit("H", "W", "blocks")
def _apply_pool(
    x, res, y, pooled, w, b, mean_in, rstd_in, H, W, C, S, blocks,
    TH: constexpr, TW: constexpr, BLOCK_C: constexpr, RES: constexpr,
):  # fmt: skip
    """y = relu(batch norm of x) + res, its pixels S apart, and the maximum of each window of it."""
    before, pooled_before, pixel, place, cols, ok00, ok01, ok10, ok11 = _windows(
        tl.program_id(0), blocks, H, W, C, TH, TW, BLOCK_C
    )
    mean, _, scale, shift = _vectors(w, b, mean_in, rstd_in, cols, C)
    v00, v01, v10, v11 = _load_windows(x + before * C, pixel, cols, W, C, ok00, ok01, ok10, ok11, 0.0)
    v00 = _relu(v00 - mean, scale, shift)
    v01 = _relu(v01 - mean, scale, shift)
    v10 = _relu(v10 - mean, scale, shift)
    v11 = _relu(v11 - mean, scale, shift)
    if RES:
        r00, r01, r10, r11 = _load_windows(res + before * C, pixel, cols, W, C, ok00, ok01, ok10, ok11, 0.0)
        v00 += r00
        v01 += r01
        v10 += r10
        v11 += r11
    _store_windows(y + before * S, pixel, cols, W, S, ok00, ok01, ok10, ok11, v00, v01, v10, v11)
    low = float("-inf")
    best, _ = _largest(v00, tl.where(ok01, v01, low), tl.where(ok10, v10, low), tl.where(ok11, v11, low))
    tl.store(pooled + pooled_before * C + place * C + cols, best, mask=ok00)


@jit()
def _grads(
    x, dpooled, dskip, mean, scale, shift, program, blocks, H, W, C, S,
    TH: constexpr, TW: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """x - mean and the gradient before the ReLU of the four pixels of a program's windows."""
    before, pooled_before, pixel, place, cols, ok00, ok01, ok10, ok11 = _windows(
        program, blocks, H, W, C, TH, TW, BLOCK_C
    )
    d00, d01, d10, d11 = _load_windows(x + before * C, pixel, cols, W, C, ok00, ok01, ok10, ok11, 0.0)
    g00, g01, g10, g11 = _load_windows(dskip + before * S, pixel, cols, W, S, ok00, ok01, ok10, ok11, 0.0)
    g = tl.load(dpooled + pooled_before * C + place * C + cols, mask=ok00, other=0.0).to(tl.float32)
    d00 -= mean
    d01 -= mean
    d10 -= mean
    d11 -= mean
    y00 = _relu(d00, scale, shift)
    y01 = _relu(d01, scale, shift)
    y10 = _relu(d10, scale, shift)
    y11 = _relu(d11, scale, shift)
    # the maxima of what forward wrote, which was rounded
    to = x.dtype.element_ty
    low = float("-inf")
    _, which = _largest(
        y00.to(to).to(tl.float32),
        tl.where(ok01, y01.to(to).to(tl.float32), low),
        tl.where(ok10, y10.to(to).to(tl.float32), low),
        tl.where(ok11, y11.to(to).to(tl.float32), low),
    )
    g00 = tl.where(y00 == 0.0, 0.0, g00 + tl.where(which == 0, g, 0.0))
    g01 = tl.where(y01 == 0.0, 0.0, g01 + tl.where(which == 1, g, 0.0))
    g10 = tl.where(y10 == 0.0, 0.0, g10 + tl.where(which == 2, g, 0.0))
    g11 = tl.where(y11 == 0.0, 0.0, g11 + tl.where(which == 3, g, 0.0))
    return d00, d01, d10, d11, g00, g01, g10, g11


@jit("H", "W", "blocks", "tiles", "parts")
def _grad_stats_pool(
    x, dpooled, dskip, part, w, b, mean_in, rstd_in, H, W, C, S, blocks, tiles, parts,
    TH: constexpr, TW: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    """part (parts, 2, C): each program's sums of the bias's and the weight's gradient over every `parts`-th tile."""
    cols = (tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, rstd, scale, shift = _vectors(w, b, mean_in, rstd_in, cols, C)
    total = tl.zeros((TH * TW, BLOCK_C), tl.float32)
    moment = tl.zeros((TH * TW, BLOCK_C), tl.float32)
    for tile in range(tl.program_id(1), tiles, parts):
        d00, d01, d10, d11, g00, g01, g10, g11 = _grads(
            x, dpooled, dskip, mean, scale, shift, tile * blocks + tl.program_id(0), blocks, H, W, C, S, TH, TW, BLOCK_C
        )
        total += (g00 + g01) + (g10 + g11)
        moment += (g00 * d00 + g01 * d01) + (g10 * d10 + g11 * d11)
    at = part + tl.program_id(1) * (2 * C) + cols
    tl.store(at, tl.sum(total, 0)[None, :], mask=cols < C)
    tl.store(at + C, tl.sum(moment, 0)[None, :] * rstd, mask=cols < C)


@jit("H", "W", "M", "blocks")
def _grad_apply_pool(
    x, dpooled, dskip, dx, w, b, mean_in, rstd_in, dw, db, H, W, C, S, M, blocks,
    TH: constexpr, TW: constexpr, BLOCK_C: constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = (program % blocks * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mean, rstd, scale, shift = _vectors(w, b, mean_in, rstd_in, cols, C)
    offset = scale * tl.load(db + cols, mask=cols < C, other=0.0).to(tl.float32) / M
    slope = scale * rstd * tl.load(dw + cols, mask=cols < C, other=0.0).to(tl.float32) / M
    d00, d01, d10, d11, g00, g01, g10, g11 = _grads(
        x, dpooled, dskip, mean, scale, shift, program, blocks, H, W, C, S, TH, TW, BLOCK_C
    )
    g00 = scale * g00 - offset - d00 * slope
    g01 = scale * g01 - offset - d01 * slope
    g10 = scale * g10 - offset - d10 * slope
    g11 = scale * g11 - offset - d11 * slope
    before, _, pixel, _, cols, ok00, ok01, ok10, ok11 = _windows(program, blocks, H, W, C, TH, TW, BLOCK_C)
    _store_windows(dx + before * C, pixel, cols, W, C, ok00, ok01, ok10, ok11, g00, g01, g10, g11)


class _BatchNormReLUPool(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, conv_bias, residual, momentum, eps):
        n, c, h, w = x.shape
        mean, rstd = statistics(x, running_mean, running_var, conv_bias, momentum, eps)
        last = {"dtype": x.dtype, "device": x.device, "memory_format": torch.channels_last}
        y = torch.empty((n, 2 * c, h, w), **last)[:, c:]
        pooled = torch.empty((n, c, -(-h // 2), -(-w // 2)), **last)
        grid, blocks, sizes = _launch(x, c, *pooled.shape[2:], *APPLY)
        with on_device(x):
            _apply_pool[grid](
                x, x if residual is None else residual, y, pooled, weight, bias, mean, rstd, h, w, c, 2 * c, blocks,
                RES=residual is not None, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, rstd, *(() if residual is None else (y,)))
        return pooled, y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dpooled, dskip):
        x, weight, bias, mean, rstd, *y = ctx.saved_tensors
        if y:  # the residual wants the gradient of y itself
            dy = _pool_backward(y[0], dpooled, dskip)
            return *_backward(dy, x, weight, bias, mean, rstd), None, None, None, dy, None, None
        _, c, h, w = x.shape
        dx = torch.empty_like(x)
        dpooled = dpooled.contiguous(memory_format=torch.channels_last)
        dskip, stride = rows_of(dskip)
        (programs,), blocks, sizes = _launch(x, c, *dpooled.shape[2:], *GRAD_STATS)
        tiles = programs // blocks
        parts = min(tiles, max(1, sm_count(x.device) * PROGRAMS // blocks))
        part = torch.empty(parts, 2, c, dtype=torch.float32, device=x.device)
        given = (weight, bias, mean, rstd)
        with on_device(x):
            _grad_stats_pool[blocks, parts](
                x, dpooled, dskip, part, *given, h, w, c, stride, blocks, tiles, parts, **sizes
            )
            dw, db = join_sums(part, weight)
            (programs,), blocks, sizes = _launch(x, c, *dpooled.shape[2:], *GRAD_APPLY)
            _grad_apply_pool[(programs,)](
                x, dpooled, dskip, dx, *given, dw, db, h, w, c, stride, x.numel() // c, blocks, **sizes
            )
        return dx, dw, db, None, None, None, None, None, None


def batch_norm_relu_pool(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1,
    eps: float = 1e-5, conv_bias: Tensor | None = None, residual: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """y = `batch_norm_relu` of the same arguments, in training mode -> (2x2 maxima of y, y).

    x (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2)) and (B, C, H, W). y has room for `upsample_cat` before its channels.
    Where the kernels do not serve, and on maps that one launch normalises, the separate ones do it.
    """
    vectors = (weight, bias, running_mean, running_var)
    if not (triton_runs(x) and _channels_last(x) and x.shape[1] > 1 and x.numel() // x.shape[1] > SMALL_M) or (
        residual is not None and residual.dtype != x.dtype
    ):
        return max_pool2x2_skip(batch_norm_relu(x, *vectors, momentum, eps, conv_bias, residual))
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    pooled, y = _BatchNormReLUPool.apply(x, *vectors, conv_bias, residual, momentum, eps)
    y.has_room = True
    return pooled, y
