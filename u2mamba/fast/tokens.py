"""What stands around Mamba's scan, in Triton: layer norm over few channels, the short convolution with its SiLU, and
the RMSNorms of Δ, B and C or of the result.

PyTorch gives a row of a layer norm a block of its own, which for 32 channels is mostly idle, and convolves, activates
and differentiates in six passes. Here a pass reads and writes each number once (the backward of the convolution
computes its output again).
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from u2mamba.fast.batch_norm_relu import join_sums
from u2mamba.fast.launch import constexpr, jit, on_device, sm_count, tl, triton, triton_runs

WARPS = 4
PER_THREAD = 16  # numbers of a tile that a thread holds
PROGRAMS = 8  # of the layer norm's backward, per multiprocessor; each leaves partial sums
STEPS = 1024  # tokens of a tile of the convolution, at most
NORM_STEPS = 64  # and of the norms', whose tiles hold all rows: of up to 1,024 not below 16 tokens


@jit("M", "C")
def _layer_norm(x, y, w, b, M, C, eps, ROWS: constexpr, BLOCK_C: constexpr):
    """y = (x - mean) / deviation * w + b of each row of (M, C)."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    cols = tl.arange(0, BLOCK_C)[None, :]
    ok = (row < M) & (cols < C)
    v = tl.load(x + row * C + cols, mask=ok, other=0.0).to(tl.float32)
    d = tl.where(cols < C, v - (tl.sum(v, 1) / C)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1) / C + eps)
    scale = tl.load(w + cols, mask=cols < C, other=0.0).to(tl.float32)
    shift = tl.load(b + cols, mask=cols < C, other=0.0).to(tl.float32)
    tl.store(y + row * C + cols, d * rstd[:, None] * scale + shift, mask=ok)


@jit("M", "C", "programs")
def _layer_norm_grad(dy, x, dx, part, w, M, C, programs, eps, ROWS: constexpr, BLOCK_C: constexpr):
    """dx, and this program's sums of dy and dy * normalised x in part (programs, 2, C)."""
    cols = tl.arange(0, BLOCK_C)[None, :]
    scale = tl.load(w + cols, mask=cols < C, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    moment = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for step in range(tl.program_id(0).to(tl.int64), tl.cdiv(M, ROWS), programs):
        row = step * ROWS + tl.arange(0, ROWS)[:, None]
        ok = (row < M) & (cols < C)
        v = tl.load(x + row * C + cols, mask=ok, other=0.0).to(tl.float32)
        g = tl.load(dy + row * C + cols, mask=ok, other=0.0).to(tl.float32)
        d = tl.where(cols < C, v - (tl.sum(v, 1) / C)[:, None], 0.0)
        rstd = 1.0 / tl.sqrt(tl.sum(d * d, 1) / C + eps)
        n = d * rstd[:, None]
        total += g
        moment += g * n
        g *= scale
        mean_g = (tl.sum(g, 1) / C)[:, None]
        mean_gn = (tl.sum(g * n, 1) / C)[:, None]
        tl.store(dx + row * C + cols, (g - mean_g - n * mean_gn) * rstd[:, None], mask=ok)
    at = part + tl.program_id(0) * (2 * C) + cols
    tl.store(at, tl.sum(total, 0)[None, :], mask=cols < C)
    tl.store(at + C, tl.sum(moment, 0)[None, :], mask=cols < C)


def _rows(C: int) -> dict[str, int]:
    block_c = triton.next_power_of_2(C)
    return {"ROWS": max(1, WARPS * 32 * PER_THREAD // block_c), "BLOCK_C": block_c, "num_warps": WARPS}


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, eps):
        ctx.save_for_backward(x, weight)
        ctx.eps = eps
        y, C = torch.empty_like(x), x.shape[-1]
        M, sizes = x.numel() // C, _rows(C)
        with on_device(x):
            _layer_norm[(triton.cdiv(M, sizes["ROWS"]),)](x, y, weight, bias, M, C, eps, **sizes)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dy, dx, C = dy.contiguous(), torch.empty_like(x), x.shape[-1]
        M, sizes = x.numel() // C, _rows(C)
        programs = min(triton.cdiv(M, sizes["ROWS"]), sm_count(x.device) * PROGRAMS)
        part = torch.empty(programs, 2, C, dtype=torch.float32, device=x.device)
        with on_device(x):
            _layer_norm_grad[(programs,)](dy, x, dx, part, weight, M, C, programs, ctx.eps, **sizes)
            dw, db = join_sums(part, weight)
        return dx, dw, db, None


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """`F.layer_norm` over the last dimension: (..., C), (C), (C) -> (..., C) in x's dtype, sums in fp32."""
    if not (triton_runs(x) and x.is_contiguous()):
        return F.layer_norm(x.to(weight.dtype), (x.shape[-1],), weight, bias, eps).to(x.dtype)
    return _LayerNorm.apply(x, weight, bias, eps)


@jit()
def _row_at(p, b, row, t, s_b, s_d, d, L):
    """Steps t of rows `row` of p (B, d, L); zero outside."""
    ok = (row < d)[:, None] & (t >= 0)[None, :] & (t < L)[None, :]
    return tl.load(p + b * s_b + row[:, None] * s_d + t[None, :], mask=ok, other=0.0).to(tl.float32)


@jit()
def _tap(w, row, k: constexpr, d, K: constexpr):
    return tl.load(w + row * K + k, mask=row < d, other=0.0).to(tl.float32)[:, None]


@jit("d", "L", "s_xb", "s_xd")
def _conv_silu(x, w, bias, y, d, L, s_xb, s_xd, K: constexpr, ROWS: constexpr, STEPS: constexpr):
    """y_t = SiLU(bias + sum over k of w_k x_{t - K + 1 + k}) of each row of (B, d, L)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(2).to(tl.int64)
    s = tl.zeros((ROWS, STEPS), tl.float32) + tl.load(bias + row, mask=row < d, other=0.0).to(tl.float32)[:, None]
    for k in tl.static_range(K):
        s += _tap(w, row, k, d, K) * _row_at(x, b, row, t - (K - 1 - k), s_xb, s_xd, d, L)
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
            s += _tap(w, row, k, d, K) * _row_at(x, b, row, t + j - (K - 1 - k), s_xb, s_xd, d, L)
        sigmoid = 1.0 / (1.0 + tl.exp(-s))
        ds = _row_at(dy, b, row, t + j, s_yb, s_yd, d, L) * sigmoid * (1.0 + s * (1.0 - sigmoid))
        grad += _tap(w, row, K - 1 - j, d, K) * ds
        if j == 0:
            tl.store(at + K * d, tl.sum(ds, 1), mask=row < d)
            for k in tl.static_range(K):
                dw = tl.sum(ds * _row_at(x, b, row, t - (K - 1 - k), s_xb, s_xd, d, L), 1)
                tl.store(at + k * d, dw, mask=row < d)
    ok = (row < d)[:, None] & (t < L)[None, :]
    tl.store(dx + b * d * L + row[:, None] * L + t[None, :], grad, mask=ok)


def _tiles(x: Tensor) -> tuple[tuple[int, int, int], dict[str, int]]:
    """Grid (chunks, blocks of rows, images) and tile sizes over x (B, d, L)."""
    n, d, L = x.shape
    steps = min(STEPS, triton.next_power_of_2(L))
    rows = max(1, WARPS * 32 * PER_THREAD // 2 // steps)
    return (triton.cdiv(L, steps), triton.cdiv(d, rows), n), {"ROWS": rows, "STEPS": steps, "num_warps": WARPS}


class _ConvSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x, weight, bias)
        n, d, L = x.shape
        y = torch.empty((n, d, L), dtype=x.dtype, device=x.device)
        grid, sizes = _tiles(x)
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
        grid, sizes = _tiles(x)
        K = weight.shape[-1]
        part = torch.empty(n * grid[0], K + 1, d, dtype=torch.float32, device=x.device)
        strides = (x.stride(0), x.stride(1), dy.stride(0), dy.stride(1))
        with on_device(x):
            _conv_silu_grad[grid](dy, x, weight, bias, dx, part, d, L, *strides, K=K, **sizes)
        sums = part.sum(0)
        return dx, sums[:K].t().reshape(weight.shape).to(weight.dtype), sums[K].to(bias.dtype)


def conv_silu_reference(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """The slow definition of `conv_silu`."""
    taps = weight.shape[-1]
    y = F.conv1d(x, weight.to(x.dtype), bias.to(x.dtype), padding=taps - 1, groups=x.shape[1])
    return F.silu(y[..., : x.shape[2]])


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """SiLU of each row convolved with its own taps, causally: (B, d, L), (d, 1, K), (d) -> (B, d, L)."""
    if not (triton_runs(x) and x.stride(2) == 1 and weight.is_contiguous()):
        return conv_silu_reference(x, weight, bias)
    return _ConvSiLU.apply(x, weight, bias)


@jit()
def _mean_of_group(x, row, R: constexpr, N: constexpr):
    """Mean of each column of x (rows, steps) over the group of its row: the first R, the next N, and N more."""
    first = (row < R)[:, None]
    mean = (tl.sum(tl.where(first, x, 0.0), 0) / R)[None, :]
    if N > 0:
        second, third = ((row >= R) & (row < R + N))[:, None], (row >= R + N)[:, None]
        b = tl.sum(tl.where(second, x, 0.0), 0) / N
        c = tl.sum(tl.where(third, x, 0.0), 0) / N
        mean = tl.where(first, mean, tl.where(second, b[None, :], c[None, :]))
    return mean


@jit()
def _group_weights(w_r, w_b, w_c, row, R: constexpr, N: constexpr):
    w = tl.load(w_r + row, mask=row < R, other=0.0).to(tl.float32)
    w += tl.load(w_b + row - R, mask=(row >= R) & (row < R + N), other=0.0).to(tl.float32)
    return w + tl.load(w_c + row - R - N, mask=(row >= R + N) & (row < R + 2 * N), other=0.0).to(tl.float32)


@jit("L")
def _rms_norms(x, y, w_r, w_b, w_c, L, eps, R: constexpr, N: constexpr, ROWS: constexpr, STEPS: constexpr):
    """y = x / root mean square of its group and token * w, of each token of (B, R + 2 N, L)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * (R + 2 * N) * L + row[:, None] * L + t[None, :]
    ok = (row < R + 2 * N)[:, None] & (t < L)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    v *= 1.0 / tl.sqrt(_mean_of_group(v * v, row, R, N) + eps)
    tl.store(y + at, v * _group_weights(w_r, w_b, w_c, row, R, N)[:, None], mask=ok)


@jit("L")
def _rms_norms_grad(
    dy, x, dx, part, w_r, w_b, w_c, L, eps, R: constexpr, N: constexpr, ROWS: constexpr, STEPS: constexpr
):
    """dx, and this program's sums of dy * normalised x in part (B, chunks, R + 2 N)."""
    t = tl.program_id(0) * STEPS + tl.arange(0, STEPS)
    row = tl.arange(0, ROWS)
    at = tl.program_id(1).to(tl.int64) * (R + 2 * N) * L + row[:, None] * L + t[None, :]
    ok = (row < R + 2 * N)[:, None] & (t < L)[None, :]
    v = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
    g = tl.load(dy + at, mask=ok, other=0.0).to(tl.float32)
    factor = 1.0 / tl.sqrt(_mean_of_group(v * v, row, R, N) + eps)
    v *= factor
    to = part + (tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)) * (R + 2 * N) + row
    tl.store(to, tl.sum(g * v, 1), mask=row < R + 2 * N)
    g *= _group_weights(w_r, w_b, w_c, row, R, N)[:, None]
    tl.store(dx + at, (g - v * _mean_of_group(g * v, row, R, N)) * factor, mask=ok)


class _RMSNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, eps, *weights):
        ctx.save_for_backward(x, *weights)
        ctx.eps, y = eps, torch.empty_like(x)
        grid, sizes = _norm_tiles(x, weights)
        with on_device(x):
            _rms_norms[grid](x, y, *_three(weights), x.shape[2], eps, **sizes)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, *weights = ctx.saved_tensors
        dy, dx = dy.contiguous(), torch.empty_like(x)
        grid, sizes = _norm_tiles(x, weights)
        part = torch.empty(grid[0] * grid[1], x.shape[1], dtype=torch.float32, device=x.device)
        with on_device(x):
            _rms_norms_grad[grid](dy, x, dx, part, *_three(weights), x.shape[2], ctx.eps, **sizes)
        return dx, None, *part.sum(0).to(weights[0].dtype).split([len(w) for w in weights])


def _three(weights: Sequence[Tensor]) -> Sequence[Tensor]:
    """For a kernel of three groups; the last two are empty where there is one."""
    return weights if len(weights) == 3 else (weights[0],) * 3


def _norm_tiles(x: Tensor, weights: Sequence[Tensor]) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (chunks, images) and tile sizes over x (B, rows, L), all rows in each tile."""
    rows = triton.next_power_of_2(x.shape[1])
    steps = min(max(2**13 // rows, 16), NORM_STEPS, triton.next_power_of_2(x.shape[2]))
    n = len(weights[1]) if len(weights) == 3 else 0
    warps = min(max(rows * steps // 2**10, WARPS), 16)
    sizes = {"R": len(weights[0]), "N": n, "ROWS": rows, "STEPS": steps, "num_warps": warps}
    return (triton.cdiv(x.shape[2], steps), x.shape[0]), sizes


def rms_norms_reference(x: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    """The slow definition of `rms_norms`."""
    parts = x.split([len(w) for w in weights], 1)
    parts = [v * torch.rsqrt(v.square().mean(1, keepdim=True) + eps) for v in parts]
    return torch.cat([v * w.to(x.dtype)[:, None] for v, w in zip(parts, weights, strict=True)], 1)


def rms_norms(x: Tensor, weights: Sequence[Tensor], eps: float) -> Tensor:
    """RMSNorm over the rows of each token: (B, rows, L), [(rows)] -> (B, rows, L), sums in fp32.

    With three weights, (r), (n) and (n), r + 2 n = rows: over each of these groups of rows by itself.
    """
    if not (triton_runs(x) and x.is_contiguous()):
        return rms_norms_reference(x, weights, eps)
    return _RMSNorms.apply(x, eps, *weights)
