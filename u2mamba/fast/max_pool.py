"""2x2 max pooling (Triton, channels_last), as PyTorch's `max_pool2d(2, 2, ceil_mode=True)`.

The kernel works on tiles of windows and writes each output once: gradients need no atomic adds and are deterministic.
"""

import torch

from u2mamba.fast.launch import as_channels_last_rows, constexpr, jit, on_device, require, tl
from u2mamba.fast.upsample import tile_of_program, tiles


@jit()
def _load_windows(x, pixel, cols, W, S, ok00, ok01, ok10, ok11, other):
    """The four pixels of each window from an image whose pixels are S apart."""
    at = x + pixel * S + cols
    v00 = tl.load(at, mask=ok00, other=other).to(tl.float32)
    v01 = tl.load(at + S, mask=ok01, other=other).to(tl.float32)
    v10 = tl.load(at + W * S, mask=ok10, other=other).to(tl.float32)
    v11 = tl.load(at + W * S + S, mask=ok11, other=other).to(tl.float32)
    return v00, v01, v10, v11


@jit()
def _later(best, which, value, k: constexpr):
    """Updates the running maximum and its position with one value; as in PyTorch, the first of equals, the last NaN."""
    wins = (value > best) | (value != value)
    return tl.where(wins, value, best), tl.where(wins, k, which)


@jit("H", "W", "blocks")
def _max_pool(
    x, y, places, dy, dskip, dx, H, W, C, S, blocks,
    TH: constexpr, TW: constexpr, BLOCK_C: constexpr, BACKWARD: constexpr, SKIP: constexpr,
):  # fmt: skip
    """Forward writes y and the place of each maximum in its window; BACKWARD reads the places and writes dx, to which
    SKIP adds dskip, whose pixels are S apart."""
    Hp = (H + 1) // 2
    Wp = (W + 1) // 2
    image, h, w, inside, cols = tile_of_program(tl.program_id(0), blocks, Hp, Wp, TH, TW, BLOCK_C)
    cols = cols[None, :]
    ok00 = inside[:, None] & (cols < C)
    ok01 = ok00 & (2 * w + 1 < W)[:, None]
    ok10 = ok00 & (2 * h + 1 < H)[:, None]
    pixel = (2 * h * W + 2 * w)[:, None]
    place = (h * Wp + w)[:, None]
    before = image * H * W  # pixels of the images before, in 64 bits; within an image 32 bits suffice
    pooled = image * Hp * Wp * C + place * C + cols
    ok11 = ok01 & ok10
    if BACKWARD:
        which = tl.load(places + pooled, mask=ok00, other=0)
        g = tl.load(dy + pooled, mask=ok00, other=0.0).to(tl.float32)
        g00 = tl.where(which == 0, g, 0.0)
        g01 = tl.where(which == 1, g, 0.0)
        g10 = tl.where(which == 2, g, 0.0)
        g11 = tl.where(which == 3, g, 0.0)
        if SKIP:
            s00, s01, s10, s11 = _load_windows(dskip + before * S, pixel, cols, W, S, ok00, ok01, ok10, ok11, 0.0)
            g00 += s00
            g01 += s01
            g10 += s10
            g11 += s11
        at = dx + before * C + pixel * C + cols
        tl.store(at, g00, mask=ok00)
        tl.store(at + C, g01, mask=ok01)
        tl.store(at + W * C, g10, mask=ok10)
        tl.store(at + W * C + C, g11, mask=ok11)
    else:
        v00, v01, v10, v11 = _load_windows(x + before * C, pixel, cols, W, C, ok00, ok01, ok10, ok11, float("-inf"))
        best, which = _later(v00, tl.zeros_like(v00).to(tl.int32), v01, 1)
        best, which = _later(best, which, v10, 2)
        best, which = _later(best, which, v11, 3)
        tl.store(y + pooled, best, mask=ok00)
        tl.store(places + pooled, which.to(tl.uint8), mask=ok00)


class MaxPool(torch.autograd.Function):
    """apply(x): `F.max_pool2d(x, 2, 2, ceil_mode=True)`, and x, for the skip connection: one kernel adds the gradients.

    x: (B, C, H, W), channels_last. Raises Unsupported.
    """

    @staticmethod
    def forward(ctx, x):
        require(x, channels_last=True)
        ctx.set_materialize_grads(False)
        n, c, h, w = x.shape
        shape = (n, c, -(-h // 2), -(-w // 2))
        y = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        places = torch.empty_like(y, dtype=torch.uint8)  # kept for backward in place of x, which is 8 times as large
        ctx.save_for_backward(places)
        ctx.shape = x.shape
        grid, blocks, sizes = tiles(x, c, *y.shape[2:])
        with on_device(x):
            _max_pool[grid](x, y, places, x, x, x, h, w, c, c, blocks, BACKWARD=False, SKIP=False, **sizes)
        return y, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy, dskip):
        if dy is None:
            return dskip
        (places,) = ctx.saved_tensors
        dx = torch.empty(ctx.shape, dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        dy = dy.contiguous(memory_format=torch.channels_last)
        other, stride = as_channels_last_rows(dx if dskip is None else dskip)
        _, c, h, w = ctx.shape
        grid, blocks, sizes = tiles(dx, c, *dy.shape[2:])
        with on_device(dx):
            _max_pool[grid](
                dx, dx, places, dy, other, dx, h, w, c, stride, blocks, BACKWARD=True, SKIP=dskip is not None, **sizes
            )
        return dx
