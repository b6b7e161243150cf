"""The Triton kernels for batch norm + ReLU, upsampling, pooling and the losses against their slow definitions in fp64.

On a GPU the tests run on it, and on the CPU a second pytest runs them through Triton's interpreter, in a process of its
own, because TRITON_INTERPRET has to be set before a kernel is decorated.

Tolerances. Sums in fp32 over up to 10^6 numbers, in blocks, stay within 1e-5 of the largest result. A bf16 result is
rounded once, by at most 2^-8 of itself; Triton's interpreter cuts the digits off instead, 2^-7.
"""

import os
import re
import subprocess
import sys
import threading
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

# by import_module, because the package's attribute `batch_norm_relu` is the function
bn, bn_pool, convolution, losses, max_pool, side, tokens, upsample = (
    import_module(f"u2mamba.fast.{name}")
    for name in "batch_norm_relu batch_norm_pool convolution losses max_pool side_output tokens upsample".split()
)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
LAST = torch.channels_last
BF16_ROUNDING = 2**-8 if GPU else 2**-7

kernels = pytest.mark.skipif(not (GPU or INTERPRET), reason="no GPU; test_interpreter runs this one")
gpu_only = pytest.mark.skipif(not GPU, reason="needs a GPU")


def near(got, want, sums=1e-5):
    """Both finite, and apart by at most the rounding of `got`'s dtype plus `sums` of the largest number."""
    want = want.detach().double()
    assert torch.isfinite(want).all()
    rounding = {torch.bfloat16: BF16_ROUNDING, torch.float16: 2**-10}.get(got.dtype, 0.0)
    off = (got.detach().double() - want).abs() - rounding * want.abs()
    assert off.max() <= sums * want.abs().max(), f"off by {off.max():.3g}, largest {want.abs().max():.3g}"


@pytest.fixture(autouse=True)
def poison(monkeypatch, request):
    """Seeds, and fills every torch.empty: a kernel that leaves out an element leaves a NaN there."""
    torch.manual_seed(0)

    def poisoned(make):
        def make_poisoned(*args, **kwargs):
            out = make(*args, **kwargs)
            return out.fill_(float("nan") if out.is_floating_point() else -(10**6))

        return make_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def images(*shape, dtype=torch.float32, scale=1.0, offset=0.0):
    return (torch.randn(shape, device=DEVICE) * scale + offset).to(dtype).to(memory_format=LAST)


def norm_inputs(shape, dtype, conv_bias, residual, **numbers):
    C = shape[1]
    vectors = [torch.randn(C, device=DEVICE), torch.randn(C, device=DEVICE) * 0.3]
    running = [torch.randn(C, device=DEVICE), torch.rand(C, device=DEVICE)]
    return (
        images(*shape, dtype=dtype, **numbers),
        *vectors,
        *running,
        torch.randn(C, device=DEVICE) if conv_bias else None,
        images(*shape, dtype=dtype) if residual else None,
    )


def run_norm(function, inputs, dy, dtype=None):
    """y, gradients of x, weight, bias and residual, running statistics; in `dtype` where one is given."""
    x, w, b, mean, var, conv_bias, res = [t if t is None else t.to(dtype or t.dtype, copy=True) for t in inputs]
    leaves = [t.requires_grad_() for t in (x, w, b, res) if t is not None]
    y = function(x, w, b, mean, var, 0.1, 1e-5, conv_bias, res)
    return [y, *torch.autograd.grad(y, leaves, dy.to(y.dtype)), mean, var]


def norm_gradient(inputs, layout=LAST):
    """Random dy, zero where the sign of the ReLU's input depends on fp32 rounding."""
    x, w, b = (t.double() for t in inputs[:3])
    z = F.batch_norm(x, None, None, w, b, training=True)
    return (torch.randn_like(z) * (z.abs() > 1e-3)).to(inputs[0].dtype).contiguous(memory_format=layout)


NORM_SHAPES = [(2, 64, 9, 9), (1, 16, 17, 18), (1, 3, 9, 9), (2, 24, 9, 10)]
if GPU:
    NORM_SHAPES += [(12, 512, 9, 9), (12, 64, 288, 288), (4, 256, 72, 72), (12, 16, 144, 144), (3, 32, 145, 289)]


@kernels
@pytest.mark.parametrize("launches", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", NORM_SHAPES, ids=str)
def test_batch_norm_relu(shape, dtype, launches, monkeypatch):
    if launches == 1 and shape[0] * shape[2] * shape[3] > bn.SMALL_M:
        pytest.skip("too many rows for one launch")
    monkeypatch.setattr(bn, "SMALL_M", bn.SMALL_M if launches == 1 else 0)
    extras = dtype == torch.bfloat16  # with convolution bias and residual in one dtype, without in the other
    inputs = norm_inputs(shape, dtype, extras, extras, scale=2.0, offset=0.5)
    dy = norm_gradient(inputs)
    got = run_norm(bn.batch_norm_relu, inputs, dy)
    assert got[0].dtype == dtype and got[0].is_contiguous(memory_format=LAST)
    for g, want in zip(got, run_norm(bn.batch_norm_relu_reference, inputs, dy, torch.float64), strict=True):
        near(g, want)


def pool_norm_reference(*args):
    y = bn.batch_norm_relu_reference(*args)
    return max_pool.max_pool2x2_reference(y), y


@kernels
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 64, 6, 8), (1, 16, 17, 18), (1, 3, 9, 9), (2, 24, 9, 10)] + [(12, 64, 288, 288)] * GPU, ids=str
)
def test_batch_norm_relu_pool(shape, dtype, residual, monkeypatch):
    """Values and gradients, through the concatenation that takes y without a copy."""
    monkeypatch.setattr(bn_pool, "SMALL_M", 0)
    inputs = norm_inputs(shape, dtype, residual, residual, scale=2.0, offset=0.5)
    (n, c, h, w), half = shape, (-(-shape[2] // 2), -(-shape[3] // 2))
    below = images(n, c, *half, dtype=dtype)
    weights = images(n, 2 * c, h, w, dtype=dtype)
    x, w_, b = (t.double() for t in inputs[:3])
    z = F.batch_norm(x, None, None, w_, b, training=True)
    weights[:, c:] *= z.abs() > 1e-2  # at the ReLU's edge, and between two maxima, rounding decides
    y = F.relu(z) + (inputs[6].double() if residual else 0.0)
    top = F.max_pool2d(y, 2, 2, ceil_mode=True)
    below_top = F.interpolate(top, scale_factor=2)[..., :h, :w] - y
    close = (below_top > 0) & (below_top < 0.05 + 0.02 * y.abs())
    edge = (z.abs() <= 1e-2) | close | ((below_top == 0) & (z < 0))
    clear = F.max_pool2d(edge.double(), 2, 2, ceil_mode=True) == 0
    assert clear.double().mean() > 0.2
    dpooled = images(n, c, *half, dtype=dtype) * clear

    def run(function, dtype=None):
        x, w, b, mean, var, conv_bias, res = [t if t is None else t.to(dtype or t.dtype, copy=True) for t in inputs]
        leaves = [
            t.requires_grad_() for t in (x, w, b, res, below.to(dtype or below.dtype, copy=True)) if t is not None
        ]
        pooled, y = function(x, w, b, mean, var, 0.1, 1e-5, conv_bias, res)
        whole = upsample.upsample_cat(leaves[-1], y)
        outputs = [pooled, whole]
        grads = torch.autograd.grad(outputs, leaves, [dpooled.to(whole.dtype), weights.to(whole.dtype)])
        return [*outputs, *grads, mean, var], y

    (got, y), (want, _) = run(bn_pool.batch_norm_relu_pool), run(pool_norm_reference, torch.float64)
    assert got[1][:, c:].data_ptr() == y.data_ptr()  # nothing was copied
    # with a residual the gradient of y is written on its way, and rounded there
    sums = BF16_ROUNDING if residual and dtype == torch.bfloat16 else 1e-5
    for g, expected in zip(got, want, strict=True):
        near(g, expected, sums)


@kernels
def test_small_maps_are_pooled_by_the_separate_kernels():
    inputs = norm_inputs((2, 16, 6, 8), torch.float32, True, False)
    got = bn_pool.batch_norm_relu_pool(*inputs[:5], 0.1, 1e-5, *inputs[5:])
    inputs[3].zero_(), inputs[4].zero_()
    for g, want in zip(got, pool_norm_reference(*inputs[:5], 0.1, 1e-5, *inputs[5:]), strict=True):
        near(g, want)


@kernels
@pytest.mark.parametrize("small_m", [4096, 0])
def test_batch_norm_of_mean_far_above_deviation(small_m, monkeypatch):
    """mean 1000, deviation 0.5: fp32 sums of x² would be wrong by 10^6 * 2^-24 = 0.06 in a variance of 0.25.

    What stays is the rounding of the mean itself, 2^-15, against the deviation: 6e-5.
    """
    monkeypatch.setattr(bn, "SMALL_M", small_m)
    inputs = norm_inputs((2, 16, 24, 25), torch.float32, True, False, scale=0.5, offset=1000.0)
    dy = norm_gradient(inputs)
    got = run_norm(bn.batch_norm_relu, inputs, dy)
    want = run_norm(bn.batch_norm_relu_reference, inputs, dy, torch.float64)
    near(got[-1], want[-1], 1e-5)
    for g, w in zip(got[:-1], want[:-1], strict=True):
        near(g, w, 3e-4)


@kernels
def test_batch_norm_takes_slices_and_expanded_gradients():
    inputs = norm_inputs((2, 16, 9, 10), torch.float32, False, True)
    whole = torch.cat([torch.randn_like(inputs[0]), norm_gradient(inputs)], 1).contiguous(memory_format=LAST)
    for dy in (
        whole[:, 16:],
        norm_gradient(inputs, torch.contiguous_format),
        inputs[0].new_ones(()).expand(2, 16, 9, 10),
    ):
        got = run_norm(bn.batch_norm_relu, inputs, dy)
        for g, want in zip(got, run_norm(bn.batch_norm_relu_reference, inputs, dy, torch.float64), strict=True):
            near(g, want)


@kernels
def test_nan_is_not_clipped_away():
    x, *rest = norm_inputs((1, 16, 4, 4), torch.float32, False, False)
    x[0, 3, 2, 1] = float("nan")
    bad = bn.batch_norm_relu(x, *rest[:4]).isnan().any(dim=3).any(dim=2)[0]
    assert bad.nonzero().flatten().tolist() == [3]


def test_batch_norm_without_kernel():
    """Evaluation, NCHW and fp64 take the slow definition; the convolution's bias is undone in both modes."""
    x = torch.randn(2, 5, 6, 7, dtype=torch.float64)
    w, b, mean, bias = torch.randn(4, 5, dtype=torch.float64)
    var = torch.rand(5, dtype=torch.float64)
    for training in (True, False):
        got_mean, got_var, want_mean, want_var = mean.clone(), var.clone(), mean.clone(), var.clone()
        got = bn.batch_norm_relu(x, w, b, got_mean, got_var, 0.2, 1e-5, bias, training=training)
        with_bias = x + bias[:, None, None]
        want = F.relu(F.batch_norm(with_bias, want_mean, want_var, w, b, training, 0.2, 1e-5))
        for g, expected in ((got, want), (got_mean, want_mean), (got_var, want_var)):
            near(g, expected, 1e-12)


SIZES = [((3, 9), (6, 18)), ((3, 5), (5, 8)), ((1, 1), (2, 2)), ((1, 7), (1, 11)), ((4, 4), (4, 4)), ((5, 4), (9, 8))]
if GPU:
    SIZES += [((144, 144), (288, 288)), ((36, 37), (71, 73)), ((18, 18), (36, 36))]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("channels", "size"), list(zip([(16, 16), (3, 24), (64, 64)] * 3, SIZES, strict=False)), ids=str
)
def test_upsample_cat(channels, size, dtype):
    x = images(2, channels[0], *size[0], dtype=dtype).requires_grad_()
    skip = images(2, channels[1], *size[1], dtype=dtype).requires_grad_()
    y = upsample.upsample_cat(x, skip)
    assert y.dtype == dtype and y.is_contiguous(memory_format=LAST)
    dy = torch.randn_like(y)
    wide = [t.detach().double().requires_grad_() for t in (x, skip)]
    want = upsample.upsample_cat_reference(*wide)
    near(y, want)
    got_grads = torch.autograd.grad(y, (x, skip), dy)
    for got, expected in zip(got_grads, torch.autograd.grad(want, wide, dy.double()), strict=True):
        near(got, expected)


@kernels
def test_upsample_cat_of_other_ratios_is_the_slow_definition():
    x, skip = images(1, 4, 3, 3), images(1, 4, 8, 7)
    assert torch.equal(upsample.upsample_cat(x, skip), upsample.upsample_cat_reference(x, skip))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 16, 9, 9), (1, 3, 17, 18), (1, 64, 1, 1), (1, 24, 8, 5)] + [(12, 64, 145, 288)] * GPU, ids=str
)
def test_max_pool(shape, dtype):
    """Whole numbers, so that windows have ties: value and gradient are exact."""
    x = torch.randint(-2, 3, shape, device=DEVICE).to(dtype).to(memory_format=LAST).requires_grad_()
    want = max_pool.max_pool2x2_reference(x)
    dy, dskip = torch.randn_like(want), images(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)[:, shape[1] :]
    (want_dx,) = torch.autograd.grad(want, x, dy)
    got, skip = max_pool.max_pool2x2_skip(x)
    assert torch.equal(got, want) and skip.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(got, x, dy, retain_graph=True)[0], want_dx)
    near(torch.autograd.grad((got, skip), x, (dy, dskip), retain_graph=True)[0], want_dx.double() + dskip)
    assert torch.equal(torch.autograd.grad(skip, x, dskip)[0], dskip)


@kernels
def test_max_pool_passes_nan_on():
    x = images(1, 16, 4, 4)
    x[0, 2, 0, 1] = float("nan")
    torch.testing.assert_close(
        max_pool.max_pool2x2_skip(x)[0], max_pool.max_pool2x2_reference(x), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize(("size", "to"), [((9, 9), (288, 288)), ((5, 7), (33, 40)), ((9, 9), (3, 4))], ids=str)
def test_upsample_to(size, to):
    x = torch.randn(2, 1, *size, device=DEVICE, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    want = F.interpolate(wide, size=to, mode="bilinear", align_corners=False)
    with torch.autocast(DEVICE, torch.bfloat16):
        got = upsample.upsample_to(x, to)
    dy = torch.randn_like(got)
    near(got, want)
    near(torch.autograd.grad(got, x, dy)[0], torch.autograd.grad(want, wide, dy.double())[0])
    assert upsample.upsample_to(x.bfloat16(), to).dtype == torch.bfloat16


def grads_near(got, leaves, want, wide, dy):
    """Values and gradients of a function in the leaves' dtypes against those in fp64."""
    near(got, want)
    grads = torch.autograd.grad(got, leaves, dy)
    convolution.join(got.device)
    for g, expected in zip(grads, torch.autograd.grad(want, wide, dy.double()), strict=True):
        near(g, expected)


def leaves(*values):
    values = [v.requires_grad_() for v in values]
    return values, [v.detach().double().requires_grad_() for v in values]


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", [LAST, torch.contiguous_format], ids=["last", "first"])
@pytest.mark.parametrize(
    "shape", [(2, 16, 9, 7), (1, 64, 3, 33), (3, 5, 1, 4)] + [(12, 64, 288, 288), (5, 128, 71, 73)] * GPU, ids=str
)
def test_side_output(shape, weight_format, dtype, monkeypatch):
    """Borders of images inside a tile, and backward several tiles a program."""
    if not GPU:
        for name, value in (("PIXELS", 16), ("PIXELS_BACK", 16), ("PROGRAMS", 1)):
            monkeypatch.setattr(side, name, value)
    x = torch.randn(shape, device=DEVICE).to(dtype).contiguous(memory_format=LAST)
    weight = (torch.randn(1, shape[1], 3, 3, device=DEVICE) / 9).to(dtype).contiguous(memory_format=weight_format)
    mine, wide = leaves(x, weight, torch.randn(1, device=DEVICE))
    got = side.side_output(*mine)
    assert got.dtype == dtype and got.shape == (shape[0], 1, *shape[2:])
    grads_near(got, mine, F.conv2d(*wide, padding=1), wide, torch.randn_like(got))


@kernels
def test_side_output_of_many_channels_is_the_library_s():
    x = torch.randn(1, 2 * side.MAX_C, 4, 4, device=DEVICE).contiguous(memory_format=LAST)
    weight, bias = torch.randn(1, 2 * side.MAX_C, 3, 3, device=DEVICE), torch.randn(1, device=DEVICE)
    assert torch.equal(side.side_output(x, weight, bias), F.conv2d(x, weight, bias, padding=1))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 81, 16), (1, 7, 256), (3, 50, 24)] + [(12, 82944, 32)] * GPU, ids=str)
def test_layer_norm(shape, dtype):
    C = shape[-1]
    x = (torch.randn(shape, device=DEVICE) * 3 + 1).to(dtype)
    mine, wide = leaves(x, torch.randn(C, device=DEVICE), torch.randn(C, device=DEVICE))
    got = tokens.layer_norm(*mine)
    assert got.dtype == dtype
    grads_near(got, mine, F.layer_norm(wide[0], (C,), *wide[1:]), wide, torch.randn_like(got))


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 81), (1, 32, 3), (1, 2, 1100)] + [(12, 64, 82944)] * GPU, ids=str)
def test_conv_silu(shape, dtype):
    """The input is a slice of rows, as Mamba's projection leaves it; the gradient comes in another layout."""
    n, d, L = shape
    x = torch.randn(n, 2 * d, L, device=DEVICE).to(dtype)[:, :d]
    mine, wide = leaves(x, torch.randn(d, 1, 4, device=DEVICE), torch.randn(d, device=DEVICE))
    got = tokens.conv_silu(*mine)
    dy = torch.randn(n, L, d, device=DEVICE).to(dtype).transpose(1, 2)
    grads_near(got, mine, tokens.conv_silu_reference(*wide), wide, dy)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(2, 1, 4, 37), (1, 5, 3, 3), (3, 16, 16, 130), (2, 33, 0, 70), (1, 2, 0, 5), (2, 1024, 0, 41)]
    + [(12, 4, 16, 82944), (32, 1024, 0, 81), (32, 128, 0, 324)] * GPU,
    ids=str,
)
def test_rms_norms(shape, dtype):
    """One group and three, of one row and of more, tiles that are not full."""
    b, r, n, L = shape
    x = (torch.randn(b, r + 2 * n, L, device=DEVICE) * 3).to(dtype)
    mine, wide = leaves(x, *(torch.randn(size, device=DEVICE) for size in ((r, n, n) if n else (r,))))
    got = tokens.rms_norms(mine[0], mine[1:], 1e-6)
    assert got.dtype == dtype
    grads_near(got, mine, tokens.rms_norms_reference(wide[0], wide[1:], 1e-6), wide, torch.randn_like(got))


@pytest.mark.parametrize("tokens_first", [False, True])
def test_projection(tokens_first):
    mine, wide = leaves(torch.randn(6, 5, device=DEVICE), torch.randn(2, 5, 7, device=DEVICE))
    got = convolution.projection(*mine, tokens_first=tokens_first)
    assert (got.transpose(1, 2) if tokens_first else got).is_contiguous()
    grads_near(got, mine, wide[0] @ wide[1], wide, torch.randn_like(got))
    joined = torch.cat(convolution.projection(*mine, parts=2), 1)
    grads_near(joined, mine, wide[0] @ wide[1], wide, torch.randn_like(joined))


def loss_inputs(dtype=torch.float32, size=(50, 51), hard=False, n=3):
    z = torch.randn(7, n, 1, *size, device=DEVICE) * 5
    z[0, 0, 0, 0, :8] = torch.tensor([0.0, 80, -80, 20, -20, 1e-9, 8, 16], device=DEVICE)
    target = torch.rand(n, 1, *size, device=DEVICE)
    target[1] = 0.0
    return z.to(dtype).requires_grad_(), target > 0.5 if hard else target


@kernels
@pytest.mark.parametrize(
    ("dtype", "size", "hard", "weighted", "iou"),
    [
        (torch.float32, (50, 51), False, False, 0.0),
        (torch.float32, (50, 51), False, True, 0.7),
        (torch.bfloat16, (16, 40), True, False, 1.0),
        (torch.bfloat16, (16, 40), True, True, 0.0),
    ]
    + [(torch.bfloat16, (288, 288), False, True, 1.0)] * GPU,
)
@pytest.mark.parametrize("n", [3, 18])  # images: within one block of the last launch's, and more
def test_losses(dtype, size, hard, weighted, iou, n):
    z, target = loss_inputs(dtype, size, hard, n)
    weights = torch.rand(n, 1, *size, device=DEVICE) * 3 if weighted else None
    got = losses.multi_loss(list(z), target, weights, iou)
    wide = z.detach().double().requires_grad_()
    want = losses.multi_loss_reference(wide, target, weights, iou)
    near(got, want, 1e-6)
    factors = torch.randn(7, device=DEVICE)
    for w in (torch.ones_like(factors), factors):
        (dz,) = torch.autograd.grad((got * w).sum(), z, retain_graph=True)
        near(dz, torch.autograd.grad((want * w.double()).sum(), wide, retain_graph=True)[0], 1e-6)


@kernels
@pytest.mark.parametrize("logit", [-90.0, -12.0, 12.0])
def test_loss_of_certain_pixels_keeps_its_digits(logit):
    """log(1 + exp(-12)) = 6.1e-6 to six digits, where 1 + exp(-12) in fp32 has lost all but two."""
    z = torch.full((1, 1, 1, 4, 4), logit, device=DEVICE)
    got = losses.multi_loss(z, (z[0] > 0).float()).double()
    torch.testing.assert_close(got, F.softplus(-z.abs()).double().mean()[None], rtol=1e-5, atol=0)


def test_loss_names_shapes_that_differ():
    with pytest.raises(ValueError, match=r"\(2, 1, 4, 4\).*\(2, 1, 4, 5\)"):
        losses.multi_loss(torch.zeros(7, 2, 1, 4, 4), torch.zeros(2, 1, 4, 5))


@kernels
@pytest.mark.filterwarnings("ignore")
def test_operators_are_registered_right(monkeypatch):
    """PyTorch's own check: schema, fakes, autograd, tracing (the operator with state has its autograd outside)."""
    monkeypatch.undo()  # poison would spoil the comparison of fake and real
    x, w, b, mean, var, bias, res = norm_inputs((2, 16, 5, 6), torch.float32, True, True)
    check = torch.library.opcheck
    check(bn._forward, (x, w, b, mean, var, bias, res, 0.1, 1e-5), test_utils=("test_schema", "test_faketensor"))
    check(bn._backward, (x, x, w, b, mean, var + 1))
    check(upsample._cat, (x.requires_grad_(), images(2, 8, 9, 12).requires_grad_()))
    check(max_pool._pool, (x.detach(),))
    check(max_pool._pool_backward, (x.detach(), images(2, 16, 3, 3), x.detach()))
    check(losses._forward, (*loss_inputs(size=(4, 9)), torch.rand(3, 1, 4, 9, device=DEVICE), 0.5))
    check(losses._forward, (*loss_inputs(size=(4, 9)), None, 0.0))


@gpu_only
def test_captured_in_a_cuda_graph():
    """A step of all four, captured, then replayed on new input, equals the eager step; twice, bit for bit."""
    x, w, b, mean, var, bias, res = norm_inputs((4, 32, 72, 72), torch.bfloat16, True, True)
    x.requires_grad_()
    target = torch.rand(4, 1, 72, 72, device=DEVICE)

    def step():
        h = bn.batch_norm_relu(x, w, b, mean, var, 0.1, 1e-5, bias, res)
        pooled, h = max_pool.max_pool2x2_skip(h)
        h = upsample.upsample_cat(pooled, h)
        total = losses.multi_loss([h[:, k : k + 1] for k in range(7)], target).sum()
        return total, *torch.autograd.grad(total, x)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    state = mean.clone(), var.clone()
    graph.replay()
    first = [t.clone() for t in (*captured, mean, var)]
    for other in ("replay", "eager"):
        mean.copy_(state[0]), var.copy_(state[1])
        results = step() if other == "eager" else (graph.replay(), captured)[1]
        assert all(torch.equal(a, c) for a, c in zip((*results, mean, var), first, strict=True)), other


def run(code_or_args, **environment):
    root = Path(__file__).resolve().parents[2]
    return subprocess.run(
        [sys.executable, *code_or_args],
        cwd=root,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_kernels_are_loaded_by_the_thread_that_launches_them(monkeypatch):
    """Another thread's current GPU is number 0, and threads that load launchers side by side mix them up."""
    launch = import_module("u2mamba.fast.launch")
    if launch.triton is None:
        pytest.skip("without Triton nothing is compiled")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    loaded_by = []

    class Kernel:
        src = metadata = None
        run = property(lambda self: loaded_by.append(threading.get_ident()))

    with launch.compile_only():
        launch._compiling.extend((Kernel(), Kernel()))
    assert loaded_by == [threading.get_ident()] * 2


@pytest.mark.skipif(INTERPRET or GPU, reason="is what runs this, or the GPU runs the same tests")
def test_interpreter():
    pytest.importorskip("triton")
    file = str(Path(__file__).resolve())
    done = run(["-m", "pytest", file, "-p", "no:cacheprovider"], TRITON_INTERPRET="1", OMP_NUM_THREADS="1")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert passed and int(passed[1]) >= 45


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_without_triton():
    """Where Triton is not installed the modules load and compute by the slow definitions."""
    code = """
import sys; sys.modules["triton"] = None
import torch
from u2mamba import fast as kernels
from u2mamba.fast.launch import triton
assert triton is None
x, c = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last), torch.ones(4)
pooled, x = kernels.max_pool2x2_skip(kernels.batch_norm_relu(x, c, c * 0, c * 0, c))
y = kernels.upsample_cat(pooled, x)
print(tuple(y.shape), kernels.multi_loss([x[:, :1]] * 7, y[:, :1].clamp(0, 1)).shape[0])
"""
    done = run(["-c", code])
    assert done.stdout.strip() == "(2, 8, 5, 5) 7", done.stderr[-2000:]
