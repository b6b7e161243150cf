"""The selective scan: the PyTorch backends against the loop in float64, values and all gradients.

The tolerance of 1e-5 on the relative norm is thirty times the largest error of fp32 rounding measured here (4e-7).
"""

import pytest
import torch

from model import chunked_scan, selective_scan

scan = selective_scan.selective_scan
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
FORMS = ("reference", "torch", "export")


def make(b=2, d=3, L=65, n=5, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(b, d, L), (b, d, L), (d, n), (b, n, L), (b, n, L), (d,), (b, d, L), (d,)]
    tensors = dict(zip(NAMES, (torch.randn(s, generator=generator) for s in shapes), strict=True))
    tensors["A"] = -tensors["A"].exp()
    tensors["delta_bias"] -= 2
    return {k: v.to(dtype) for k, v in tensors.items()}


def run(inputs, form="torch", softplus=True):
    """The output and the gradients of all inputs, for a fixed gradient of the output."""
    leaves = {k: v.clone().requires_grad_() for k, v in inputs.items()}
    with pytest.MonkeyPatch.context() as patch:
        if form == "export":
            patch.setattr(chunked_scan, "scan", chunked_scan.traceable_scan)
        y = scan(**leaves, delta_softplus=softplus, backend="reference" if form == "reference" else "torch")
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).bfloat16().to(y.dtype)  # exact in each dtype
    grads = torch.autograd.grad(y, leaves.values(), dy, materialize_grads=True)
    return dict(zip(("y", *leaves), (y.detach(), *grads), strict=True))


def double(inputs):
    return {k: v.double() for k, v in inputs.items()}


def assert_close(got, wanted, limit):
    for name, value in wanted.items():
        assert torch.isfinite(got[name]).all(), name
        error = (got[name].double() - value).norm().item()
        assert error <= limit * value.norm().item() + 1e-30, f"{name}: {error / value.norm().item():.1e}"


@pytest.mark.parametrize("rate", [1, 1e5, 30, 1e-6])  # 1e5 forgets at once, 30 underflows in a chunk, 1e-6 remembers
@pytest.mark.parametrize("L", [1, 2, 15, 64, 257, 1000])
@pytest.mark.parametrize("form", FORMS)
def test_agrees_with_float64(form, L, rate):
    inputs = make(L=L)
    inputs["A"] = inputs["A"] * rate
    assert_close(run(inputs, form), run(double(inputs), "reference"), 1e-5)


def test_many_blocks(monkeypatch):
    """Blocks of several lanes, of one lane, and a last block that is not full."""
    inputs = make(L=151)
    wanted = run(double(inputs), "reference")
    for lanes, steps in ((4, 8), (1, 8), (3, 1), (2, 5)):
        monkeypatch.setattr(chunked_scan, "_block_shape", lambda u, n, shape=(lanes, steps): shape)
        assert_close(run(inputs), wanted, 1e-5)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("left_out", [(), ("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
def test_optional_arguments(left_out, softplus):
    positive = () if softplus else ("delta", "delta_bias")
    inputs = {k: v.abs() if k in positive else v for k, v in make().items() if k not in left_out}
    wanted = run(double(inputs), "reference", softplus)
    for form in FORMS:
        assert_close(run(inputs, form, softplus), wanted, 1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_bf16_inputs_are_rounded_only_at_the_end(form):
    """State in fp32: the error against float64 is at most that of one rounding to bf16, 2⁻⁸ relative."""
    inputs = make(L=257, dtype=torch.bfloat16)
    got = run(inputs, form)
    assert all(v.dtype == torch.bfloat16 for v in got.values())
    assert_close(got, run(double(inputs), "reference"), 2**-8)


def test_memory_has_no_term_of_all_states():
    """The largest allocation of forward and backward is far below b·d·L·n; here that would be 33.6 MB."""
    b, d, L, n = 1, 32, 16384, 16
    inputs = make(b, d, L, n)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(inputs)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert 4 * b * d * L <= largest < 4 * b * d * L * n / 4


def test_exported_graph_is_plain_and_small():
    class Scan(torch.nn.Module):
        def forward(self, *v):
            return scan(*v, delta_softplus=True)

    for L in (324, 5184):
        inputs = tuple(make(1, 2, L, 16).values())
        program = torch.export.export(Scan(), inputs)
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        assert len(calls) < 450 and all("aten" in str(n.target) or "getitem" in str(n.target) for n in calls)
        wanted = scan(*inputs, delta_softplus=True, backend="reference")
        torch.testing.assert_close(program.module()(*inputs), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "shape", "says"),
    [
        ("delta", (2, 3, 64), "delta must be (2, 3, 65) to fit u (2, 3, 65), got (2, 3, 64)"),
        ("A", (4, 5), "A must be (3, 5)"),
        ("B", (2, 65, 5), "B must be (2, 5, 65)"),
        ("D", (5,), "D must be (3,)"),
        ("u", (3, 65), "u must be (b, d, L)"),
        ("u", (2, 3, 0), "no dimension zero"),
    ],
)
def test_shapes_that_do_not_fit(name, shape, says):
    with pytest.raises(ValueError) as caught:
        scan(**make() | {name: torch.zeros(shape)})
    assert says in str(caught.value) and "\n" not in str(caught.value)


def test_backends_that_are_registered(monkeypatch):
    """The first that works on a CUDA device; the reason of each that does not; explicit ones by name anywhere."""
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(selective_scan, "REGISTERED", {})
    choose = selective_scan.choose_backend
    assert choose(gpu)[0] == choose("cpu")[0] == "torch"
    assert choose("cpu", "reference")[0] == "reference"
    with pytest.raises(ValueError, match=r"choose one of auto, reference, torch$"):
        scan(**make(), backend="first")
    selective_scan.REGISTERED["first"] = (scan, lambda device: "" if device == gpu else "it requires a GPU")
    selective_scan.REGISTERED["second"] = (lambda *inputs: scan(*inputs) + 1, lambda device: "")
    for device in (gpu, "cuda", "cuda:0"):
        assert choose(device) == ("first", "the fastest that works here")
    assert choose("cpu")[0] == "torch"
    assert choose(torch.device("cuda", 1)) == ("second", "the fastest that works here; not first: it requires a GPU")
    with pytest.raises(ValueError, match="backend='first' cannot be used here: it requires a GPU"):
        scan(**make(), backend="first")
    inputs = make() | {"delta_softplus": True}
    assert torch.equal(scan(**inputs, backend="second"), scan(**inputs) + 1)
