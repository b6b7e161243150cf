"""The kernels against PyTorch's operations in fp64, and a network with them against the plain one.

On a GPU the tests run on it, and on the CPU a second pytest runs them through Triton's interpreter, in a process of its
own, because TRITON_INTERPRET has to be set before a kernel is decorated.

Tolerances. Sums in fp32 over up to 10^6 numbers, in blocks, stay within 1e-5 of the largest result. A bf16 result is
rounded once, by at most 2^-8 of itself; Triton's interpreter cuts the digits off instead, 2^-7.
"""

import copy
import os
import re
import subprocess
import sys
import threading
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model import U2MAMBAP, MambaLayer
from model.layers import PlainOps
from model.u2net import RSU
from tests.engine.test_step import CPU, script
from u2mamba import fast
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.step import TrainStep
from u2mamba.fast.launch import Unsupported
from u2mamba.runtime.environment import Environment

# by import_module, because a package's attribute may be the function of the same name
bn, conv2d, install, max_pool, mamba_ops, side, upsample = (
    import_module(f"u2mamba.fast.{name}")
    for name in "batch_norm_relu conv2d install max_pool mamba_ops side_output upsample".split()
)
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
GPU = torch.cuda.is_available() and not INTERPRET
DEVICE = "cuda" if GPU else "cpu"
LAST = torch.channels_last
BF16_ROUNDING = 2**-8 if GPU else 2**-7

kernels = pytest.mark.skipif(not (GPU or INTERPRET), reason="no GPU; test_interpreter runs it")


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
            return out.fill_(float("nan") if out.is_floating_point() else torch.iinfo(out.dtype).max)

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


def norm_reference(x, w, b, mean, var, momentum, eps, conv_bias, residual):
    shift = torch.zeros_like(mean) if conv_bias is None else conv_bias
    y = F.relu(F.batch_norm(x + shift[:, None, None], mean, var, w, b, True, momentum, eps))
    return y if residual is None else y + residual


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
    for g, want in zip(got, run_norm(norm_reference, inputs, dy, torch.float64), strict=True):
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
    want = run_norm(norm_reference, inputs, dy, torch.float64)
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
        for g, want in zip(got, run_norm(norm_reference, inputs, dy, torch.float64), strict=True):
            near(g, want)


@kernels
def test_nan_is_not_clipped_away():
    x, *rest = norm_inputs((1, 16, 4, 4), torch.float32, False, False)
    x[0, 3, 2, 1] = float("nan")
    bad = bn.batch_norm_relu(x, *rest[:4]).isnan().any(dim=3).any(dim=2)[0]
    assert bad.nonzero().flatten().tolist() == [3]


SIZES = [((3, 9), (6, 18)), ((3, 5), (5, 8)), ((1, 1), (2, 2)), ((1, 7), (1, 11)), ((5, 4), (9, 8))]
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
    want = PlainOps.upsample_cat(*wide)
    near(y, want)
    got_grads = torch.autograd.grad(y, (x, skip), dy)
    for got, expected in zip(got_grads, torch.autograd.grad(want, wide, dy.double()), strict=True):
        near(got, expected)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 16, 9, 9), (1, 3, 17, 18), (1, 64, 1, 1)] + [(12, 64, 145, 288)] * GPU, ids=str)
def test_max_pool(shape, dtype):
    """Whole numbers, so that windows have ties: value and gradient are exact."""
    x = torch.randint(-2, 3, shape, device=DEVICE).to(dtype).to(memory_format=LAST).requires_grad_()
    want = PlainOps.max_pool(x)[0]
    dy, dskip = torch.randn_like(want), images(shape[0], 2 * shape[1], *shape[2:], dtype=dtype)[:, shape[1] :]
    (want_dx,) = torch.autograd.grad(want, x, dy)
    got, skip = max_pool.max_pool(x)
    assert torch.equal(got, want) and skip.data_ptr() == x.data_ptr()
    assert torch.equal(torch.autograd.grad(got, x, dy, retain_graph=True)[0], want_dx)
    near(torch.autograd.grad((got, skip), x, (dy, dskip), retain_graph=True)[0], want_dx.double() + dskip)
    assert torch.equal(torch.autograd.grad(skip, x, dskip)[0], dskip)


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
    conv2d.wait_for_weight_grads(got.device)
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(2, 5, 81), (1, 32, 3), (1, 2, 1100)] + [(12, 64, 82944)] * GPU, ids=str)
def test_conv_silu(shape, dtype):
    """The input is a slice of rows, as Mamba's projection leaves it; the gradient comes in another layout."""
    n, d, L = shape
    x = torch.randn(n, 2 * d, L, device=DEVICE).to(dtype)[:, :d]
    mine, wide = leaves(x, torch.randn(d, 1, 4, device=DEVICE), torch.randn(d, device=DEVICE))
    got = mamba_ops.conv_silu(*mine)
    dy = torch.randn(n, L, d, device=DEVICE).to(dtype).transpose(1, 2)
    want = F.silu(F.conv1d(wide[0], *wide[1:], padding=3, groups=d)[..., :L])
    grads_near(got, mine, want, wide, dy)


@kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(2, 33, 70), (1, 2, 5), (2, 1024, 41)] + [(32, 1024, 81), (32, 128, 324)] * GPU, ids=str
)
def test_rms_norm(shape, dtype):
    """Tiles that are not full."""
    b, rows, L = shape
    mine, wide = leaves((torch.randn(b, rows, L, device=DEVICE) * 3).to(dtype), torch.randn(rows, device=DEVICE))
    got = mamba_ops.rms_norm(*mine, 1e-6)
    assert got.dtype == dtype
    want = F.rms_norm(wide[0].transpose(1, 2), (rows,), wide[1], 1e-6).transpose(1, 2)
    grads_near(got, mine, want, wide, torch.randn_like(got))


@kernels
def test_what_a_kernel_does_not_take_is_refused():
    first, wide = torch.randn(1, 4, 6, 6, device=DEVICE), images(1, 2 * side.MAX_C, 4, 4)
    refused = {
        "channels last": lambda: max_pool.max_pool(first),
        "dtype": lambda: max_pool.max_pool(images(1, 4, 6, 6, dtype=torch.float64)),
        "several values": lambda: bn.batch_norm_relu(images(1, 4, 1, 1), *torch.ones(4, 4, device=DEVICE)),
        "ratio": lambda: upsample.upsample_cat(images(1, 4, 3, 3), images(1, 4, 8, 7)),
        "channels": lambda: side.side_output(
            wide, torch.randn(1, 2 * side.MAX_C, 3, 3, device=DEVICE), first[0, 0, 0, :1]
        ),
    }
    for reason, call in refused.items():
        with pytest.raises(Unsupported, match=reason):
            call()


class Small(nn.Module):
    """Every operation with a kernel, in 17 convolutions."""

    ops = PlainOps

    def __init__(self):
        super().__init__()
        self.stage1 = RSU(4, False, 3, 8, 8, partial(MambaLayer, norm_at="gate"), (4,))
        self.stage2 = RSU(4, True, 8, 8, 8)
        self.side1, self.side2 = nn.Conv2d(16, 1, 3, padding=1), nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, logits=True):
        h, skip = self.ops.max_pool(self.stage1(x))
        h = self.stage2(h)
        d1 = self.ops.side_output(self.side1, self.ops.upsample_cat(h, skip))
        return d1, self.ops.upsample_to(self.ops.side_output(self.side2, h), d1.shape[2:])


def make_step(kind, precision, **options):
    torch.manual_seed(0)
    net = Small().to(memory_format=LAST).train()
    lines = fast.install(net) if kind is fast.TrainStep else []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, fused=True)
    loss = options.pop("loss", script.multi_bce_loss_fusion)
    env = Environment(CPU.device, precision, channels_last=True)
    return kind(net, optimizer, loss, env, DistContext(), **options), lines


def cosines(step, reference):
    """Of each parameter's gradient after one batch with that of `reference`, where batch norm does not cancel it."""
    pairs = zip(step.net.named_parameters(), reference.net.parameters(), strict=True)
    grads = [(p.grad.flatten(), q.grad.flatten()) for (name, p), q in pairs if not name.endswith("conv_s1.bias")]
    return torch.tensor([F.cosine_similarity(p, q, 0) for p, q in grads if q.norm() > 1e-5])


@pytest.mark.skipif(not INTERPRET, reason="test_fast_step compares them on a GPU")
@pytest.mark.filterwarnings("ignore")
def test_the_fast_step_against_the_plain_one(monkeypatch):
    """Rounding is multiplied on the way, so bf16 autocast is the yardstick and not 1. Then what is frozen: no gradient,
    neither of the copies, no move of the statistics."""
    monkeypatch.undo()
    images, masks = torch.randn(2, 3, 16, 16).to(memory_format=LAST), (torch.rand(2, 1, 16, 16) > 0.5).float()
    reference, autocast = make_step(TrainStep, "fp32")[0], make_step(TrainStep, "bf16")[0]
    step, lines = make_step(fast.TrainStep, "bf16")
    assert lines[0].startswith("kernels: batch norm + ReLU, pooling") and "plain PyTorch" not in lines[0]
    double, _ = make_step(fast.TrainStep, "bf16", loss=lambda d, y: 2 * script.multi_bce_loss_fusion(d, y))
    parts, _ = make_step(fast.TrainStep, "bf16", grad_accum_steps=2)
    for each in (reference, autocast, step, double, parts):
        each(images, masks)
    assert len(step.copies) == 22 and set(step.ops.uses.values()) == {1}
    assert cosines(step, reference).median() > cosines(autocast, reference).median() - 0.1
    assert step.read().loss == pytest.approx(reference.read().loss, rel=0.02)
    assert double.read().loss == pytest.approx(2 * step.read().loss)
    for p, q in zip(step.net.parameters(), double.net.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None)
        assert p.grad is None or torch.equal(q.grad, 2 * p.grad)
    assert all(torch.isfinite(p.grad).all() for p in parts.net.parameters() if p.grad is not None)
    for key, value in reference.net.state_dict().items():
        if "running" in key:
            assert torch.allclose(step.net.state_dict()[key], value, rtol=0.2, atol=0.05), key
    frozen = step.net.stage1.requires_grad_(False).eval()
    before = copy.deepcopy(frozen.state_dict())
    step.set_learning_rate(0.1)
    step(images, masks)
    assert all(torch.equal(value, before[key]) for key, value in frozen.state_dict().items())
    assert all(p.grad is None for p in frozen.parameters())
    assert all(c.grad is None and c.requires_grad == p.requires_grad for p, c in step.copies.items())
    assert step.net.stage2.rebnconvin.conv_s1.weight.grad.abs().max() > 0


@kernels
def test_an_operation_that_was_edited_or_fails_stays_plain(monkeypatch):
    def relu6(conv, norm, x, residual=None):
        return F.relu6(norm(conv(x)))

    def no_compiler(*_):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(PlainOps, "batch_norm_relu", staticmethod(relu6))
    monkeypatch.setattr(install, "conv_silu", no_compiler)
    install._trial.cache_clear()
    net = U2MAMBAP().to(DEVICE, memory_format=LAST)
    (line, _), ops = fast.install(net), net.stage1.ops
    install._trial.cache_clear()
    assert "batch norm + ReLU (differs from model/layers.py)" in line.split("plain PyTorch: ")[1]
    assert "Mamba's convolution (RuntimeError: Failed to find C compiler. Please specify via CC)" in line
    assert ops.batch_norm_relu is relu6 and ops.max_pool.__func__ is install.FusedOps.max_pool
    assert copy.deepcopy(net).stage1.ops is ops is net.stage2.rebnconvin.ops


def test_install_says_why_it_takes_nothing_over():
    if GPU or INTERPRET:
        pytest.skip("kernels run here")
    net = U2MAMBAP()
    kernels_line, scan_line = fast.install(net)
    assert kernels_line.startswith("kernels: none, plain PyTorch layers (")
    assert scan_line == "selective scan: torch (chunked PyTorch)" and net.ops is PlainOps


@pytest.mark.parametrize(("wrong", "says"), [(None, ""), (lambda y: y * 1.1, "wrong"), (lambda y: y + 0, "")])
def test_a_scan_is_tried_before_it_is_used(monkeypatch, wrong, says):
    scan = install.selective_scan.selective_scan
    monkeypatch.setattr(install.launch, "why_not", lambda device: "")
    monkeypatch.setitem(
        install.selective_scan.REGISTERED, "triton", (lambda *v: wrong(scan(*v)) if wrong else scan(*v), None)
    )
    assert says in install._scan_trial("triton", torch.device("cpu"))


def test_no_scan_is_tried_while_kernels_only_compile(monkeypatch):
    monkeypatch.setattr(install.launch, "_compiling", [])
    monkeypatch.setattr(install, "_scan_trial", lambda *_: "its results are wrong on this machine")
    monkeypatch.setattr(install, "_unusable_scans", {})
    assert install._unusable("triton", torch.device("cuda", 0)) == "" and install._unusable_scans == {}
    monkeypatch.undo()


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
    assert passed and int(passed[1]) >= 40


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_without_triton():
    """Where Triton is not installed everything loads and trains, and a line says what runs."""
    code = """
import sys; sys.modules["triton"] = None
import torch
from model import U2NETP
from u2mamba import fast
net = U2NETP().to(memory_format=torch.channels_last)
print(*fast.install(net))
"""
    done = run(["-c", code])
    assert done.stdout == "kernels: none, plain PyTorch layers (Triton is not installed)\n", done.stderr[-2000:]
