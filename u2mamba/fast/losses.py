"""The losses of U²-Net's seven outputs in one pass: binary cross-entropies and, where asked for, soft IoU.

For K maps of logits z, one mask t and pixel weights w: BCE(z, t) = max(z, 0) - z t + log(1 + exp(-|z|)), the mean of
w BCE over all pixels of a map (`torch.nn.functional.binary_cross_entropy_with_logits`); its gradient is
w (p - t) / pixels, with p = sigmoid(z). Soft IoU of an image is q = i / u, i = 1 + sum of p t, u = 2 - i + sum of
(p + t); its gradient by p is (t - q (1 - t)) / u. A program takes one chunk of pixels of one image in all maps, so that
each number is read once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from u2mamba.fast.launch import constexpr, jit, on_device, tl, triton, triton_runs

BLOCK, WARPS = 512, 8  # pixels of a program: of 8 maps (seven and one masked) 16 numbers per thread
CHUNK = 1024  # partial sums of a map read at once by the last launch
IMAGES, IMAGE_CHUNK = 16, 64  # and of its images: so many images, so many sums of each


@jit("B", "K", "chunks")  # N is specialised: where it is a multiple of 16, the loads are vectors
def _losses(
    z, t, w, part, B, K, N, chunks, K_PAD: constexpr, BLOCK: constexpr, WEIGHTED: constexpr, IOU: constexpr
):  # fmt: skip
    """Sums over a chunk of an image: of the losses, with IOU also of p t and of p + t: part (1 or 3, K, B, chunks)."""
    chunk = tl.program_id(0)
    image = tl.program_id(1).to(tl.int64)
    pixel = chunk * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    ok = (k < K)[:, None] & (pixel < N)[None, :]
    target = tl.load(t + image * N + pixel, mask=pixel < N, other=0.0).to(tl.float32)[None, :]
    row = image + k * B
    v = tl.load(z + (row * N)[:, None] + pixel[None, :], mask=ok, other=0.0).to(tl.float32)

    e = tl.exp(-tl.abs(v))
    s = 1.0 + e  # log(1 + e) that keeps its digits for small e (Kahan): the rounding of 1 + e cancels
    log1p = tl.where(s == 1.0, e, tl.log(s) * (e / tl.where(s == 1.0, 1.0, s - 1.0)))
    loss = tl.where(v > 0.0, v, 0.0) - v * target + log1p
    if WEIGHTED:
        loss *= tl.load(w + image * N + pixel, mask=pixel < N, other=0.0)[None, :]
    at = part + row * chunks + chunk
    tl.store(at, tl.sum(tl.where(ok, loss, 0.0), 1), mask=k < K)
    if IOU:
        p = tl.where(ok, tl.where(v < 0.0, e, 1.0) / s, 0.0)
        plane = K.to(tl.int64) * B * chunks
        tl.store(at + plane, tl.sum(p * target, 1), mask=k < K)
        tl.store(at + 2 * plane, tl.sum(p + target, 1), mask=k < K)


@jit("B", "K", "chunks")
def _finish(
    part, losses, slopes, B, K, chunks, pixels, iou,
    CHUNK: constexpr, IMAGES: constexpr, IMAGE_CHUNK: constexpr, IOU: constexpr,
):  # fmt: skip
    """A program adds up a map's losses, with IOU also its 1 - q; slopes (K, B, 2): 1 / u and q / u of each image."""
    program = tl.program_id(0)
    total = tl.zeros((CHUNK,), tl.float32)
    n = B * chunks
    for start in range(0, n, CHUNK):
        at = start + tl.arange(0, CHUNK)
        total += tl.load(part + program * n + at, mask=at < n, other=0.0)
    loss = tl.sum(total, 0) / pixels
    if IOU:
        missed = tl.zeros((IMAGES,), tl.float32)
        for first in range(0, B, IMAGES):
            image = first + tl.arange(0, IMAGES)
            both = tl.zeros((IMAGES, IMAGE_CHUNK), tl.float32)
            each = tl.zeros((IMAGES, IMAGE_CHUNK), tl.float32)
            for start in range(0, chunks, IMAGE_CHUNK):
                chunk = start + tl.arange(0, IMAGE_CHUNK)
                ok = (image < B)[:, None] & (chunk < chunks)[None, :]
                at = part + K * n + program * n + image[:, None] * chunks + chunk[None, :]
                both += tl.load(at, mask=ok, other=0.0)
                each += tl.load(at + K * n, mask=ok, other=0.0)
            i = tl.sum(both, 1) + 1.0
            u = tl.sum(each, 1) - i + 2.0
            at = slopes + 2 * (program * B + image)
            tl.store(at, 1.0 / u, mask=image < B)
            tl.store(at + 1, i / u / u, mask=image < B)
            missed += tl.where(image < B, 1.0 - i / u, 0.0)
        loss += iou * tl.sum(missed, 0) / B
    tl.store(losses + program, loss)


@jit("B", "K")
def _losses_grad(
    z, t, w, slopes, dlosses, dz, B, K, N, pixels, iou,
    K_PAD: constexpr, BLOCK: constexpr, WEIGHTED: constexpr, IOU: constexpr,
):  # fmt: skip
    """dz of a chunk of an image in all maps, from the slopes that `_finish` has left."""
    image = tl.program_id(1).to(tl.int64)
    pixel = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    k = tl.arange(0, K_PAD)
    ok = (k < K)[:, None] & (pixel < N)[None, :]
    target = tl.load(t + image * N + pixel, mask=pixel < N, other=0.0).to(tl.float32)[None, :]
    dloss = tl.load(dlosses + k, mask=k < K, other=0.0)[:, None]
    at = ((image + k * B) * N)[:, None] + pixel[None, :]
    p = 1.0 / (1.0 + tl.exp(-tl.load(z + at, mask=ok, other=0.0).to(tl.float32)))
    grad = (p - target) / pixels
    if WEIGHTED:
        grad *= tl.load(w + image * N + pixel, mask=pixel < N, other=0.0)[None, :]
    if IOU:
        slope = slopes + 2 * (image + k * B)
        one_u = tl.load(slope, mask=k < K, other=0.0)[:, None]
        q_u = tl.load(slope + 1, mask=k < K, other=0.0)[:, None]
        grad -= (iou / B) * (target * one_u - (1.0 - target) * q_u) * p * (1.0 - p)
    tl.store(dz + at, dloss * grad, mask=ok)


def _launch(logits: Tensor, weights: Tensor | None, iou: float) -> tuple[tuple[int, int], int, dict[str, int | bool]]:
    """Grid (chunks, images), pixels of an image, what kernels are compiled for."""
    K, B = logits.shape[:2]
    N = logits[0, 0].numel()
    sizes = {"K_PAD": triton.next_power_of_2(K), "BLOCK": BLOCK, "num_warps": WARPS}
    return (triton.cdiv(N, BLOCK), B), N, sizes | {"WEIGHTED": weights is not None, "IOU": iou != 0}


@torch.library.custom_op("u2mamba::multi_loss", mutates_args=())
def _forward(logits: Tensor, target: Tensor, weights: Tensor | None, iou: float) -> tuple[Tensor, Tensor]:
    K, B = logits.shape[:2]
    grid, N, sizes = _launch(logits, weights, iou)
    number = {"dtype": torch.float32, "device": logits.device}
    part = torch.empty(3 if iou else 1, K, B, grid[0], **number)
    losses, slopes = torch.empty(K, **number), torch.empty(K, B if iou else 0, 2, **number)
    with on_device(logits):
        w = target if weights is None else weights
        _losses[grid](logits, target, w, part, B, K, N, grid[0], **sizes)
        tiles = {"CHUNK": CHUNK, "IMAGES": IMAGES, "IMAGE_CHUNK": IMAGE_CHUNK}
        _finish[(K,)](part, losses, slopes, B, K, grid[0], float(B * N), iou, IOU=iou != 0, **tiles)
    return losses, slopes


@_forward.register_fake
def _(logits, target, weights, iou):
    K, B = logits.shape[:2]
    number = {"dtype": torch.float32, "device": logits.device}
    return torch.empty(K, **number), torch.empty(K, B if iou else 0, 2, **number)


@torch.library.custom_op("u2mamba::multi_loss_backward", mutates_args=())
def _backward(
    logits: Tensor, target: Tensor, weights: Tensor | None, slopes: Tensor, dlosses: Tensor, iou: float
) -> Tensor:
    K, B = logits.shape[:2]
    grid, N, sizes = _launch(logits, weights, iou)
    dz = torch.empty_like(logits)
    w = target if weights is None else weights
    with on_device(logits):
        _losses_grad[grid](
            logits, target, w, slopes, dlosses.contiguous(), dz, B, K, N, float(B * N), iou, **sizes
        )  # fmt: skip
    return dz


@_backward.register_fake
def _(logits, target, weights, slopes, dlosses, iou):
    return torch.empty_like(logits)


def _remember(ctx, inputs, output) -> None:
    logits, target, weights, ctx.iou = inputs
    ctx.save_for_backward(logits, target, weights, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx, dlosses, _):
    logits, target, weights, slopes = ctx.saved_tensors
    return _backward(logits, target, weights, slopes, dlosses, ctx.iou), None, None, None


_forward.register_autograd(_differentiate, setup_context=_remember)


def multi_loss_reference(logits: Tensor, target: Tensor, weights: Tensor | None = None, iou: float = 0.0) -> Tensor:
    """The slow definition of `multi_loss`, for stacked logits."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    z, t = logits.to(wide), target.to(wide)
    bce = F.binary_cross_entropy_with_logits(z, t.expand_as(z), weights, reduction="none").mean((1, 2, 3, 4))
    p = torch.sigmoid(z)
    both, each = (p * t).sum((2, 3, 4)), (p + t).sum((2, 3, 4))
    return bce + iou * (1 - (both + 1) / (each - both + 1)).mean(1)


def multi_loss(
    logits: Tensor | list[Tensor] | tuple[Tensor, ...],
    target: Tensor,
    weights: Tensor | None = None,
    iou: float = 0.0,
) -> Tensor:
    """Mean BCE of each of K maps of logits against one mask, plus `iou` times the mean of 1 - soft IoU of its images.

    logits: K tensors (B, 1, H, W), or one (K, B, 1, H, W). target: (B, 1, H, W) in [0, 1], soft or hard. weights: of
    the pixels in the BCE, fp32 (B, 1, H, W); neither gets a gradient. Returns the losses (K) in fp32, differentiable
    with any weights. Raises ValueError where shapes differ.
    """
    if not isinstance(logits, Tensor):
        logits = torch.stack(list(logits))
    for name, other in (("masks", target), ("weights", weights)):
        if other is not None and logits.shape[1:] != other.shape:
            raise ValueError(f"the maps have shape {tuple(logits.shape[1:])}, the {name} {tuple(other.shape)}")
    target, weights = target.detach(), None if weights is None else weights.detach().contiguous()
    if not triton_runs(logits):
        return multi_loss_reference(logits, target, weights, iou)
    if target.dtype == torch.bool:
        target = target.to(torch.uint8)
    return _forward(logits.contiguous(), target.contiguous(), weights, float(iou))[0]
