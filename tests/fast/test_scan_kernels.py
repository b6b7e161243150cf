"""The Triton selective scan against a plain float64 loop: on the GPU where there is one, else in Triton's interpreter.

The interpreter is chosen when a kernel's module is imported, so those tests run in a process of their own.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CUDA = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if CUDA else "cpu"

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="PyTorch brings no Triton here")
kernel_test = pytest.mark.skipif(not (CUDA or INTERPRETED), reason="needs a GPU or TRITON_INTERPRET=1")
gpu_test = pytest.mark.skipif(not CUDA, reason="needs a GPU")


def scan_loop(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False) -> Tensor:
    """The definition (Gu & Dao 2023, algorithm 2), one step after the other."""
    if delta_bias is not None:
        delta = delta + delta_bias[:, None]
    if delta_softplus:
        delta = torch.nn.functional.softplus(delta)
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for u_t, delta_t, B_t, C_t in zip(u.unbind(2), delta.unbind(2), B.unbind(2), C.unbind(2), strict=True):
        h = torch.exp(delta_t[..., None] * A) * h + (delta_t * u_t)[..., None] * B_t[:, None]
        ys.append((h * C_t[:, None]).sum(-1))
    y = torch.stack(ys, -1)
    if D is not None:
        y = y + u * D[:, None]
    return y if z is None else y * z * torch.sigmoid(z)


def make_inputs(b, d, n, L, dtype=torch.float32, without=(), softplus=True) -> list[Tensor | None]:
    delta = torch.randn(b, d, L) if softplus else 0.5 * torch.rand(b, d, L)
    bias = torch.randn(d) if softplus else 0.1 * torch.rand(d)
    big = {"u": torch.randn(b, d, L), "delta": delta, "B": torch.randn(b, n, L), "C": torch.randn(b, n, L)}
    big = {name: x.to(DEVICE, dtype) for name, x in (big | {"z": torch.randn(b, d, L)}).items()}
    small = {"A": -4 * torch.rand(d, n) - 0.01, "D": torch.randn(d), "delta_bias": bias}
    values = big | {name: x.to(DEVICE) for name, x in small.items()}
    return [None if name in without else values[name].requires_grad_() for name in NAMES]


def errors(inputs, scan, softplus=True, reference=scan_loop) -> dict[str, float]:
    """Largest error of y and of every gradient against `reference` in float64, as a share of the largest value."""
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    y, wanted = scan(*inputs, softplus), reference(*exact, softplus)
    dy = torch.randn(y.shape, device=y.device).to(y.dtype)
    y.backward(dy)
    wanted.backward(dy.double())
    assert y.dtype == inputs[0].dtype and y.shape == inputs[0].shape
    pairs = {"y": (y, wanted)}
    for name, x, e in zip(NAMES, inputs, exact, strict=True):
        if x is not None:
            assert x.grad.dtype == x.dtype and x.grad.shape == x.shape, name
            pairs[name] = (x.grad, e.grad)
    share = {}
    for name, (got, want) in pairs.items():
        assert torch.isfinite(got).all(), f"{name} is not finite"
        share[name] = ((got.double() - want).abs().max() / want.abs().max().clamp_min(1e-3)).item()
    return share


def check(scan, *shape, limit=1e-5, **options):
    seed = torch.seed()  # fresh inputs each time
    worst = errors(make_inputs(*shape, **options), scan, options.get("softplus", True))
    assert max(worst.values()) < limit, f"seed {seed}: {worst}"


@pytest.fixture
def module(monkeypatch):
    """The kernels' module; what it allocates is NaN, so that a number nobody wrote shows."""
    from u2mamba.fast import selective_scan

    empty = torch.empty

    @torch.no_grad()
    def poisoned(*args, **options):
        return empty(*args, **options).fill_(float("nan"))

    monkeypatch.setattr(torch, "empty", poisoned)
    return selective_scan


def use(module, monkeypatch, tile, groups=None):
    tiles = module.Tiles(tile, tile, tile, groups)
    monkeypatch.setattr(module, "TABLE", ((float("inf"), tiles),))


@pytest.mark.skipif(CUDA, reason="the GPU runs the same tests, on the kernels themselves")
def test_interpreted():
    """Runs the tests marked `kernel_test` in an interpreter process, on the CPU."""
    if INTERPRETED:
        pytest.skip("this is that process")
    env = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, env=env, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert " passed" in done.stdout


@kernel_test
@pytest.mark.parametrize(
    ("shape", "tile", "groups", "options"),
    [
        ((1, 3, 2, 37), (4, 8, 2), None, {}),  # two chunks, the last one odd; a block of rows with one to spare
        ((2, 9, 2, 32), (4, 8, 1), 1, {"without": ("delta_bias",)}),  # three parts of dB and dC
        ((1, 10, 1, 40), (4, 8, 1), 2, {"dtype": torch.bfloat16, "limit": 1e-2}),  # 2 groups: sums in scratch memory
        ((1, 2, 2, 19), (2, 16, 1), None, {"without": ("D", "z", "delta_bias"), "softplus": False}),
        ((2, 2, 3, 1), (2, 16, 1), None, {"without": ("D",)}),
        ((1, 1, 1, 33), (3, 32, 1), None, {"without": ("z",), "dtype": torch.float16, "limit": 2e-3}),
        ((1, 37, 1, 7), (1, 32, 1), 1, {}),  # 37 parts of dB and dC: more than are added up at once
    ],
)
def test_agrees_with_loop(module, monkeypatch, shape, tile, groups, options):
    """fp32: about 1e-6 is seen (ex2.approx is good to 2e-7); bf16 and fp16: results are rounded to 4e-3 and 5e-4."""
    use(module, monkeypatch, tile, groups)
    check(module.selective_scan_triton, *shape, **options)


@kernel_test
def test_strides(module, monkeypatch):
    """Slices, transposed tensors and an expanded gradient give what their copies give, without being copied."""
    use(module, monkeypatch, (2, 16, 1))
    u, delta, A, B, C, D, z, bias = (x.detach() for x in make_inputs(2, 2, 2, 20))
    wide = torch.cat([u, z], 1)  # (b, 2 d, L), as in_proj makes it
    views = [wide[:, :2], delta.transpose(1, 2).contiguous().transpose(1, 2), A, B, C, D, wide[:, 2:], bias]
    results = []
    for inputs in ([u, delta, A, B, C, D, z, bias], views):
        inputs = [x.detach().requires_grad_() for x in inputs]
        y = module.selective_scan_triton(*inputs, True)
        results.append([y, *torch.autograd.grad(y.sum(), inputs)])  # the gradient of a sum has strides 0
    assert not views[1].is_contiguous() and not views[0].is_contiguous()
    for name, got, want in zip(("y", *NAMES), results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6, msg=name)


def chunked_loop(u, delta, A, B, C, D, z, delta_bias, softplus) -> Tensor:
    """`scan_loop` in closed form over chunks of 64 steps, float64, every chunk computed again in the backward pass."""

    def chunk(h, u, delta, B, C):
        total = torch.cumsum(delta, -1)  # (b, d, 64)
        since = (total[:, :, :, None] - total[:, :, None, :]).clamp_min(0.0)
        decay = torch.exp(since[..., None] * A[:, None, None, :])
        mask = torch.ones(u.shape[2], u.shape[2], device=u.device, dtype=torch.bool).tril()
        decay = decay.masked_fill(~mask[..., None], 0.0)
        states = torch.einsum("bdtsn,bds,bns->bdtn", decay, delta * u, B)
        states = states + torch.exp(total[..., None] * A[:, None]) * h[:, :, None]
        return torch.einsum("bdtn,bnt->bdt", states, C), states[:, :, -1]

    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h = u.new_zeros(*u.shape[:2], A.shape[1])
    ys = []
    for parts in zip(*(x.split(64, 2) for x in (u, delta, B, C)), strict=True):
        y, h = torch.utils.checkpoint.checkpoint(chunk, h, *parts, use_reentrant=False)
        ys.append(y)
    return (torch.cat(ys, 2) + u * D[:, None]) * torch.nn.functional.silu(z)


@gpu_test
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("b", "d", "L"), [(2, 512, 81), (2, 512, 324), (2, 64, 1296), (1, 64, 5183), (1, 64, 82944)])
def test_real_sizes(module, b, d, L, dtype):
    seed = torch.seed()
    worst = errors(make_inputs(b, d, 16, L, dtype), module.selective_scan_triton, reference=chunked_loop)
    assert max(worst.values()) < (2e-5 if dtype == torch.float32 else 1e-2), f"seed {seed}: {worst}"
