"""The 3x3 convolution to the one channel of a side output, channels_last.

One output channel leaves most of a matrix unit idle, and cuDNN takes four times as long as reading the input. Here the
input is read once and a gradient is written once.

y(p) = bias + sum over the taps k and the channels c of x(p + o_k, c) w(k, c), with the nine offsets o_k around p; hence
dx(p, c) = sum over k of dy(p - o_k) w(k, c), and dw(k, c) = sum over p of x(p, c) dy(p - o_k). With the nine neighbors
of each dy in a row, N (pixels, 9), both are matrix products: dx = N w, dw = N^T x.
"""

import torch

from u2mamba.fast.launch import constexpr, jit, on_device, require, sm_count, tl, triton

MAX_C = 128  # channels: above, maps are small and cuDNN is fast
PIXELS, PIXELS_BACK, WARPS = 32, 64, 4  # of a program's tile, forward and backward; more spill registers
PROGRAMS = 8  # of backward, per multiprocessor: each writes one (16, C) part of the weight's gradient


@jit("H", "W", "M")
def _side_output(x, w, bias, y, H, W, M, C, stride_c, stride_h, stride_w, PIXELS: constexpr, BLOCK_C: constexpr):
    """y at PIXELS of the M = B H W pixels, one tap after the other: most of x comes from the caches."""
    pixel = tl.program_id(0) * PIXELS + tl.arange(0, PIXELS)
    row = pixel // W % H
    column = pixel % W
    cols = tl.arange(0, BLOCK_C)
    total = tl.zeros((PIXELS, BLOCK_C), tl.float32)
    for tap in tl.static_range(9):
        h = row + (tap // 3 - 1)
        v = column + (tap % 3 - 1)
        ok = (pixel < M) & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        at = (pixel + ((tap // 3 - 1) * W + tap % 3 - 1)).to(tl.int64)[:, None] * C + cols[None, :]
        weight = tl.load(w + cols * stride_c + (tap // 3) * stride_h + (tap % 3) * stride_w, mask=cols < C, other=0.0)
        value = tl.load(x + at, mask=ok[:, None] & (cols < C)[None, :], other=0.0).to(tl.float32)
        total += value * weight.to(tl.float32)[None, :]
    tl.store(y + pixel, tl.sum(total, 1) + tl.load(bias).to(tl.float32), mask=pixel < M)


@jit("H", "W", "M", "tiles", "programs")
def _side_output_grad(
    x, w, dy, dx, part, part_bias, H, W, M, C, stride_c, stride_h, stride_w, tiles, programs,
    PIXELS: constexpr, BLOCK_C: constexpr, WIDE: constexpr,
):  # fmt: skip
    """dx at every `programs`-th tile of PIXELS, and this program's share of the gradients of weight and bias."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_C)
    tap = tl.arange(0, 16)  # nine, and the rest of a matrix unit's row
    weight_at = w + (tap // 3 * stride_h + tap % 3 * stride_w)[:, None] + (cols * stride_c)[None, :]
    weight = tl.load(weight_at, mask=(tap < 9)[:, None] & (cols < C)[None, :], other=0.0)
    if WIDE:  # Triton's interpreter multiplies no bf16 matrices
        weight = weight.to(tl.float32)
    share = tl.zeros((16, BLOCK_C), tl.float32)
    share_bias = tl.zeros((PIXELS,), tl.float32)
    for tile in range(program, tiles, programs):
        pixel = tl.arange(0, PIXELS) + tile * PIXELS
        inside = (pixel < M)[:, None] & (cols < C)[None, :]
        h = (pixel // W % H)[:, None] - (tap // 3 - 1)[None, :]
        v = (pixel % W)[:, None] - (tap % 3 - 1)[None, :]
        ok = (pixel < M)[:, None] & (tap < 9)[None, :] & (h >= 0) & (h < H) & (v >= 0) & (v < W)
        nearby = pixel[:, None] - ((tap // 3 - 1) * W + tap % 3 - 1)[None, :]
        near = tl.load(dy + nearby, mask=ok, other=0.0)
        at = pixel.to(tl.int64)[:, None] * C + cols[None, :]
        value = tl.load(x + at, mask=inside, other=0.0)
        if WIDE:
            near = near.to(tl.float32)
            value = value.to(tl.float32)
        tl.store(dx + at, tl.dot(near, weight, input_precision="ieee"), mask=inside)
        share += tl.dot(tl.trans(near), value, input_precision="ieee")
        share_bias += tl.load(dy + pixel, mask=pixel < M, other=0.0).to(tl.float32)
    at = part + program * (16 * BLOCK_C) + tap[:, None] * BLOCK_C + cols[None, :]
    tl.store(at, share)
    tl.store(part_bias + program, tl.sum(share_bias, 0))


class SideOutput(torch.autograd.Function):
    """apply(x, weight, bias): `F.conv2d(..., padding=1)`, (B, C, H, W), (1, C, 3, 3), (1,) -> (B, 1, H, W).

    Sums in fp32. x: channels_last, of weight's dtype and at most MAX_C channels. Raises Unsupported.
    """

    @staticmethod
    def forward(ctx, x, weight, bias):
        fits = weight.shape == (1, x.shape[1], 3, 3) and weight.dtype == x.dtype
        require(x, channels_last=True, channels=x.shape[1] <= MAX_C, weight=fits)
        b, c, h, w = x.shape
        m = b * h * w
        y = torch.empty((b, 1, h, w), dtype=x.dtype, device=x.device)
        sizes = {"PIXELS": PIXELS, "BLOCK_C": max(16, triton.next_power_of_2(c)), "num_warps": WARPS}
        with on_device(x):
            _side_output[(triton.cdiv(m, PIXELS),)](x, weight, bias, y, h, w, m, c, *weight.stride()[1:], **sizes)
        ctx.save_for_backward(x, weight)
        ctx.sizes = sizes
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        b, c, h, w = x.shape
        m, tiles = b * h * w, triton.cdiv(b * h * w, PIXELS_BACK)
        dy = dy.to(x.dtype).contiguous()
        programs = min(tiles, PROGRAMS * sm_count(x.device))
        dx = torch.empty_like(x)
        part = torch.empty(programs, 16, ctx.sizes["BLOCK_C"], dtype=torch.float32, device=x.device)
        part_bias = torch.empty(programs, dtype=torch.float32, device=x.device)
        with on_device(x):
            _side_output_grad[(programs,)](
                x, weight, dy, dx, part, part_bias, h, w, m, c, *weight.stride()[1:], tiles, programs,
                WIDE=not x.is_cuda, **ctx.sizes | {"PIXELS": PIXELS_BACK},
            )  # fmt: skip
        dw = part.sum(0)[:9, :c].t().reshape(1, c, 3, 3)
        return dx, dw.to(weight.dtype), part_bias.sum(0, keepdim=True)
