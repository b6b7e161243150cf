"""The seven binary cross-entropies of U²-Net's deep supervision in one pass.

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
def _losses(z, t, part, B, K, N, chunks, K_PAD: constexpr, BLOCK: constexpr):
    """Sums of the losses over a chunk of an image: part (K, B, chunks)."""
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


@jit("B", "K", "chunks")
def _finish(part, losses, B, K, chunks, pixels, CHUNK: constexpr):
    """A program adds up a map's losses."""
    program = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.float32)
    n = B * chunks
    for start in range(0, n, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += tl.load(part + program * n + at, mask=at < n, other=0.0)
    tl.store(losses + program, tl.sum(total, 0) / pixels)


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


@torch.library.custom_op("u2mamba::multi_bce", mutates_args=())
def _forward(logits: Tensor, target: Tensor) -> Tensor:
    K, B = logits.shape[:2]
    grid, N, sizes = _launch(logits)
    part = torch.empty(K, B, grid[0], dtype=torch.float32, device=logits.device)
    losses = torch.empty(K, dtype=torch.float32, device=logits.device)
    with on_device(logits):
        _losses[grid](logits, target, part, B, K, N, grid[0], **sizes)
        _finish[(K,)](part, losses, B, K, grid[0], float(B * N), CHUNK=CHUNK)
    return losses


@_forward.register_fake
def _(logits, target):
    return torch.empty(len(logits), dtype=torch.float32, device=logits.device)


@torch.library.custom_op("u2mamba::multi_bce_backward", mutates_args=())
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
    lambda ctx, dlosses: (_backward(*ctx.saved_tensors, dlosses), None),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def multi_bce_reference(logits: Tensor, target: Tensor) -> Tensor:
    """The slow definition of `multi_bce`, for stacked logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    return torch.stack([F.binary_cross_entropy_with_logits(z.to(wide), target.to(wide)) for z in logits])


def multi_bce(logits: Tensor | list[Tensor] | tuple[Tensor, ...], target: Tensor) -> Tensor:
    """Mean BCE of each of K maps of logits against one mask.

    logits: K tensors (B, 1, H, W), or one (K, B, 1, H, W). target: (B, 1, H, W) in [0, 1], soft or hard; it gets no
    gradient. Returns the losses (K) in fp32, differentiable with any weights. Raises ValueError where shapes differ.
    """
    if not isinstance(logits, Tensor):
        logits = torch.stack(list(logits))
    if logits.shape[1:] != target.shape:
        raise ValueError(f"the maps have shape {tuple(logits.shape[1:])}, the masks {tuple(target.shape)}")
    if not triton_runs(logits):
        return multi_bce_reference(logits, target)
    if target.dtype == torch.bool:
        target = target.to(torch.uint8)
    return _forward(logits.contiguous(), target.contiguous())
