"""The seven binary cross-entropies of U²-Net's deep supervision and the counts behind the IoU, in one pass.

For K maps of logits z and one mask t: BCE(z, t) = max(z, 0) - z t + log(1 + exp(-|z|)), the mean over all pixels of a
map (`torch.nn.functional.binary_cross_entropy_with_logits`); its gradient is (sigmoid(z) - t) / pixels. A program takes
one chunk of pixels of one image in all maps, so that each number is read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from model.kernels.launch import constexpr, jit, on_device, tl, triton, triton_runs

BLOCK, WARPS = 512, 8  # pixels of a program: of 8 maps (the seventh and one masked) 16 numbers per thread
CHUNK = 1024  # partial sums read at once by the last launch


@jit("B", "K", "chunks")  # N is specialised: where it is a multiple of 16, the loads are vectors
def _losses(z, t, part, part_counts, B, K, N, chunks, K_PAD: constexpr, BLOCK: constexpr):
    """Sums over a chunk of an image: part (K, B, chunks) of the losses, part_counts (B, 3, chunks) of d0's pixels."""
    chunk = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    ok = (k < K)[:, None] & (pixel < N)[None, :]
    target = tl.load(t + image * N + pixel, mask=pixel < N, other=0.0).to(tl.float32)[None, :]
    row = image + k * B
    v = tl.load(z + (row * N)[:, None] + pixel[None, :], mask=ok, other=0.0).to(tl.float32)

    e = tl.exp(-tl.abs(v))
    u = 1.0 + e  # log(1 + e) that keeps its digits for small e (Kahan): the rounding of 1 + e cancels
    log1p = tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))
    loss = tl.where(v > 0.0, v, 0.0) - v * target + log1p
    tl.store(part + row * chunks + chunk, tl.sum(tl.where(ok, loss, 0.0), 1), mask=k < K)

    first = ok & (k == 0)[:, None]
    found = v > 0.0
    truth = target > 0.5
    at = part_counts + image * 3 * chunks + chunk
    tl.store(at, tl.sum((first & found & truth).to(tl.int32)))
    tl.store(at + chunks, tl.sum((first & found & (target <= 0.5)).to(tl.int32)))
    tl.store(at + 2 * chunks, tl.sum((first & (v <= 0.0) & truth).to(tl.int32)))


@jit("B", "K", "chunks")
def _finish(part, part_counts, losses, counts, B, K, chunks, pixels, CHUNK: constexpr):
    """Programs 0..K-1 add up a map's losses, the 3 B others a count."""
    program = tl.program_id(0)
    if program < K:
        total = tl.zeros((CHUNK,), tl.float32)
        n = B * chunks
        for start in range(0, n, CHUNK):
            at = start + tl.arange(0, CHUNK)
            total += tl.load(part + program * n + at, mask=at < n, other=0.0)
        tl.store(losses + program, tl.sum(total, 0) / pixels)
    else:
        count = tl.zeros((CHUNK,), tl.int32)
        for start in range(0, chunks, CHUNK):
            at = start + tl.arange(0, CHUNK)
            count += tl.load(part_counts + (program - K) * chunks + at, mask=at < chunks, other=0)
        tl.store(counts + program - K, tl.sum(count, 0))


@jit("B", "K")
def _losses_grad(z, t, dlosses, dz, B, K, N, pixels, K_PAD: constexpr, BLOCK: constexpr):
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    ok = (k < K)[:, None] & (pixel < N)[None, :]
    target = tl.load(t + image * N + pixel, mask=pixel < N, other=0.0).to(tl.float32)[None, :]
    factor = (tl.load(dlosses + k, mask=k < K, other=0.0) / pixels)[:, None]
    at = ((image + k * B) * N)[:, None] + pixel[None, :]
    v = tl.load(z + at, mask=ok, other=0.0).to(tl.float32)
    tl.store(dz + at, factor * (1.0 / (1.0 + tl.exp(-v)) - target), mask=ok)


def _launch(logits: Tensor) -> tuple[tuple[int, int], int, dict[str, int]]:
    """Grid (chunks, images), pixels of an image, tile sizes."""
    K, B = logits.shape[:2]
    N = logits[0, 0].numel()
    return (triton.cdiv(N, BLOCK), B), N, {"K_PAD": triton.next_power_of_2(K), "BLOCK": BLOCK, "num_warps": WARPS}


@torch.library.custom_op("u2mamba::multi_bce_with_logits", mutates_args=())
def _forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    K, B = logits.shape[:2]
    grid, N, sizes = _launch(logits)
    part = torch.empty(K, B, grid[0], dtype=torch.float32, device=logits.device)
    part_counts = torch.empty(B, 3, grid[0], dtype=torch.int32, device=logits.device)
    losses = torch.empty(K, dtype=torch.float32, device=logits.device)
    counts = torch.empty(B, 3, dtype=torch.int32, device=logits.device)
    with on_device(logits):
        _losses[grid](logits, target, part, part_counts, B, K, N, grid[0], **sizes)
        _finish[(K + 3 * B,)](part, part_counts, losses, counts, B, K, grid[0], float(B * N), CHUNK=CHUNK)
    return losses, counts


@_forward.register_fake
def _(logits, target):
    K, B = logits.shape[:2]
    device = logits.device
    return torch.empty(K, dtype=torch.float32, device=device), torch.empty(B, 3, dtype=torch.int32, device=device)


@torch.library.custom_op("u2mamba::multi_bce_with_logits_backward", mutates_args=())
def _backward(logits: Tensor, target: Tensor, dlosses: Tensor) -> Tensor:
    K, B = logits.shape[:2]
    grid, N, sizes = _launch(logits)
    dz = torch.empty_like(logits)
    with on_device(logits):
        _losses_grad[grid](logits, target, dlosses.contiguous(), dz, B, K, N, float(B * N), **sizes)
    return dz


@_backward.register_fake
def _(logits, target, dlosses):
    return torch.empty_like(logits)


_forward.register_autograd(
    lambda ctx, dlosses, dcounts: (_backward(*ctx.saved_tensors, dlosses), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def multi_bce_with_logits_reference(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The slow definition of `multi_bce_with_logits`, for stacked logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    mask = target.to(wide)
    losses = torch.stack([F.binary_cross_entropy_with_logits(z.to(wide), mask) for z in logits])
    found, truth = (logits[0] > 0).flatten(1), (mask > 0.5).flatten(1)
    counts = torch.stack([found & truth, found & ~truth, ~found & truth], dim=1).sum(2, dtype=torch.int32)
    return losses, counts


def multi_bce_with_logits(logits: Tensor | list[Tensor] | tuple[Tensor, ...], target: Tensor) -> tuple[Tensor, Tensor]:
    """Mean BCE of each of K maps of logits against one mask, and the counts for d0's IoU.

    logits: K tensors (B, 1, H, W), d0 first, or one (K, B, 1, H, W). target: (B, 1, H, W) in [0, 1], soft or hard; it
    gets no gradient. Returns losses (K) in fp32, differentiable with any weights, and counts (B, 3) in int32: true
    positives, false positives and false negatives of d0 > 0.5 (logit > 0) against target > 0.5, so that
    IoU = tp / (tp + fp + fn). Raises ValueError where the shapes differ.
    """
    if not isinstance(logits, Tensor):
        logits = torch.stack(list(logits))
    if logits.shape[1:] != target.shape:
        raise ValueError(f"the maps have shape {tuple(logits.shape[1:])}, the masks {tuple(target.shape)}")
    if not triton_runs(logits):
        return multi_bce_with_logits_reference(logits, target)
    if target.dtype == torch.bool:
        target = target.to(torch.uint8)
    return _forward(logits.contiguous(), target.contiguous())


def multi_bce(logits: tuple[Tensor, ...], target: Tensor) -> Tensor:
    """The losses (K) of `multi_bce_with_logits` alone."""
    return multi_bce_with_logits(logits, target)[0]
