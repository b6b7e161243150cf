"""The operations around Mamba's scan in Triton: the short convolution with its SiLU, and the RMSNorm of the result.

PyTorch needs six passes over memory for the convolution; here there are two, and backward recomputes its output.
"""

import torch
from torch import Tensor

from u2mamba.fast.launch import constexpr, jit, on_device, require, tl, triton

WARPS = 4
PER_THREAD = 16  # numbers of a tile that a thread holds
STEPS = 1024  # max tokens of a tile of the convolution
NORM_STEPS = 64  # max tokens of a tile of the norm, which holds all rows: at least 16 for up to 512 rows


@jit()
def _load_row(p, b, row, t, s_b, s_d, d, L):
    """Steps t of rows `row` of p (B, d, L); zero outside."""
    ok = (row < d)[:, None] & (t >= 0)[None, :] & (t < L)[None, :]
    return tl.load(p + b * s_b + row[:, None] * s_d + t[None, :], mask=ok, other=0.0).to(tl.float32)


@jit()
def _tap_weight(w, row, k: constexpr, d, K: constexpr):
    return tl.load(w + row * K + k, mask=row < d, other=0.0).to(tl.float32)[:, None]


@jit("d", "L", "s_xb", "s_xd")
def _conv_silu(x, w, bias, y, d, L, s_xb, s_xd, K: constexpr, ROWS: constexpr, STEPS: constexpr):
    """y_t = SiLU(bias + sum over k of w_k x_{t - K + 1 + k}) of each row of (B, d, L)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    s = tl.zeros((ROWS, STEPS), tl.float32) + tl.load(bias + row, mask=row < d, other=0.0).to(tl.float32)[:, None]
    for k in tl.static_range(K):
        s += _tap_weight(w, row, k, d, K) * _load_row(x, b, row, t - (K - 1 - k), s_xb, s_xd, d, L)
    ok = (row < d)[:, None] & (t < L)[None, :]
    tl.store(y + b * d * L + row[:, None] * L + t[None, :], s / (1.0 + tl.exp(-s)), mask=ok)


@jit("d", "L", "s_xb", "s_xd", "s_yb", "s_yd")
def _conv_silu_grad(
    dy, x, w, bias, dx, part, d, L, s_xb, s_xd, s_yb, s_yd, K: constexpr, ROWS: constexpr, STEPS: constexpr
):
    """dx, and this program's sums (K + 1, d) of the gradients of w and bias in part (B, chunks, K + 1, d)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    at = part + (b * tl.num_programs(0) + tl.program_id(0)) * (K + 1) * d + row
    grad = tl.zeros((ROWS, STEPS), tl.float32)
    for j in tl.static_range(K):  # x_t takes part in the outputs t .. t + K - 1
        s = tl.zeros((ROWS, STEPS), tl.float32) + tl.load(bias + row, mask=row < d, other=0.0).to(tl.float32)[:, None]
        for k in tl.static_range(K):
            s += _tap_weight(w, row, k, d, K) * _load_row(x, b, row, t + j - (K - 1 - k), s_xb, s_xd, d, L)
        sigmoid = 1.0 / (1.0 + tl.exp(-s))
        ds = _load_row(dy, b, row, t + j, s_yb, s_yd, d, L) * sigmoid * (1.0 + s * (1.0 - sigmoid))
        grad += _tap_weight(w, row, K - 1 - j, d, K) * ds
        if j == 0:
            tl.store(at + K * d, tl.sum(ds, 1), mask=row < d)
            for k in tl.static_range(K):
                dw = tl.sum(ds * _load_row(x, b, row, t - (K - 1 - k), s_xb, s_xd, d, L), 1)
                tl.store(at + k * d, dw, mask=row < d)
    ok = (row < d)[:, None] & (t < L)[None, :]
    tl.store(dx + b * d * L + row[:, None] * L + t[None, :], grad, mask=ok)


def _conv_tiles(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid (chunks, blocks of rows, images) and tile sizes over x (B, d, L)."""
    n, d, L = x.shape
    steps = min(STEPS, triton.next_power_of_2(L))
    rows = max(1, WARPS * 32 * PER_THREAD // 2 // steps)
    return (triton.cdiv(L, steps), triton.cdiv(d, rows), n), {"ROWS": rows, "STEPS": steps, "num_warps": WARPS}


class ConvSiLU(torch.autograd.Function):
    """apply(x, weight, bias): SiLU of the causal depthwise convolution, (B, d, L), (d, 1, K), (d) -> (B, d, L).

    The tokens of x are contiguous. Raises Unsupported.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        fits = weight.shape[:2] == (x.shape[1], 1) and bias is not None
        require(x, layout=x.stride(2) == 1 and weight.is_contiguous(), weight=fits)
        ctx.save_for_backward(x, weight, bias)
        n, d, L = x.shape
        y = torch.empty((n, d, L), dtype=x.dtype, device=x.device)
        grid, sizes = _conv_tiles(x)
        with on_device(x):
            _conv_silu[grid](x, weight, bias, y, d, L, x.stride(0), x.stride(1), K=weight.shape[-1], **sizes)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight, bias = ctx.saved_tensors
        n, d, L = x.shape
        dy = dy if dy.stride(2) == 1 else dy.contiguous()
        dx = torch.empty((n, d, L), dtype=x.dtype, device=x.device)
        grid, sizes = _conv_tiles(x)
        K = weight.shape[-1]
        part = torch.empty(n * grid[0], K + 1, d, dtype=torch.float32, device=x.device)
        strides = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
        with on_device(x):
            _conv_silu_grad[grid](dy, x, weight, bias, dx, part, d, L, *strides, K=K, **sizes)
        sums = part.sum(0)
        return dx, sums[:K].t().reshape(weight.shape).to(weight.dtype), sums[K].to(bias.dtype)


@jit("L")
def _rms_norm(x, y, w, L, eps, R: constexpr, ROWS: constexpr, STEPS: constexpr):
    """y = x / root mean square of its token * w, of each token of (B, R, L)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * R * L + row[:, None] * L + t[None, :]
    ok = (row < R)[:, None] & (t < L)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    v *= 1.0 / tl.sqrt((tl.sum(v * v, 0) / R)[None, :] + eps)
    tl.store(y + at, v * tl.load(w + row, mask=row < R, other=0.0).to(tl.float32)[:, None], mask=ok)


@jit("L")
def _rms_norm_grad(dy, x, dx, part, w, L, eps, R: constexpr, ROWS: constexpr, STEPS: constexpr):
    """dx, and this program's sums of dy * normalized x in part (B, chunks, R)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * R * L + row[:, None] * L + t[None, :]
    ok = (row < R)[:, None] & (t < L)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt((tl.sum(v * v, 0) / R)[None, :] + eps)
    v *= factor
    to = part + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * R + row
    tl.store(to, tl.sum(g * v, 1), mask=row < R)
    g *= tl.load(w + row, mask=row < R, other=0.0).to(tl.float32)[:, None]
    tl.store(dx + at, (g - v * (tl.sum(g * v, 0) / R)[None, :]) * factor, mask=ok)


def _norm_tiles(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (chunks, images) and tile sizes over x (B, R, L), all rows in each tile."""
    rows = triton.next_power_of_2(x.shape[1])
    steps = min(max(2**13 // rows, 16), NORM_STEPS, triton.next_power_of_2(x.shape[2]))
    warps = min(max(rows * steps // 2**10, WARPS), 16)
    sizes = {"R": x.shape[1], "ROWS": rows, "STEPS": steps, "num_warps": warps}
    return (triton.cdiv(x.shape[2], steps), x.shape[0]), sizes


class RMSNorm(torch.autograd.Function):
    """apply(x, weight, eps): over the rows of each token, (B, rows, L), (rows) -> (B, rows, L). Raises Unsupported."""

    @staticmethod
    def forward(ctx, x, weight, eps):
        require(x, layout=x.is_contiguous(), weight=weight.shape == x.shape[1:2])
        ctx.save_for_backward(x, weight)
        ctx.eps, y = eps, torch.empty_like(x)
        grid, sizes = _norm_tiles(x)
        with on_device(x):
            _rms_norm[grid](x, y, weight, x.shape[2], eps, **sizes)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        grid, sizes = _norm_tiles(x)
        part = torch.empty(grid[0] * grid[1], x.shape[1], dtype=torch.float32, device=x.device)
        with on_device(x):
            _rms_norm_grad[grid](dy, x, dx, part, weight, x.shape[2], ctx.eps, **sizes)
        return dx, part.sum(0).to(weight.dtype), None
