"""The kernels against PyTorch's operations in fp64, values and all gradients.

On a GPU the tests run on it; on a CPU `test_install.test_interpreter` runs them in Triton's interpreter, in a process
of its own, because TRITON_INTERPRET has to be set before a kernel is defined.

Tolerances. Sums in fp32 over up to 10^6 numbers, in blocks, stay within 1e-5 of the largest result. A bf16 result is
rounded once, by at most 2^-8 of itself; Triton's interpreter truncates instead, 2^-7.
"""

import os
from importlib import import_module

import pytest
import torch
import torch.nn.functional as F

from model.layers import PlainOps
from model.selective_scan import selective_scan
from u2mamba.fast.launch import Unsupported

# by import_module, because a package's attribute may be the function of the same name
bn, max_pool, mamba_ops, scan, side, upsample = (
    import_module(f"u2mamba.fast.{name}")
    for name in "batch_norm_relu max_pool mamba_ops selective_scan side_output upsample".split()
)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
LAST, FIRST = torch.channels_last, torch.contiguous_format
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
ROUNDING = {BF16: 2**-8 if GPU else 2**-7, FP16: 2**-10}


def kernels(test):
    needs = pytest.mark.skipif(not (GPU or INTERPRET), reason="no GPU; test_interpreter runs it")
    return pytest.mark.usefixtures("poison")(needs(test))


@pytest.fixture
def poison(monkeypatch):
    """Seeds, and fills every torch.empty: where a kernel leaves out an element, a NaN stays."""
    torch.manual_seed(0)

    def poisoned(create):
        def create_poisoned(*args, **kwargs):
            out = create(*args, **kwargs)
            with torch.no_grad():
                return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

        return create_poisoned

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))


def near(got, want, sums=1e-5):
    """Both finite, and apart by at most the rounding of `got`'s dtype plus `sums` of the largest number."""
    want = want.detach().double()
    assert torch.isfinite(want).all()
    off = (got.detach().double() - want).abs() - ROUNDING.get(got.dtype, 0.0) * want.abs()
    assert off.max() <= sums * want.abs().max() + 1e-30, f"off by {off.max():.3g}, largest {want.abs().max():.3g}"


def check(kernel, plain, inputs, dy=None, sums=1e-5):
    """Value and gradients of `kernel` against those of `plain` in fp64. Inputs may be None."""
    mine = [v if v is None else v.detach().requires_grad_() for v in inputs]
    wide = [v if v is None else v.detach().double().requires_grad_() for v in inputs]
    got, want = kernel(*mine), plain(*wide)
    dy = torch.randn_like(got) if dy is None else dy
    assert got.dtype == inputs[0].dtype and got.shape == want.shape
    near(got, want, sums)
    ours = torch.autograd.grad(got, [v for v in mine if v is not None], dy)
    theirs = torch.autograd.grad(want, [v for v in wide if v is not None], dy.double())
    for a, b in zip(ours, theirs, strict=True):
        near(a, b, sums)
    return got


def images(*shape, dtype=FP32, scale=1.0, offset=0.0):
    return (torch.randn(shape, device=DEVICE) * scale + offset).to(dtype).to(memory_format=LAST)


def vector(n):
    return torch.randn(n, device=DEVICE)


def check_batch_norm(x, extras, dy=None, sums=1e-5):
    """With `extras` there are a residual and a convolution bias. dy is zero where rounding decides the ReLU's sign."""
    C = x.shape[1]
    weight, bias, conv_bias = vector(C), vector(C) * 0.3, vector(C) if extras else None
    residual = images(*x.shape, dtype=x.dtype) if extras else None
    running = vector(C), vector(C).abs()
    running64 = [v.double() for v in running]

    def plain(x, weight, bias, residual):
        shifted = x if conv_bias is None else x + conv_bias[:, None, None]
        y = F.relu(F.batch_norm(shifted, *running64, weight, bias, True, 0.1, 1e-5))
        return y if residual is None else y + residual

    def kernel(x, weight, bias, residual):
        return bn.BatchNormReLU.apply(x, weight, bias, *running, 0.1, 1e-5, conv_bias, residual)

    if dy is None:
        z = F.batch_norm(x.double(), None, None, weight.double(), bias.double(), training=True)
        dy = (torch.randn_like(z) * (z.abs() > 1e-3)).to(x.dtype)
    y = check(kernel, plain, (x, weight, bias, residual), dy, sums)
    assert y.is_contiguous(memory_format=LAST)
    for a, b in zip(running, running64, strict=True):
        near(a, b)


BATCH_NORM = [((2, 64, 9, 9), FP32), ((1, 16, 17, 18), BF16), ((1, 3, 9, 9), FP32), ((2, 24, 9, 10), BF16)]
BATCH_NORM += [((12, 512, 9, 9), BF16), ((12, 64, 288, 288), FP32), ((4, 256, 72, 72), BF16)] * GPU
BATCH_NORM += [((12, 16, 144, 144), FP32), ((3, 32, 145, 289), BF16)] * GPU
BATCH_NORM = [(shape, dtype, 2.0, 0.5, 1e-5) for shape, dtype in BATCH_NORM]
# mean 1000, deviation 0.5: fp32 sums of x² would be wrong by 10^6 * 2^-24 = 0.06 in a variance of 0.25. What remains is
# the rounding of the mean itself, 2^-15, relative to the deviation: 6e-5
BATCH_NORM += [((2, 16, 24, 25), FP32, 0.5, 1000.0, 3e-4)]


@kernels
@pytest.mark.parametrize("small_m", [4096, 0], ids=["one launch", "several"])
@pytest.mark.parametrize(("shape", "dtype", "scale", "offset", "sums"), BATCH_NORM, ids=str)
def test_batch_norm_relu(shape, dtype, scale, offset, sums, small_m, monkeypatch):
    monkeypatch.setattr(bn, "SMALL_M", small_m)
    check_batch_norm(images(*shape, dtype=dtype, scale=scale, offset=offset), extras=dtype == BF16, sums=sums)


@kernels
def test_batch_norm_with_slices_and_expanded_gradients():
    x, wide = images(2, 16, 9, 10), images(2, 32, 9, 10)
    for dy in (wide[:, 16:], wide[:, 16:].contiguous(memory_format=FIRST), x.new_ones(()).expand(2, 16, 9, 10)):
        check_batch_norm(x, extras=True, dy=dy)


@kernels
def test_nan_is_not_clipped_away():
    x = images(1, 16, 4, 4)
    x[0, 3, 2, 1] = float("nan")
    y = bn.BatchNormReLU.apply(x, *torch.ones(4, 16, device=DEVICE), 0.1, 1e-5, None, None)
    assert y.isnan().sum((0, 2, 3)).nonzero().tolist() == [[3]]


UPSAMPLE = [((3, 9), (6, 18), 16, 16), ((3, 5), (5, 8), 3, 24), ((1, 1), (2, 2), 64, 64), ((5, 4), (9, 8), 16, 16)]
UPSAMPLE += [((144, 144), (288, 288), 64, 64), ((36, 37), (71, 73), 3, 24), ((18, 18), (36, 36), 16, 16)] * GPU


@kernels
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("size", "to", "channels", "more"), UPSAMPLE, ids=str)
def test_upsample_cat(size, to, channels, more, dtype):
    inputs = images(2, channels, *size, dtype=dtype), images(2, more, *to, dtype=dtype)
    y = check(upsample.UpsampleCat.apply, PlainOps.upsample_cat, inputs)
    assert y.is_contiguous(memory_format=LAST)


@kernels
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (1, 3, 17, 18), (1, 64, 1, 1)] + [(12, 64, 145, 288)] * GPU, ids=str)
def test_max_pool(shape, dtype):
    """Whole numbers, so that windows have ties: value and gradient are exact."""
    x = torch.randint(-2, 3, shape, device=DEVICE).to(dtype).to(memory_format=LAST).requires_grad_()
    want = PlainOps.max_pool(x)[0]
    dy, dskip = torch.randn_like(want), images(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)[:, shape[1] :]
    (want_dx,) = torch.autograd.grad(want, x, dy)
    got, skip = max_pool.MaxPool.apply(x)
    assert torch.equal(got, want) and skip.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(got, x, dy, retain_graph=True)[0], want_dx)
    near(torch.autograd.grad((got, skip), x, (dy, dskip), retain_graph=True)[0], want_dx.double() + dskip)
    assert torch.equal(torch.autograd.grad(skip, x, dskip)[0], dskip)


@pytest.mark.parametrize(("size", "to"), [((9, 9), (288, 288)), ((5, 7), (33, 40)), ((9, 9), (3, 4))], ids=str)
def test_upsample_to(size, to):
    x, in_autocast = torch.randn(2, 1, *size, device=DEVICE), torch.autocast(DEVICE, BF16)
    check(in_autocast(lambda x: upsample.upsample_to(x, to)), lambda x: PlainOps.upsample_to(x, to), [x])
    assert upsample.upsample_to(x.bfloat16(), to).dtype == BF16


SIDE = [((2, 16, 9, 7), FP32, LAST), ((1, 64, 3, 33), BF16, FIRST), ((3, 5, 1, 4), BF16, LAST)]
SIDE += [((12, 64, 288, 288), BF16, LAST), ((5, 128, 71, 73), FP32, FIRST)] * GPU


@kernels
@pytest.mark.parametrize(("shape", "dtype", "weight_format"), SIDE, ids=str)
def test_side_output(shape, dtype, weight_format, monkeypatch):
    """Borders of images inside a tile, and in the backward pass several tiles per program."""
    if not GPU:
        for name, value in (("PIXELS", 16), ("PIXELS_BACK", 16), ("PROGRAMS", 1)):
            monkeypatch.setattr(side, name, value)
    weight = torch.randn(1, shape[1], 3, 3, device=DEVICE) / 9
    inputs = images(*shape, dtype=dtype), weight.to(dtype).contiguous(memory_format=weight_format), vector(1)
    check(side.SideOutput.apply, lambda *v: F.conv2d(*v, padding=1), inputs)


CONV = [((2, 5, 81), FP32), ((1, 32, 3), BF16), ((1, 2, 1100), BF16)] + [((12, 64, 82944), BF16)] * GPU
NORM = [((2, 33, 70), FP32), ((1, 2, 5), BF16), ((2, 1024, 41), BF16)]
NORM += [((32, 1024, 81), BF16), ((32, 128, 324), FP32)] * GPU


@kernels
@pytest.mark.parametrize(("shape", "dtype"), CONV, ids=str)
def test_conv_silu(shape, dtype):
    """The input is a slice of rows, as from Mamba's projection; the gradient has another layout."""
    n, d, L = shape
    x = torch.randn(n, 2 * d, L, device=DEVICE).to(dtype)[:, :d]
    dy = torch.randn(n, L, d, device=DEVICE).to(dtype).transpose(1, 2)
    inputs = x, torch.randn(d, 1, 4, device=DEVICE), vector(d)
    check(mamba_ops.ConvSiLU.apply, lambda *v: F.silu(F.conv1d(*v, padding=3, groups=d)[..., :L]), inputs, dy)


@kernels
@pytest.mark.parametrize(("shape", "dtype"), NORM, ids=str)
def test_rms_norm(shape, dtype):
    """Tiles that are not full."""
    inputs = (torch.randn(shape, device=DEVICE) * 3).to(dtype), vector(shape[1])
    check(
        lambda x, w: mamba_ops.RMSNorm.apply(x, w, 1e-6),
        lambda x, w: F.rms_norm(x.transpose(1, 2), shape[1:2], w, 1e-6).transpose(1, 2),
        inputs,
    )


@kernels
def test_unsupported_inputs_are_refused():
    first, wide = torch.randn(1, 4, 6, 6, device=DEVICE), images(1, 2 * side.MAX_C, 4, 4)
    weight, ones = torch.randn(1, 2 * side.MAX_C, 3, 3, device=DEVICE), torch.ones(4, 4, device=DEVICE)
    refused = {
        "channels last": lambda: max_pool.MaxPool.apply(first),
        "dtype": lambda: max_pool.MaxPool.apply(images(1, 4, 6, 6, dtype=torch.float64)),
        "several values": lambda: bn.BatchNormReLU.apply(images(1, 4, 1, 1), *ones, 0.1, 1e-5, None, None),
        "ratio": lambda: upsample.UpsampleCat.apply(images(1, 4, 3, 3), images(1, 4, 8, 7)),
        "channels": lambda: side.SideOutput.apply(wide, weight, vector(1)),
    }
    for reason, call in refused.items():
        with pytest.raises(Unsupported, match=reason):
            call()


# ------- the selective scan


def scan_inputs(b, d, n, L, dtype=FP32, without=(), softplus=True):
    delta = torch.randn(b, d, L) if softplus else 0.5 * torch.rand(b, d, L)
    large = {"u": torch.randn(b, d, L), "delta": delta, "B": torch.randn(b, n, L), "C": torch.randn(b, n, L)}
    large = {name: v.to(dtype) for name, v in (large | {"z": torch.randn(b, d, L)}).items()}
    small = {"A": -4 * torch.rand(d, n) - 0.01, "D": torch.randn(d)}
    small["bias"] = torch.randn(d) if softplus else 0.1 * torch.rand(d)
    names = ("u", "delta", "A", "B", "C", "D", "z", "bias")
    return [None if name in without else (large | small)[name].to(DEVICE) for name in names]


def check_scan(*shape, softplus=True, sums=1e-5, backend="reference", **options):
    check(
        lambda *v: scan.selective_scan_triton(*v, softplus),
        lambda *v: selective_scan(*v, softplus, backend),
        scan_inputs(*shape, softplus=softplus, **options),
        sums=sums,
    )


@kernels
@pytest.mark.parametrize(
    ("shape", "tile", "programs", "options"),
    [
        ((1, 3, 2, 37), (4, 8, 2), 2048, {}),  # two chunks, the last one odd; a block of rows with one to spare
        ((2, 9, 2, 32), (4, 8, 1), 2048, {"without": ("bias",)}),  # three parts of dB and dC
        ((1, 10, 1, 40), (4, 8, 1), 3, {"dtype": BF16, "sums": 1e-4}),  # two groups: sums in scratch memory
        ((1, 2, 2, 19), (2, 16, 1), 2048, {"without": ("D", "z", "bias"), "softplus": False}),
        ((1, 1, 1, 33), (3, 32, 1), 2048, {"without": ("z",), "dtype": FP16, "sums": 1e-4}),
        ((1, 37, 1, 7), (1, 32, 1), 2048, {}),  # 37 parts of dB and dC: more than are added up at once
    ],
)
def test_scan(monkeypatch, shape, tile, programs, options):
    monkeypatch.setattr(scan, "TABLE", ((float("inf"), tile, tile),))
    monkeypatch.setattr(scan, "PROGRAMS", programs)
    check_scan(*shape, **options)


@kernels
def test_scan_of_slices_and_transposed_tensors(monkeypatch):
    """They are not copied; nor is the expanded gradient of a sum."""
    tile = (2, 16, 1)
    monkeypatch.setattr(scan, "TABLE", ((float("inf"), tile, tile),))
    u, delta, A, B, C, D, z, bias = scan_inputs(2, 2, 2, 20)
    wide = torch.cat([u, z], 1)  # (b, 2 d, L), as in_proj computes it
    inputs = [wide[:, :2], delta.mT.contiguous().mT, A, B, C, D, wide[:, 2:], bias]
    plain = lambda *v: selective_scan(*v, True, "reference")  # noqa: E731
    check(lambda *v: scan.selective_scan_triton(*v, True), plain, inputs, dy=u.new_ones(()).expand_as(u))


@kernels
@pytest.mark.skipif(not GPU, reason="needs a GPU")
@pytest.mark.parametrize("dtype", [FP32, BF16])
@pytest.mark.parametrize(("b", "d", "L"), [(2, 512, 81), (2, 512, 324), (2, 64, 1296), (1, 64, 5183), (1, 64, 82944)])
def test_scan_of_real_sizes(b, d, L, dtype):
    check_scan(b, d, 16, L, dtype=dtype, sums=2e-5 if dtype == FP32 else 1e-2, backend="torch")
