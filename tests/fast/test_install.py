"""`install`: what it replaces and reports; in Triton's interpreter the kernels' tests and a step with all of them."""

import copy
import os
import re
import subprocess
import sys
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
from tests.engine.test_step import script
from tests.fast.test_kernels import DEVICE, GPU, INTERPRET, LAST
from u2mamba import fast
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment

install = import_module("u2mamba.fast.install")  # the package's attribute is the function


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


def make_step(kind, precision, loss=script.multi_bce_loss_fusion, **options):
    torch.manual_seed(0)
    net = Small().to(memory_format=LAST).train()
    lines = fast.install(net) if kind is fast.TrainStep else []
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0, fused=True)
    return kind(net, optimizer, loss, Environment(torch.device("cpu"), precision), **options), lines


def grads(step):
    return [p.grad for p in step.net.parameters() if p.grad is not None]


def cosines(step, reference):
    """Of each parameter's gradient with that of `reference`, but for biases, which batch norm cancels."""
    pairs = zip(step.net.named_parameters(), reference.net.parameters(), strict=True)
    flat = [(p.grad.flatten(), q.grad.flatten()) for (name, p), q in pairs if not name.endswith("conv_s1.bias")]
    return torch.tensor([F.cosine_similarity(p, q, 0) for p, q in flat if q.norm() > 1e-5])


@pytest.mark.skipif(not INTERPRET, reason="test_fast_step compares them on a GPU")
@pytest.mark.filterwarnings("ignore")
def test_the_fast_step_against_the_plain_one():
    """Rounding grows from layer to layer, so bf16 autocast is the yardstick. Then an edited loss, micro-batches, and
    frozen layers: no gradient, neither of the bf16 copies, and unchanged statistics."""
    images, masks = torch.randn(2, 3, 16, 16).to(memory_format=LAST), (torch.rand(2, 1, 16, 16) > 0.5).float()
    reference, autocast = make_step(TrainStep, "fp32")[0], make_step(TrainStep, "bf16")[0]
    step, lines = make_step(fast.TrainStep, "bf16")
    assert lines[0].startswith("kernels: batch norm + ReLU, pooling") and "plain PyTorch" not in lines[0]
    double, _ = make_step(fast.TrainStep, "bf16", loss=lambda d, y: 2 * script.multi_bce_loss_fusion(d, y))
    parts, _ = make_step(fast.TrainStep, "bf16", grad_accum_steps=2)
    for each in (reference, autocast, step, double):
        each(images, masks)
    parts(*(torch.cat((v, v)).contiguous(memory_format=LAST) for v in (images, masks)))
    assert len(step.copies) == 22 and set(step.ops.uses.values()) == {1}
    assert cosines(step, reference).median() > cosines(autocast, reference).median() - 0.1
    assert step.read().loss == pytest.approx(reference.read().loss, rel=0.02)
    assert double.read().loss == pytest.approx(2 * step.read().loss)
    for once, twice, halves in zip(grads(step), grads(double), grads(parts), strict=True):
        assert torch.equal(twice, 2 * once) and torch.allclose(halves, once, rtol=1e-3, atol=1e-6)
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


class Switch(nn.Module):
    """The second layer is used once it is switched on, by its copy, as the fused operations do."""

    def __init__(self):
        super().__init__()
        self.ops, self.layers, self.used = install.FusedOps(), nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), 1

    def forward(self, x, logits=True):
        weights = [self.ops.bf16_weights.get(layer.weight, layer.weight) for layer in self.layers[: self.used]]
        return (sum(F.conv2d(x, weight.float()[..., None, None]) for weight in weights),)


def test_a_weight_that_the_first_step_did_not_use_is_trained_by_a_later_one():
    images, net, copied = torch.randn(2, 3, 8, 8), *(Switch() for _ in range(2))
    copied.load_state_dict(net.state_dict())
    for kind, each in ((TrainStep, net), (fast.TrainStep, copied)):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.0, fused=True)
        step = kind(each, optimizer, lambda d, y: d[0].square().mean(), Environment(torch.device("cpu")))
        step(images, images[:, :1])
        assert each.layers[1].weight.grad is None
        each.used = 2
        step(images, images[:, :1])
    for layer, other in zip(net.layers, copied.layers, strict=True):
        assert torch.allclose(layer.weight.grad, other.weight.grad, rtol=0.1, atol=0.02) and other.weight.grad.any()


@pytest.mark.skipif(not (GPU or INTERPRET), reason="no GPU; test_interpreter runs it")
def test_an_operation_that_was_edited_or_fails_stays_plain(monkeypatch):
    def relu6(conv, norm, x, residual=None):
        return F.relu6(norm(conv(x)))

    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC")

    monkeypatch.setattr(PlainOps, "batch_norm_relu", staticmethod(relu6))
    monkeypatch.setattr(install.ConvSiLU, "apply", no_compiler)
    install._trial.cache_clear()
    net = U2MAMBAP().to(DEVICE, memory_format=LAST)
    (line, _), ops = fast.install(net), net.stage1.ops
    install._trial.cache_clear()
    assert "batch norm + ReLU (differs from model/layers.py)" in line.split("plain PyTorch: ")[1]
    assert "Mamba's convolution (RuntimeError: Failed to find C compiler. Please specify via CC)" in line
    assert ops.batch_norm_relu is relu6 and ops.max_pool.__func__ is install.FusedOps.max_pool
    assert copy.deepcopy(net).stage1.ops is ops is net.stage2.rebnconvin.ops


@pytest.mark.parametrize(("result", "says"), [(None, "TypeError"), (lambda y: y * 1.1, "wrong"), (lambda y: y, "")])
def test_a_scan_is_tried_before_it_is_used(monkeypatch, result, says):
    scan, cpu = install.selective_scan.selective_scan, torch.device("cpu")
    monkeypatch.setattr(install.launch, "why_not", lambda device: "")
    monkeypatch.setattr(install, "_unusable_scans", {})
    monkeypatch.setitem(install.selective_scan.REGISTERED, "triton", (lambda *v: result(scan(*v)), None))
    with monkeypatch.context() as compiling:  # what a kernel returns there is uninitialized
        compiling.setattr(install.launch, "_compiling", [])
        assert install._unusable("triton", cpu) == ""
    trouble = install._unusable("triton", cpu)
    assert says in trouble and bool(trouble) == bool(says)


@pytest.mark.skipif(INTERPRET or GPU, reason="is what runs this, or the GPU runs the same tests")
def test_interpreter():
    pytest.importorskip("triton")
    done = run("-m", "pytest", "tests/fast", "-p", "no:cacheprovider", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0, done.stdout[-4000:]
    assert passed and int(passed[1]) >= 40


@pytest.mark.skipif(INTERPRET, reason="once is enough")
def test_without_triton():
    """Everything loads and works, and the line says what runs."""
    code = """
import sys; sys.modules["triton"] = None
import torch
from model import U2MAMBAP
from u2mamba import fast
print(*fast.install(U2MAMBAP().to(memory_format=torch.channels_last)), sep="; ")
"""
    done = run("-c", code)
    wanted = "kernels: none, plain PyTorch layers (Triton is not installed); selective scan: torch (chunked PyTorch)\n"
    assert done.stdout == wanted, done.stderr[-2000:]


def run(*words, **environment):
    root, env = Path(__file__).resolve().parents[2], os.environ | environment
    return subprocess.run([sys.executable, *words], cwd=root, env=env, capture_output=True, text=True, timeout=300)
