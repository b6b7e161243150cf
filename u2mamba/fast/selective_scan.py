"""The selective scan of Mamba on the GPU, forward and backward; model/selective_scan.py defines it.

    h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t        y_t = C_t · h_t + D u_t,  times SiLU(z_t) where a gate z is given

The length is cut into chunks. `_chunk_states` computes what each chunk makes of a zero start,
`_propagate_chunk_states` runs over the chunks and leaves the state at the start of each; then `_scan` does all chunks
at once. Backward does the same from the end with the gradient of the state, and `_scan_backward` walks each chunk both
ways. A single chunk needs neither of the first two. States within a chunk are recomputed in the backward pass; kept
are those at the chunks' starts: n / chunk fp32 numbers per element, 6 % of u, delta, z and y in bf16 at n = 16 and a
chunk of 128.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from u2mamba.fast import scan_grads, scan_kernels
from u2mamba.fast.launch import on_device, require
from u2mamba.fast.scan_kernels import triton


class Tiles(NamedTuple):
    """Sizes for one call: (K, LANES, R) of each kernel, explained in `scan_kernels`; the chunk, K * LANES, is common.

    `groups`: blocks of rows that one backward program goes through, adding up dB and dC on its way; None: as many as
    leave PROGRAMS programs. Each of the ceil(d / (groups * R * 32 / LANES)) parts of dB and dC costs memory and time.
    """

    states: tuple[int, int, int]
    scan: tuple[int, int, int]
    backward: tuple[int, int, int]
    groups: int | None = None


PROGRAMS = 2048  # about four warps for each of the 528 schedulers of an H100
STATES_UNROLL = 32  # chunks whose states are on their way at once
SUM_ROWS, SUM_TILE = 32, 4096  # of the launch that adds up dB and dC: parts at once, numbers of a program at once
TABLE = (  # longest L -> tiles, as measured on an H100. Few rows: each is kernels to compile, at the first start, and
    # `_scan_backward` takes 2 s with a K of 3 or 4, 20 s with 16, for which the short lengths have too little to gain
    (96, Tiles((6, 16, 2), (6, 16, 2), (3, 32, 1))),  # 81 tokens: the innermost level at 288x288
    (2048, Tiles((16, 2, 1), (16, 2, 1), (4, 8, 1))),  # short chunks: more programs
    (math.inf, Tiles(*[(16, 4, 1)] * 3)),
)


def tiles_for(L: int) -> Tiles:
    """The sizes used for a length of L."""
    return next(tiles for longest, tiles in TABLE if longest >= L)


def selective_scan_triton(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """Run the scan above; arguments and gradients are those of `model.selective_scan.selective_scan`.

    u, delta, z: (b, d, L); A: (d, n), negative; B, C: (b, n, L); D, delta_bias: (d); fp32, bf16 or fp16, of any strides
    (fastest with t contiguous and L a multiple of 8). Returns (b, d, L) in u's dtype; state and sums are fp32.
    Raises launch.Unsupported without Triton, for another dtype, or for tensors that are not on a CUDA device;
    ValueError where d * L reaches 2^31.
    """
    require(u)
    return _SelectiveScan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def _vector(L: int, K: int, tensors: tuple[Tensor, ...]) -> int:
    """Steps that one load instruction (16 bytes) may bring: they must lie side by side, and aligned, in all tensors."""
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
        raise ValueError(
            f"backend='triton' addresses 2^31 numbers of one image, which is less than {shape} (b, d, n, L)"
        )
    V = _vector(L, K, strided)
    strides = [s if V == 1 or i == 2 else s // V for x in strided for i, s in enumerate(x.stride())]
    kernel[-(-L // (K * lanes)), -(-d // rows), b](
        *pointers, *strides, d, n, L // V, *sizes, K=K, LANES=lanes, R=R, V=V,
        MASK=L % (K * lanes) > 0 or d % rows > 0, num_warps=1, num_stages=1, **flags,
    )  # fmt: skip


def _propagate_chunk_states(ends: Tensor, delta_sums: Tensor, A: Tensor, reverse: bool) -> None:
    (b, chunks, table, d), n = ends.shape, A.shape[1]
    sizes = {"UNROLL": STATES_UNROLL, "REVERSE": reverse, "num_warps": 1, "num_stages": 1}
    scan_kernels._propagate_chunk_states[-(-n * d // 32), b](ends, delta_sums, A, d, n, chunks, table, **sizes)


def _chunks(u: Tensor, A: Tensor, tiles: Tiles | None = None) -> tuple[Tiles, int]:
    tiles = tiles or tiles_for(u.shape[2])
    return tiles, -(-u.shape[2] // (tiles.scan[0] * tiles.scan[1]))


def _vectors(A: Tensor, D: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """A in fp32, D and the bias; A takes the place of what is missing (a flag tells the kernel)."""
    A = A.float().contiguous()
    return A, A if D is None else D.contiguous(), A if bias is None else bias.contiguous()


def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None, bias: Tensor | None,
    softplus: bool, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, and for `backward` h at the start of each chunk (b, chunks, n, d) and the chunks' sums of Δ (b, chunks, d)."""
    shape = (b, d, n, L) = (u.shape[0], *A.shape, u.shape[2])
    tiles, chunks = _chunks(u, A, tiles)
    kept = b if chunks > 1 else 0
    y = torch.empty((b, d, L), dtype=u.dtype, device=u.device)
    starts = torch.empty((kept, chunks, n, d), dtype=torch.float32, device=u.device)
    delta_sums = torch.empty((kept, chunks, d), dtype=torch.float32, device=u.device)
    flags = {"BIAS": bias is not None, "SOFTPLUS": softplus}
    skip, gated, gate = D is not None, z is not None, u if z is None else z
    A, D, bias = _vectors(A, D, bias)
    with on_device(u):
        if kept:
            strided = (u, B, delta, u)
            pointers = (*strided, A, bias, starts, delta_sums)
            _launch(
                scan_kernels._chunk_states,
                tiles.states,
                shape,
                pointers,
                strided,
                n,
                GATE=False,
                REVERSE=False,
                **flags,
            )
            _propagate_chunk_states(starts, delta_sums, A, False)
        pointers = (u, delta, A, B, C, D, gate, bias, y, starts)
        _launch(
            scan_kernels._scan, tiles.scan, shape, pointers, (u, delta, B, C, gate),
            GATE=gated, SKIP=skip, STARTS=kept > 0, **flags,
        )  # fmt: skip
    return y, starts, delta_sums


def backward(
    dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    bias: Tensor | None, starts: Tensor, delta_sums: Tensor, softplus: bool, tiles: Tiles | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """du, ddelta, dz (empty without z), dB and dC (2, b, n, L), and (n + 2, d) fp32: dA transposed, dD, dbias."""
    shape = (b, d, n, L) = (u.shape[0], *A.shape, u.shape[2])
    tiles, chunks = _chunks(u, A, tiles)
    blocks = -(-d // (tiles.backward[2] * 32 // tiles.backward[1]))
    groups = min(blocks, tiles.groups or max(1, b * chunks * blocks // PROGRAMS))
    splits = -(-blocks // groups)
    flags = {"BIAS": bias is not None, "SOFTPLUS": softplus, "GATE": z is not None}
    skip, gate = D is not None, u if z is None else z
    A, D, bias = _vectors(A, D, bias)
    du, ddelta = (torch.empty((b, d, L), dtype=x.dtype, device=u.device) for x in (u, delta))
    dz = torch.empty((b, d, L) if z is not None else (0,), dtype=gate.dtype, device=u.device)
    dBC = torch.empty((2, b, n, L), dtype=B.dtype if B.dtype == C.dtype else torch.float32, device=u.device)
    sums = torch.empty((b, chunks, n + 2, d), dtype=torch.float32, device=u.device)
    part = dBC
    if splits > 1 or (groups > 1 and dBC.dtype != torch.float32):
        part = torch.empty((splits, 2, b, n, L), dtype=torch.float32, device=u.device)
    with on_device(u):
        if chunks > 1:
            strided = (dy, C, delta, gate)
            pointers = (*strided, A, bias, sums, delta_sums)
            _launch(scan_kernels._chunk_states, tiles.states, shape, pointers, strided, n + 2, REVERSE=True, **flags)
            _propagate_chunk_states(sums, delta_sums, A, True)
        pointers = (dy, u, delta, A, B, C, D, gate, bias, starts, sums, du, ddelta, dz, part, dBC)
        _launch(
            scan_grads._scan_backward, tiles.backward, shape, pointers, (dy, u, delta, B, C, gate), groups,
            groups=groups, SKIP=skip, STARTS=chunks > 1, SPLIT=splits > 1, **flags,
        )  # fmt: skip
        if splits > 1:
            size, rows = dBC.numel(), min(SUM_ROWS, triton.next_power_of_2(splits))
            block = SUM_TILE // rows
            scan_grads._add_splits[(-(-size // block),)](part, dBC, size, splits, ROWS=rows, BLOCK=block, num_warps=4)
        sums = sums.sum((0, 1))
    return du, ddelta, dz, dBC, sums


class _SelectiveScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u, delta, A, B, C, D, z, bias, softplus):
        y, starts, delta_sums = forward(u, delta, A, B, C, D, z, bias, softplus)
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, starts, delta_sums)
        ctx.softplus = softplus
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        _, _, A, B, C, D, z, bias, *_ = ctx.saved_tensors
        du, ddelta, dz, dBC, sums = backward(dy, *ctx.saved_tensors, ctx.softplus)
        n = A.shape[1]
        dA, (dB, dC) = sums[:n].T.to(A.dtype), dBC
        dD = None if D is None else sums[n].to(D.dtype)
        dbias = None if bias is None else sums[n + 1].to(bias.dtype)
        return du, ddelta, dA, dB.to(B.dtype), dC.to(C.dtype), dD, None if z is None else dz, dbias, None
