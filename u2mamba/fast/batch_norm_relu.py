"""Batch norm + ReLU (+ residual) for training, channels_last, in three Triton launches each way.

Batch norm in training mode (Ioffe & Szegedy 2015, algorithm 1; `torch.nn.functional.batch_norm`) normalises every
channel by the mean and biased variance of its M = B*H*W values in the batch. A channels_last tensor is a matrix of M
rows of C numbers, read here in tiles of ROWS x BLOCK_C, UNROLL of them a step.

Forward: `_stats` gives each program's mean and sum of squared deviations, `_join` joins them (Chan, Golub & LeVeque
1983), `_apply` normalises, clips, adds the residual. Backward: `_grad_stats`, `_grad_join`, `_grad_apply`. Where M is
small, one program does all. Only x and two vectors are kept: the ReLU's mask is computed again from them.

Memory traffic: forward 2 reads + 1 write of the tensor, backward 4 reads + 1 write (a residual: one read more).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from u2mamba.fast.launch import constexpr, jit, on_device, rows_of, sm_count, tl, triton, triton_runs

# Launch sizes: (warps, 16-byte loads in flight per thread, most programs per multiprocessor). Each program of the first
# launch leaves partial sums, hence few and large ones there.
STATS, APPLY = (8, 4, 4), (4, 4, 32)
GRAD_STATS, GRAD_APPLY = (4, 4, 4), (8, 2, 16)
JOIN_BLOCK_C = 16
MAX_BLOCK_C = 64  # channels of a tile; 64 bf16 numbers are one 128-byte line
CHUNK = 64  # partial sums joined at once
SMALL_M, SMALL_BLOCK_C, SMALL = 1024, 8, (8, 4, 1)  # up to so many rows one launch does everything


@jit()
def _rows_of(program, programs, M, STEP: constexpr):
    """How many of M rows a program sees that takes every `programs`-th step of STEP rows."""
    steps = tl.cdiv(M, STEP)
    n = tl.cdiv(steps - program, programs) * STEP
    return tl.where((steps - 1) % programs == program, n - (steps * STEP - M), n)


@jit()
def _moments(x, cols, M, C, program, programs, ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr):
    """Mean and sum of squared deviations (BLOCK_C) of this program's rows.

    Sums are taken of the distance to the program's first row, so |mean| >> deviation costs no digits.
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
        d = tl.reshape(
            tl.where(ok, d, 0.0), (UNROLL, ROWS, BLOCK_C)
        )  # the UNROLL numbers lie in one thread: a free sum
        total += tl.sum(d, 0)
        square += tl.sum(d * d, 0)
    n = _rows_of(program, programs, M, STEP).to(tl.float32)
    total_c = tl.sum(total, 0)
    return shift + total_c / n, tl.sum(square, 0) - total_c * total_c / n


@jit()
def _join_moments(part, cols, M, C, programs, STEP: constexpr, BLOCK_C: constexpr, CHUNK: constexpr):
    """Mean and biased variance (BLOCK_C) of all rows, from the (programs, 2, C) partial ones."""
    col_ok = (cols < C)[None, :]
    shift = tl.load(part + cols, mask=cols < C, other=0.0)
    total = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    square = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    for start in range(0, programs, CHUNK):
        p = start + tl.arange(0, CHUNK)
        ok = (p < programs)[:, None] & col_ok
        at = part + p[:, None] * (2 * C) + cols[None, :]
        n = _rows_of(p, programs, M, STEP).to(tl.float32)[:, None]
        d = tl.where(ok, tl.load(at, mask=ok, other=0.0) - shift[None, :], 0.0)
        total += n * d
        square += tl.load(at + C, mask=ok, other=0.0) + n * d * d
    total_c = tl.sum(total, 0)
    distance = total_c / M
    return shift + distance, tl.maximum(tl.sum(square, 0) - total_c * distance, 0.0, tl.PropagateNan.ALL) / M


@jit()
def _join_sums(part, cols, C, programs, BLOCK_C: constexpr, CHUNK: constexpr):
    """Sums over programs (BLOCK_C each) of the (programs, 2, C) partial ones."""
    first = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    second = tl.zeros((CHUNK, BLOCK_C), tl.float32)
    for start in range(0, programs, CHUNK):
        p = start + tl.arange(0, CHUNK)
        ok = (p < programs)[:, None] & (cols < C)[None, :]
        at = part + p[:, None] * (2 * C) + cols[None, :]
        first += tl.load(at, mask=ok, other=0.0)
        second += tl.load(at + C, mask=ok, other=0.0)
    return tl.sum(first, 0), tl.sum(second, 0)


@jit()
def _keep(
    mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS: constexpr
):
    """Writes what backward needs and moves the running statistics (variance unbiased, as in PyTorch)."""
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


@jit()
def _normalise(x, res, y, mean, rstd, w, b, cols, M, C, program, programs, STEP: constexpr, RES: constexpr):
    """y = relu((x - mean) * rstd * w + b) + res, last rows first: `_moments` has left those in the L2 cache."""
    rows = tl.arange(0, STEP)  # a step is one tile here: its loads go out together, before the first store
    ok_c = cols < C
    scale = rstd * tl.load(w + cols, mask=ok_c, other=0.0).to(tl.float32)
    shift = tl.load(b + cols, mask=ok_c, other=0.0).to(tl.float32)
    steps = tl.cdiv(M, STEP)
    for step in range(program, steps, programs):
        row = (steps - 1 - step) * STEP
        ok = (rows < M - row)[:, None] & ok_c[None, :]
        at = row * C + rows[:, None] * C + cols[None, :]
        z = tl.load(x + at, mask=ok, other=0.0).to(tl.float32)
        z = (z - mean[None, :]) * scale[None, :] + shift[None, :]
        z = tl.where(z < 0.0, 0.0, z)  # not maximum(): NaN has to pass
        if RES:
            z += tl.load(res + at, mask=ok, other=0.0).to(tl.float32)
        tl.store(y + at, z, mask=ok)


@jit("M", "programs")
def _stats(x, part, M, C, programs, ROWS: constexpr, BLOCK_C: constexpr, UNROLL: constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    program = tl.program_id(1).to(tl.int64)  # offsets inside a tile fit 32 bits, those of a tile may not
    mean, m2 = _moments(x, cols, M, C, program, programs, ROWS, BLOCK_C, UNROLL)
    tl.store(part + program * (2 * C) + cols, mean, mask=cols < C)
    tl.store(part + program * (2 * C) + C + cols, m2, mask=cols < C)


@jit("M", "programs")
def _join(
    part, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, eps, M, C, programs,
    BLOCK_C: constexpr, CHUNK: constexpr, STATS_STEP: constexpr, CONV_BIAS: constexpr,
):  # fmt: skip
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mean, var = _join_moments(part, cols, M, C, programs, STATS_STEP, BLOCK_C, CHUNK)
    rstd = 1.0 / tl.sqrt(var + eps)
    _keep(mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS)


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
        _keep(mean, var, rstd, cols, M, C, mean_out, rstd_out, run_mean, run_var, conv_bias, momentum, CONV_BIAS)
    else:
        mean = tl.load(mean_out + cols, mask=cols < C, other=0.0)
        rstd = tl.load(rstd_out + cols, mask=cols < C, other=0.0)
    _normalise(x, res, y, mean, rstd, w, b, cols, M, C, program, programs, ROWS * UNROLL, RES)


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
def _grad_join(part, dw, db, C, programs, BLOCK_C: constexpr, CHUNK: constexpr):
    cols = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    total, moment = _join_sums(part, cols, C, programs, BLOCK_C, CHUNK)
    tl.store(dw + cols, moment, mask=cols < C)
    tl.store(db + cols, total, mask=cols < C)


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


def statistics(
    x: Tensor, running_mean: Tensor, running_var: Tensor, conv_bias: Tensor | None, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / deviation (C) of x, fp32; the running statistics are moved."""
    mean = torch.empty_like(running_mean, dtype=torch.float32)
    rstd = torch.empty_like(mean)
    C, M = x.shape[1], x.numel() // x.shape[1]
    (blocks, parts), sizes = _launch(x, STATS, False)
    part = torch.empty(parts, 2, C, dtype=torch.float32, device=x.device)
    kept = (mean, rstd, running_mean, running_var, mean if conv_bias is None else conv_bias, momentum, eps, M, C)
    with on_device(x):
        _stats[blocks, parts](x, part, M, C, parts, **sizes)
        _join[(triton.cdiv(C, JOIN_BLOCK_C),)](
            part, *kept, parts, BLOCK_C=JOIN_BLOCK_C, CHUNK=CHUNK, CONV_BIAS=conv_bias is not None,
            STATS_STEP=sizes["ROWS"] * sizes["UNROLL"],
        )  # fmt: skip
    return mean, rstd


def join_sums(part: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of weight and bias (C) from the partial sums (programs, 2, C) of a launch like `_grad_stats`."""
    dw, db = torch.empty_like(weight), torch.empty_like(weight)
    parts, _, C = part.shape
    _grad_join[(triton.cdiv(C, JOIN_BLOCK_C),)](part, dw, db, C, parts, BLOCK_C=JOIN_BLOCK_C, CHUNK=CHUNK)
    return dw, db


@torch.library.custom_op("u2mamba::batch_norm_relu", mutates_args=("running_mean", "running_var"))
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor,
    conv_bias: Tensor | None, residual: Tensor | None, momentum: float, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x)
    C, M = x.shape[1], x.numel() // x.shape[1]
    small = M <= SMALL_M
    grid, sizes = _launch(x, APPLY, small)
    if small:
        mean = torch.empty_like(running_mean, dtype=torch.float32)
        rstd = torch.empty_like(mean)
    else:
        mean, rstd = statistics(x, running_mean, running_var, conv_bias, momentum, eps)
    kept = (mean, rstd, running_mean, running_var, mean if conv_bias is None else conv_bias, momentum, eps, M, C)
    with on_device(x):
        _apply[grid](
            x, x if residual is None else residual, y, weight, bias, *kept, grid[1],
            RES=residual is not None, CONV_BIAS=conv_bias is not None, SMALL=small, **sizes,
        )  # fmt: skip
    return y, mean, rstd


@_forward.register_fake
def _(x, weight, bias, running_mean, running_var, conv_bias, residual, momentum, eps):
    vector = torch.empty_like(running_mean, dtype=torch.float32)
    return torch.empty_like(x), vector, torch.empty_like(vector)


@torch.library.custom_op("u2mamba::batch_norm_relu_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    dy, stride = rows_of(dy)
    dx = torch.empty_like(x)
    C, M = x.shape[1], x.numel() // x.shape[1]
    small = M <= SMALL_M
    (blocks, parts), stats_sizes = _launch(x, GRAD_STATS, small)
    grid, sizes = _launch(x, GRAD_APPLY, small)
    with on_device(x):
        if not small:
            part = torch.empty(parts, 2, C, dtype=torch.float32, device=x.device)
            _grad_stats[blocks, parts](dy, x, part, weight, bias, mean, rstd, M, C, stride, parts, **stats_sizes)
            dw, db = join_sums(part, weight)
        else:
            dw, db = torch.empty_like(weight), torch.empty_like(bias)
        _grad_apply[grid](
            dy, x, dx, weight, bias, mean, rstd, dw, db, M, C, stride, grid[1], SMALL=small, **sizes
        )  # fmt: skip
    return dx, dw, db


@_backward.register_fake
def _(dy, x, weight, bias, mean, rstd):
    return torch.empty_like(x), torch.empty_like(weight), torch.empty_like(bias)


class _BatchNormReLU(torch.autograd.Function):
    """Autograd of `_forward`: PyTorch takes no `register_autograd` for an operator that writes its arguments."""

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, conv_bias, residual, momentum, eps):
        y, mean, rstd = _forward(x, weight, bias, running_mean, running_var, conv_bias, residual, momentum, eps)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        dx, dw, db = _backward(dy, *ctx.saved_tensors)
        return dx, dw, db, None, None, None, dy if ctx.needs_input_grad[6] else None, None, None


def batch_norm_relu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1,
    eps: float = 1e-5, conv_bias: Tensor | None = None, residual: Tensor | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    """The slow definition of `batch_norm_relu`, for any device, layout and dtype."""
    mean = running_mean
    if conv_bias is not None:  # statistics of x + conv_bias, without adding it to every pixel
        mean = running_mean - conv_bias.detach().to(running_mean.dtype)
    y = F.relu(F.batch_norm(x, mean, running_var, weight, bias, training, momentum, eps))
    if training and conv_bias is not None:
        running_mean.copy_(mean + conv_bias.detach())
    return y if residual is None else y + residual


def batch_norm_relu(
    x: Tensor, weight: Tensor, bias: Tensor, running_mean: Tensor, running_var: Tensor, momentum: float = 0.1,
    eps: float = 1e-5, conv_bias: Tensor | None = None, residual: Tensor | None = None, training: bool = True,
) -> Tensor:  # fmt: skip
    """relu(batch norm of x) + residual, statistics in fp32, running statistics moved in place.

    Shapes: x, residual and the result (B, C, H, W), the others (C). `conv_bias` is the bias of the convolution before,
    which batch norm cancels: x comes without it, it gets no gradient, and only `running_mean` contains it, so that a
    state dict is that of convolution with bias + batch norm. With `training=False`, off the GPU, or where x is not
    channels_last, this is `batch_norm_relu_reference`. Raises ValueError (PyTorch's) for one value per channel.
    """
    channels_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if not (training and channels_last and triton_runs(x) and x.shape[1] > 1 and x.numel() > x.shape[1]) or (
        residual is not None and residual.dtype != x.dtype
    ):
        return batch_norm_relu_reference(
            x, weight, bias, running_mean, running_var, momentum, eps, conv_bias, residual, training
        )
    if residual is not None:
        residual = residual.contiguous(memory_format=torch.channels_last)
    return _BatchNormReLU.apply(x, weight, bias, running_mean, running_var, conv_bias, residual, momentum, eps)
