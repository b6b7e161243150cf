"""The selective scan of Mamba on the GPU, forward and backward; model/selective_scan.py defines it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t,  times SiLU(z_t) where a gate z is given

The length is cut into chunks. `_chunk_states` computes each chunk's last state from a zero start,
`_propagate_chunk_states` turns these into the state at the start of each chunk; then `_scan` does all chunks at once.
Backward does the same from the end with the gradient of the state, and `_scan_backward` walks each chunk both ways. A
single chunk needs neither of the first two. Only the states at the chunks' starts are kept for the backward pass, which
recomputes the others: n / chunk fp32 numbers per element, 6 % of u, delta, z and y in bf16 at n = 16, chunk 128.
"""

import math

import torch
from torch import Tensor

from u2mamba.fast import scan_grads, scan_kernels
from u2mamba.fast.launch import on_device, require
from u2mamba.fast.scan_kernels import triton

# Backward programs to keep busy, about four warps for each of the 528 schedulers of an H100. With more blocks of rows,
# a program goes through several and adds up their dB and dC: each part of these costs memory and time.
PROGRAMS = 2048
STATES_UNROLL = 32  # chunks whose states are loaded at once
SUM_ROWS, SUM_TILE = 32, 4096  # of the launch that adds up dB and dC: parts at once, numbers of a program at once
TABLE = (  # longest L, and sizes (K, LANES, R), explained in `scan_kernels`, of the forward kernels and of
    # `_scan_backward`, as measured on an H100; the chunk, K * LANES, is common. Few rows: each is kernels to compile at
    # the first start, `_scan_backward` in 2 s with a K of 3 or 4, in 20 s with 16: too much for what short lengths gain
    (96, (6, 16, 2), (3, 32, 1)),  # 81 tokens: the innermost level at 288x288
    (2048, (16, 2, 1), (4, 8, 1)),  # short chunks: more programs
    (math.inf, (16, 4, 1), (16, 4, 1)),
)


def selective_scan_triton(u: Tensor, *others: Tensor | bool | None) -> Tensor:
    """Run the scan above; arguments and gradients are those of `model.selective_scan.selective_scan` without `backend`.

    Tensors are fp32, bf16 or fp16, of any strides (fastest with t contiguous and L a multiple of 8); state and sums are
    fp32. Raises Unsupported where Triton cannot run, ValueError where d * L reaches 2^31.
    """
    require(u)
    return _SelectiveScan.apply(u, *others)


def _vector(L: int, K: int, tensors: tuple[Tensor, ...]) -> int:
    """Steps that one load instruction (16 bytes) may fetch: they must be contiguous and aligned in all tensors."""
    sizes = [L, K, *(16 // x.element_size() for x in tensors)]
    for x in tensors:
        sizes += [x.stride(i) for i in (0, 1) if x.shape[i] > 1]
        if x.stride(2) != 1 or x.data_ptr() % 16:
            return 1
    return math.gcd(*sizes)


def _launch(kernel, tile: tuple[int, int, int], shape, pointers, strided, *sizes, groups=1, **flags):
    """Launch over (chunks, blocks of rows, b); the kernel takes the strides of the tensors `strided`, in that order."""
    b, d, n, L = shape
    K, lanes, R = tile
    rows = R * 32 // lanes * groups
    if max(d * L, *((x.shape[1] - 1) * x.stride(1) + (L - 1) * x.stride(2) for x in strided)) >= 2**31:
        raise ValueError(f"backend='triton' addresses 2^31 numbers of an image, too few for {shape} (b, d, n, L)")
    V = _vector(L, K, strided)
    strides = [s if V == 1 or i == 2 else s // V for x in strided for i, s in enumerate(x.stride())]
    kernel[-(-L // (K * lanes)), -(-d // rows), b](
        *pointers, *strides, d, n, L // V, *sizes, K=K, LANES=lanes, R=R, V=V,
        MASK=L % (K * lanes) > 0 or d % rows > 0, num_warps=1, num_stages=1, **flags,
    )  # fmt: skip


def _states(tile, shape, strided, A: Tensor, bias: Tensor, ends: Tensor, delta_sums: Tensor, REVERSE: bool, **flags):
    """Writes the state at each chunk's start (REVERSE: its gradient at the end) to ends (b, chunks, n or n + 2, d)."""
    (b, d, n, _), (_, chunks, table, _) = shape, ends.shape
    pointers = (*strided, A, bias, ends, delta_sums)
    _launch(scan_kernels._chunk_states, tile, shape, pointers, strided, table, REVERSE=REVERSE, **flags)
    sizes = {"UNROLL": STATES_UNROLL, "REVERSE": REVERSE, "num_warps": 1, "num_stages": 1}
    scan_kernels._propagate_chunk_states[-(-n * d // 32), b](ends, delta_sums, A, d, n, chunks, table, **sizes)


def _prepare(u: Tensor, A: Tensor, D: Tensor | None, bias: Tensor | None):
    """The shape (b, d, n, L), tiles, number of chunks, A in fp32, D and bias (A for one that is None, and unused)."""
    shape = (u.shape[0], *A.shape, u.shape[2])
    tiles = next(tiles for longest, *tiles in TABLE if longest >= shape[3])
    A = A.float().contiguous()
    vectors = (A if v is None else v.contiguous() for v in (D, bias))
    return shape, tiles, -(-shape[3] // (tiles[0][0] * tiles[0][1])), A, *vectors


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        shape, (tile, _), chunks, A32, skip, shift = _prepare(u, A, D, bias)
        b, d, n, L = shape
        kept = b if chunks > 1 else 0
        y = torch.empty((b, d, L), dtype=u.dtype, device=u.device)
        starts = torch.empty((kept, chunks, n, d), dtype=torch.float32, device=u.device)
        delta_sums = torch.empty((kept, chunks, d), dtype=torch.float32, device=u.device)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, starts, delta_sums)
        ctx.flags = {"BIAS": bias is not None, "SOFTPLUS": softplus}
        gate = u if z is None else z
        with on_device(u):
            if kept:
                _states(tile, shape, (u, B, delta, u), A32, shift, starts, delta_sums, False, GATE=False,
                        **ctx.flags)  # fmt: skip
            pointers = (u, delta, A32, B, C, skip, gate, shift, y, starts)
            _launch(scan_kernels._scan, tile, shape, pointers, (u, delta, B, C, gate),
                    GATE=z is not None, SKIP=D is not None, STARTS=kept > 0, **ctx.flags)  # fmt: skip
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        u, delta, A, B, C, D, z, bias, starts, delta_sums = ctx.saved_tensors
        shape, (tile, tile_back), chunks, A32, skip, shift = _prepare(u, A, D, bias)
        b, d, n, L = shape
        blocks = -(-d // (tile_back[2] * 32 // tile_back[1]))
        groups = min(blocks, max(1, b * chunks * blocks // PROGRAMS))
        splits = -(-blocks // groups)
        flags = ctx.flags | {"GATE": z is not None}
        gate = u if z is None else z
        du, ddelta = (torch.empty((b, d, L), dtype=x.dtype, device=u.device) for x in (u, delta))
        dz = torch.empty((b, d, L) if z is not None else (0,), dtype=gate.dtype, device=u.device)
        dBC = torch.empty((2, b, n, L), dtype=B.dtype if B.dtype == C.dtype else torch.float32, device=u.device)
        sums = torch.empty((b, chunks, n + 2, d), dtype=torch.float32, device=u.device)  # of dA transposed, dD, dbias
        part = dBC
        if splits > 1 or (groups > 1 and dBC.dtype != torch.float32):
            part = torch.empty((splits, 2, b, n, L), dtype=torch.float32, device=u.device)
        with on_device(u):
            if chunks > 1:
                _states(tile, shape, (dy, C, delta, gate), A32, shift, sums, delta_sums, True, **flags)
            pointers = (dy, u, delta, A32, B, C, skip, gate, shift, starts, sums, du, ddelta, dz, part, dBC)
            _launch(scan_grads._scan_backward, tile_back, shape, pointers, (dy, u, delta, B, C, gate), groups,
                    groups=groups, SKIP=D is not None, STARTS=chunks > 1, SPLIT=splits > 1, **flags)  # fmt: skip
            if splits > 1:
                size, rows = dBC.numel(), min(SUM_ROWS, triton.next_power_of_2(splits))
                block, grid = SUM_TILE // rows, (-(-size // (SUM_TILE // rows)),)
                scan_grads._add_splits[grid](part, dBC, size, splits, ROWS=rows, BLOCK=block, num_warps=4)
            sums = sums.sum((0, 1))
        dA, (dB, dC) = sums[:n].T.to(A.dtype), dBC
        dD = None if D is None else sums[n].to(D.dtype)
        dbias = None if bias is None else sums[n + 1].to(bias.dtype)
        return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, None if z is None else dz, dbias, None
