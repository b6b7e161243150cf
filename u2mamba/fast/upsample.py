"""Bilinear upsampling into a concatenation (Triton, channels_last), and upsampling by matrix products.

Both follow PyTorch's `interpolate(mode="bilinear", align_corners=False)`. Each kernel gathers, in tiles of TH x TW
pixels by BLOCK_C channels: an output is written once, so gradients need no atomic adds and are deterministic.

Output pixel o of n_out reads from s = (o + 1/2) * n_in / n_out - 1/2, clamped to [0, n_in - 1]. The kernels keep the
integer 2 * n_out * s, so that forward and backward agree on every weight to the last bit.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from u2mamba.fast.launch import as_channels_last_rows, constexpr, jit, on_device, require, tl, triton

WARPS = 8
TILE_W = 8  # pixels of a tile along W: 8 divides 288, 144 and 72, and wastes least at 36, 18 and 9
MAX_BLOCK_C = 64  # channels of a tile; 64 bf16 numbers are one 128-byte line


@jit()
def tile_of_program(program, blocks, H, W, TH: constexpr, TW: constexpr, BLOCK_C: constexpr):
    """A program's tile of a (B, H, W, C) tensor: image, rows, columns, which pixels are inside, channels."""
    tile = program // blocks
    tiles_w = tl.cdiv(W, TW)
    tiles_h = tl.cdiv(H, TH)
    pixel = tl.arange(0, TH * TW)
    h = (tile // tiles_w) % tiles_h * TH + pixel // TW
    w = tile % tiles_w * TW + pixel % TW
    cols = program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    return (tile // (tiles_w * tiles_h)).to(tl.int64), h, w, (h < H) & (w < W), cols


@jit()
def _source(o, n_in, n_out):
    """2 * n_out times the place that output o reads from."""
    return tl.minimum(tl.maximum((2 * o + 1) * n_in - n_out, 0), 2 * n_out * (n_in - 1))


@jit("Hi", "Wi", "Ho", "Wo", "blocks")
def _upsample_cat(
    x, skip, out, Hi, Wi, Ho, Wo, Cx, Cs, blocks, TH: constexpr, TW: constexpr, BLOCK_C: constexpr
):  # fmt: skip
    """out: x upsampled, and behind its channels skip."""
    image, h, w, inside, cols = tile_of_program(tl.program_id(0), blocks, Ho, Wo, TH, TW, BLOCK_C)
    pixel = (h * Wo + w)[:, None]
    skip_ok = inside[:, None] & (cols < Cs)[None, :]
    copied = tl.load(skip + image * Ho * Wo * Cs + pixel * Cs + cols[None, :], mask=skip_ok, other=0.0)

    at_h = _source(h, Hi, Ho)
    at_w = _source(w, Wi, Wo)
    h0 = at_h // (2 * Ho)
    w0 = at_w // (2 * Wo)
    fh = ((at_h - h0 * 2 * Ho).to(tl.float32) / (2 * Ho))[:, None]
    fw = ((at_w - w0 * 2 * Wo).to(tl.float32) / (2 * Wo))[:, None]
    h1 = tl.minimum(h0 + 1, Hi - 1)
    w1 = tl.minimum(w0 + 1, Wi - 1)
    ok = inside[:, None] & (cols < Cx)[None, :]
    base = x + image * Hi * Wi * Cx
    v00 = tl.load(base + (h0 * Wi + w0)[:, None] * Cx + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    v01 = tl.load(base + (h0 * Wi + w1)[:, None] * Cx + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    v10 = tl.load(base + (h1 * Wi + w0)[:, None] * Cx + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    v11 = tl.load(base + (h1 * Wi + w1)[:, None] * Cx + cols[None, :], mask=ok, other=0.0).to(tl.float32)
    up = (v00 * (1.0 - fw) + v01 * fw) * (1.0 - fh) + (v10 * (1.0 - fw) + v11 * fw) * fh
    to = out + image * Ho * Wo * (Cx + Cs) + pixel * (Cx + Cs) + cols[None, :]
    tl.store(to, up, mask=ok)
    tl.store(to + Cx, copied, mask=skip_ok)


@jit("Hi", "Wi", "Ho", "Wo", "blocks")
def _upsample_grad(dy, dx, Hi, Wi, Ho, Wo, C, S, blocks, TH: constexpr, TW: constexpr, BLOCK_C: constexpr):
    """dx at each source pixel: the at most 4 x 4 outputs that read it, by their weights (n_in <= n_out <= 2 n_in)."""
    image, h, w, inside, cols = tile_of_program(tl.program_id(0), blocks, Hi, Wi, TH, TW, BLOCK_C)
    first_h = tl.maximum((2 * h - 1) * Ho + Hi, 0) // (2 * Hi)  # the first output whose place lies beyond h - 1
    first_w = tl.maximum((2 * w - 1) * Wo + Wi, 0) // (2 * Wi)
    base = dy + image * Ho * Wo * S
    acc = tl.zeros((TH * TW, BLOCK_C), tl.float32)
    for i in tl.static_range(4):
        oh = first_h + i
        wh = tl.maximum(2 * Ho - tl.abs(_source(oh, Hi, Ho) - 2 * Ho * h), 0).to(tl.float32) / (2 * Ho)
        for j in tl.static_range(4):
            ow = first_w + j
            ww = tl.maximum(2 * Wo - tl.abs(_source(ow, Wi, Wo) - 2 * Wo * w), 0).to(tl.float32) / (2 * Wo)
            ok = (inside & (oh < Ho) & (ow < Wo))[:, None] & (cols < C)[None, :]
            g = tl.load(base + (oh * Wo + ow)[:, None] * S + cols[None, :], mask=ok, other=0.0).to(tl.float32)
            acc += g * (wh * ww)[:, None]
    to = dx + image * Hi * Wi * C + (h * Wi + w)[:, None] * C + cols[None, :]
    tl.store(to, acc, mask=inside[:, None] & (cols < C)[None, :])


def tiles(x: Tensor, C: int, H: int, W: int) -> tuple[tuple[int], int, dict[str, int]]:
    """Grid, channel blocks and tile sizes that cover (B, C, H, W) in x's dtype, one 16-byte vector per thread."""
    block_c = min(MAX_BLOCK_C, triton.next_power_of_2(C))
    th = max(1, WARPS * 32 * (16 // x.element_size()) // block_c // TILE_W)
    blocks = triton.cdiv(C, block_c)
    grid = (blocks * triton.cdiv(H, th) * triton.cdiv(W, TILE_W) * x.shape[0],)
    return grid, blocks, {"TH": th, "TW": TILE_W, "BLOCK_C": block_c, "num_warps": WARPS}


class UpsampleCat(torch.autograd.Function):
    """apply(x, skip): x (B, C, H, W) upsampled to skip's size (B, D, H', W'), then skip: (B, C + D, H', W').

    For channels_last tensors of one dtype with H <= H' <= 2H and W <= W' <= 2W, not both equal. Raises Unsupported.
    """

    @staticmethod
    def forward(ctx, x, skip):
        ratio = all(i <= o <= 2 * i for i, o in zip(x.shape[2:], skip.shape[2:], strict=True))
        pair = x.dtype == skip.dtype and x.shape[0] == skip.shape[0] and x.shape[2:] != skip.shape[2:]
        require(x, channels_last=True, ratio=ratio, pair=pair)
        require(skip, channels_last=True)
        (n, cx, hi, wi), (_, cs, ho, wo) = x.shape, skip.shape
        ctx.size = (cx, hi, wi)
        out = torch.empty((n, cx + cs, ho, wo), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        grid, blocks, sizes = tiles(x, max(cx, cs), ho, wo)
        with on_device(x):
            _upsample_cat[grid](x, skip, out, hi, wi, ho, wo, cx, cs, blocks, **sizes)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (cx, hi, wi), (n, _, ho, wo) = ctx.size, grad.shape
        dy, stride = as_channels_last_rows(grad)
        dx = torch.empty((n, cx, hi, wi), dtype=dy.dtype, device=dy.device, memory_format=torch.channels_last)
        grid, blocks, sizes = tiles(dx, cx, hi, wi)
        with on_device(dy):
            _upsample_grad[grid](dy, dx, hi, wi, ho, wo, cx, stride, blocks, **sizes)
        return dx, grad[:, cx:]  # a slice, which the kernels before read in place


@functools.lru_cache(maxsize=64)
def _matrix(n_in: int, n_out: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """(n_out, n_in) matrix whose product with a column is that column interpolated."""
    with torch.inference_mode(False), torch.no_grad():  # training cannot use an inference-mode tensor
        eye = torch.eye(n_in, dtype=dtype, device=device)
        return F.interpolate(eye[None], size=n_out, mode="linear", align_corners=False)[0].t().contiguous()


def upsample_to(x: Tensor, size: tuple[int, int]) -> Tensor:
    """x (B, C, H, W) upsampled to `size`, any ratio, as two products with fixed matrices: rows, then columns.

    Computed in fp32 (fp64 for fp64), also under autocast, and rounded to x's dtype. Meant for few channels and large
    ratios, where the gradient of `F.interpolate` adds to each source pixel from many threads. The first call for each
    size creates the matrices, so it must precede the capture of a CUDA graph. TF32, where allowed, applies here too.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        rows = _matrix(x.shape[2], size[0], x.device, wide)
        cols = _matrix(x.shape[3], size[1], x.device, wide)
        return (rows @ (x.to(wide) @ cols.t())).to(x.dtype)
