"""Batch norm + ReLU (+ residual) for training, channels_last, in three Triton launches each way.

Batch norm in training mode (Ioffe & Szegedy 2015, algorithm 1; `torch.nn.functional.batch_norm`) normalizes every
channel by the mean and biased variance of its M = B*H*W values in the batch. A channels_last tensor is a matrix of M
rows of C numbers, read here in tiles of ROWS x BLOCK_C, UNROLL of them a step.

Forward: `_stats` computes each program's mean and sum of squared deviations, `_combine_stats` those of all programs
(Chan, Golub & LeVeque 1983), `_apply` normalizes, clips, adds the residual. Backward: `_grad_stats`, `_combine_grads`,
`_grad_apply`, with the ReLU's mask recomputed from x and two vectors. Where M is small, one launch is enough.

Memory traffic: forward 2 reads + 1 write of the tensor, backward 4 reads + 1 write (a residual: one read more).
"""

import torch
from torch import Tensor

from u2mamba.fast.launch import as_channels_last_rows, constexpr, jit, on_device, require, sm_count, tl, triton

# Launch sizes: (warps, 16-byte loads in flight per thread, max programs per multiprocessor). Each program of the first
# launch writes partial sums, hence few and large ones there.
STATS, APPLY = (8, 4, 4), (4, 4, 32)
GRAD_STATS, GRAD_APPLY = (4, 4, 4), (8, 2, 16)
COMBINE_BLOCK_C = 16
MAX_BLOCK_C = 64  # channels of a tile; 64 bf16 numbers are one 128-byte line
CHUNK = 64  # partial sums joined at once
SMALL_M, SMALL_BLOCK_C, SMALL = 1024, 8, (8, 4, 1)  # up to SMALL_M rows, in one launch


@jit()
def _rows_of_program(program, programs, M, STEP: constexpr):
    """Number of the M rows in a program's steps: every `programs`-th step of STEP rows is one."""
    steps = tl.cdiv(M, STEP)
    n = tl.cdiv(steps - program, programs) * STEP
    return tl.where((steps - 1) % programs == program, n - (steps * STEP - M), n)


@jit()
def _moments(x, cols, M, C, program, programs, ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr):
    """Mean and sum of squared deviations (BLOCK_C) of this program's rows.

    Sums are taken of the distance to the program's first row, so |mean| >> standard deviation loses no precision.
    """
    STEP: constexpr = ROWS * UNROLL
    rows = tl.arange(0, STEP)
    at = rows[:, None] * C + cols[None, :]
    shift = tl.load(x + program * STEP * C + cols, mask=cols < C, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    square = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for step in range(program, tl.cdiv(M, STEP), programs):
        ok = (rows < M - step * STEP)[:, None] & (cols < C)[None, :]
        d = tl.load(x + step * STEP * C + at, mask=ok, other=0.0).to(tl.float32) - shift[None, :]
        d = tl.reshape(tl.where(ok, d, 0.0), (UNROLL, ROWS, BLOCK_C))  # UNROLL numbers lie in one thread: a free sum
        total += tl.sum(d, 0)
        square += tl.sum(d * d, 0)
    n = _rows_of_program(program, programs, M, STEP).to(tl.float32)
    total_c = tl.sum(total, 0)
    return shift + total_c / n, tl.sum(square, 0) - total_c * total_c / n


@jit()
def _store_stats(
    mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS: constexpr
):
    """Stores mean and rstd for backward and updates the running statistics (variance unbiased, as in PyTorch)."""
    ok = cols < C
    tl.store(mean_out + cols, mean, mask=ok)
    tl.store(rstd_out + cols, rstd, mask=ok)
    if CONV_BIAS:
        mean += tl.load(conv_bias + cols, mask=ok, other=0.0).to(tl.float32)
    old_mean = tl.load(run_mean + cols, mask=ok, other=0.0).to(tl.float32)
    old_var = tl.load(run_var + cols, mask=ok, other=0.0).to(tl.float32)
    unbiased = var * (M.to(tl.float32) / (M - 1).to(tl.float32))
    tl.store(run_mean + cols, old_mean + momentum * (mean - old_mean), mask=ok)
    tl.store(run_var + cols, old_var + momentum * (unbiased - old_var), mask=ok)


@jit("M", "programs")
def _stats(x, part, M, C, programs, ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1).to(tl.int64)  # offsets inside a tile fit 32 bits, those of a tile may not
    mean, m2 = _moments(x, cols, M, C, program, programs, ROWS, BLOCK_C, UNROLL)
    tl.store(part + program * (2 * C) + cols, mean, mask=cols < C)
    tl.store(part + program * (2 * C) + C + cols, m2, mask=cols < C)


@jit("M", "programs")
def _combine_stats(
    part, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, eps, M, C, programs,
    BLOCK_C: constexpr, CHUNK: constexpr, STATS_STEP: constexpr, CONV_BIAS: constexpr,
):  # fmt: skip
    """Mean and biased variance (BLOCK_C) of all rows, from the (programs, 2, C) partial ones."""
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    col_ok = (cols < C)[None, :]
    shift = tl.load(part + cols, mask=cols < C, other=0.0)
    total = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    square = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    for start in range(0, programs, CHUNK):
        p = start + tl.arange(0, CHUNK)
        ok = (p < programs)[:, None] & col_ok
        at = part + p[:, None] * (2 * C) + cols[None, :]
        n = _rows_of_program(p, programs, M, STATS_STEP).to(tl.float32)[:, None]
        d = tl.where(ok, tl.load(at, mask=ok, other=0.0) - shift[None, :], 0.0)
        total += n * d
        square += tl.load(at + C, mask=ok, other=0.0) + n * d * d
    total_c = tl.sum(total, 0)
    distance = total_c / M
    mean = shift + distance
    var = tl.maximum(tl.sum(square, 0) - total_c * distance, 0.0, tl.PropagateNan.ALL) / M
    rstd = 1.0 / tl.sqrt(var + eps)
    _store_stats(mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS)


@jit("M", "programs")
def _apply(
    x, res, y, w, b, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, eps, M, C, programs,
    ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr, RES: constexpr, CONV_BIAS: constexpr, SMALL: constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1).to(tl.int64)
    if SMALL:
        mean, m2 = _moments(x, cols, M, C, program, programs, ROWS, BLOCK_C, UNROLL)
        var = m2 / M
        rstd = 1.0 / tl.sqrt(var + eps)
        _store_stats(mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS)
    else:
        mean = tl.load(mean_out + cols, mask=cols < C, other=0.0)
        rstd = tl.load(rstd_out + cols, mask=cols < C, other=0.0)
    STEP: constexpr = ROWS * UNROLL  # one tile: its loads are issued together, before the first store
    rows = tl.arange(0, STEP)
    ok_c = cols < C
    scale = rstd * tl.load(w + cols, mask=ok_c, other=0.0).to(tl.float32)
    shift = tl.load(b + cols, mask=ok_c, other=0.0).to(tl.float32)
    steps = tl.cdiv(M, STEP)
    for step in range(program, steps, programs):
        row = (steps - 1 - step) * STEP  # last rows first: `_moments` has left those in the L2 cache
        ok = (rows < M - row)[:, None] & ok_c[None, :]
        at = row * C + rows[:, None] * C + cols[None, :]
        z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        z = (z - mean[None, :]) * scale[None, :] + shift[None, :]
        z = tl.where(z < 0.0, 0.0, z)  # not maximum(): NaN has to pass
        if RES:
            z += tl.load(res + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(y + at, z, mask=ok)


@jit()
def _grad_sums(
    dy, x, mean, scale, shift, cols, M, C, S, program, programs, ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr
):
    """Sums of g and of g * (x - mean) over this program's rows, g = dy where the ReLU passed."""
    STEP: constexpr = ROWS * UNROLL
    rows = tl.arange(0, STEP)
    total = tl.zeros((ROWS, BLOCK_C), tl.float32)
    moment = tl.zeros((ROWS, BLOCK_C), tl.float32)
    for step in range(program, tl.cdiv(M, STEP), programs):
        row = step * STEP
        ok = (rows < M - row)[:, None] & (cols < C)[None, :]
        g = tl.load(dy + row * S + rows[:, None] * S + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        d = tl.load(x + row * C + rows[:, None] * C + cols[None, :], mask=ok, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.where(d * scale[None, :] + shift[None, :] <= 0.0, 0.0, g)
        total += tl.sum(tl.reshape(g, (UNROLL, ROWS, BLOCK_C)), 0)
        moment += tl.sum(tl.reshape(g * d, (UNROLL, ROWS, BLOCK_C)), 0)
    return tl.sum(total, 0), tl.sum(moment, 0)


@jit("M", "programs")
def _grad_stats(
    dy, x, part, w, b, mean_in, rstd_in, M, C, S, programs,
    ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1).to(tl.int64)
    ok = cols < C
    mean = tl.load(mean_in + cols, mask=ok, other=0.0)
    rstd = tl.load(rstd_in + cols, mask=ok, other=0.0)
    scale = rstd * tl.load(w + cols, mask=ok, other=0.0).to(tl.float32)
    shift = tl.load(b + cols, mask=ok, other=0.0).to(tl.float32)
    total, moment = _grad_sums(dy, x, mean, scale, shift, cols, M, C, S, program, programs, ROWS, BLOCK_C, UNROLL)
    tl.store(part + program * (2 * C) + cols, total, mask=ok)
    tl.store(part + program * (2 * C) + C + cols, moment * rstd, mask=ok)


@jit("programs")
def _combine_grads(part, dw, db, C, programs, BLOCK_C: constexpr, CHUNK: constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    moment = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    for start in range(0, programs, CHUNK):
        p = start + tl.arange(0, CHUNK)
        ok = (p < programs)[:, None] & (cols < C)[None, :]
        at = part + p[:, None] * (2 * C) + cols[None, :]
        total += tl.load(at, mask=ok, other=0.0)
        moment += tl.load(at + C, mask=ok, other=0.0)
    total_c, moment_c = tl.sum(total, 0), tl.sum(moment, 0)
    tl.store(dw + cols, moment_c, mask=cols < C)
    tl.store(db + cols, total_c, mask=cols < C)


@jit("M", "programs")
def _grad_apply(
    dy, x, dx, w, b, mean_in, rstd_in, dw, db, M, C, S, programs,
    ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr, SMALL: constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1).to(tl.int64)
    col_ok = cols < C
    mean = tl.load(mean_in + cols, mask=col_ok, other=0.0)
    rstd = tl.load(rstd_in + cols, mask=col_ok, other=0.0)
    scale = rstd * tl.load(w + cols, mask=col_ok, other=0.0).to(tl.float32)
    shift = tl.load(b + cols, mask=col_ok, other=0.0).to(tl.float32)
    if SMALL:
        total, moment = _grad_sums(dy, x, mean, scale, shift, cols, M, C, S, program, programs, ROWS, BLOCK_C, UNROLL)
        moment *= rstd
        tl.store(dw + cols, moment, mask=col_ok)
        tl.store(db + cols, total, mask=col_ok)
    else:
        moment = tl.load(dw + cols, mask=col_ok, other=0.0).to(tl.float32)
        total = tl.load(db + cols, mask=col_ok, other=0.0).to(tl.float32)
    offset = scale * total / M
    slope = scale * rstd * moment / M
    rows = tl.arange(0, ROWS * UNROLL)
    steps = tl.cdiv(M, ROWS * UNROLL)
    for step in range(program, steps, programs):
        row = (steps - 1 - step) * (ROWS * UNROLL)
        ok = (rows < M - row)[:, None] & col_ok[None, :]
        at = row * C + rows[:, None] * C + cols[None, :]
        g = tl.load(dy + row * S + rows[:, None] * S + cols[None, :], mask=ok, other=0.0).to(tl.float32)
        d = tl.load(x + at, mask=ok, other=0.0).to(tl.float32) - mean[None, :]
        g = tl.where(d * scale[None, :] + shift[None, :] <= 0.0, 0.0, g)
        tl.store(dx + at, scale[None, :] * g - offset[None, :] - d * slope[None, :], mask=ok)


def _launch(x: Tensor, config: tuple[int, int, int], small: bool) -> tuple[tuple[int, int], dict[str, int]]:
    """Grid (channel blocks, programs) and tile sizes for x."""
    warps, unroll, per_sm = SMALL if small else config
    C = x.shape[1]
    block_c = min(SMALL_BLOCK_C if small else MAX_BLOCK_C, triton.next_power_of_2(C))
    rows = warps * 32 * (16 // x.element_size()) // block_c
    blocks, steps = triton.cdiv(C, block_c), triton.cdiv(x.numel() // C, rows * unroll)
    programs = 1 if small else min(steps, max(1, sm_count(x.device) * per_sm // blocks))
    return (blocks, programs), {"ROWS": rows, "BLOCK_C": block_c, "UNROLL": unroll, "num_warps": warps}


class BatchNormReLU(torch.autograd.Function):
    """relu(batch norm of x, in training mode) + residual, statistics in fp32, running statistics updated in place.

    x (channels_last), residual or None, and the result: (B, C, H, W), the others (C). conv_bias or None: bias of the
    convolution before, which batch norm cancels. x excludes it, it gets no gradient, and only `running_mean` contains
    it, so that the state dict is that of convolution with bias + batch norm. Raises Unsupported.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum, eps, conv_bias, residual):
        same = residual is None or residual.dtype == x.dtype
        require(x, channels_last=True, several_values=x.numel() > x.shape[1], residual=same)
        if residual is not None:
            residual = residual.contiguous(memory_format=torch.channels_last)
        y = torch.empty_like(x)
        mean = torch.empty_like(running_mean, dtype=torch.float32)
        rstd = torch.empty_like(mean)
        C, M = x.shape[1], x.numel() // x.shape[1]
        small = M <= SMALL_M
        stats = (mean, rstd, running_mean, running_var, mean if conv_bias is None else conv_bias, momentum, eps, M, C)
        with on_device(x):
            if not small:
                (blocks, parts), sizes = _launch(x, STATS, False)
                part = torch.empty(parts, 2, C, dtype=torch.float32, device=x.device)
                _stats[blocks, parts](x, part, M, C, parts, **sizes)
                _combine_stats[(triton.cdiv(C, COMBINE_BLOCK_C),)](
                    part, *stats, parts, BLOCK_C=COMBINE_BLOCK_C, CHUNK=CHUNK, CONV_BIAS=conv_bias is not None,
                    STATS_STEP=sizes["ROWS"] * sizes["UNROLL"],
                )  # fmt: skip
            grid, sizes = _launch(x, APPLY, small)
            _apply[grid](
                x, x if residual is None else residual, y, weight, bias, *stats, grid[1],
                RES=residual is not None, CONV_BIAS=conv_bias is not None, SMALL=small, **sizes,
            )  # fmt: skip
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, weight, bias, mean, rstd = ctx.saved_tensors
        dy, stride = as_channels_last_rows(grad)
        dx, dw, db = torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)
        C, M = x.shape[1], x.numel() // x.shape[1]
        small = M <= SMALL_M
        (blocks, parts), stats_sizes = _launch(x, GRAD_STATS, small)
        grid, sizes = _launch(x, GRAD_APPLY, small)
        with on_device(x):
            if not small:
                part = torch.empty(parts, 2, C, dtype=torch.float32, device=x.device)
                _grad_stats[blocks, parts](dy, x, part, weight, bias, mean, rstd, M, C, stride, parts, **stats_sizes)
                grid_c = (triton.cdiv(C, COMBINE_BLOCK_C),)
                _combine_grads[grid_c](part, dw, db, C, parts, BLOCK_C=COMBINE_BLOCK_C, CHUNK=CHUNK)
            _grad_apply[grid](dy, x, dx, weight, bias, mean, rstd, dw, db, M, C, stride, grid[1], SMALL=small, **sizes)
        return dx, dw, db, None, None, None, None, None, grad if ctx.needs_input_grad[8] else None
