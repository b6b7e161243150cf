"""The fast step (bf16, channels_last, fused kernels, CUDA graph) against the plain one, on a GPU."""

import math

import pytest
import torch

from model import U2MAMBAP
from tests.engine.test_step import script
from u2mamba.engine.step import EAGER_STEPS, TrainStep
from u2mamba.fast import multi_loss

CUDA = torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not CUDA, reason="needs a GPU")
DEVICE = torch.device("cuda", 0)


def make(precision="fp32", kernels=False, graph=False, norm_at="none", **options):
    torch.manual_seed(0)
    net = U2MAMBAP(mamba_norm=norm_at)
    net.to(DEVICE, memory_format=torch.channels_last if kernels else torch.contiguous_format)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-3, fused=True)
    loss = multi_loss if kernels else script.multi_bce_loss_fusion
    return TrainStep(net, optimizer, loss, DEVICE, precision, kernels=kernels, graph=graph, **options)


def batch(seed, n=4, size=96):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, 3, size, size, generator=generator).to(DEVICE)
    masks = (torch.rand(n, 1, size // 8, size // 8, generator=generator) > 0.6).float()
    return images, torch.nn.functional.interpolate(masks, scale_factor=8).to(DEVICE)


def test_the_graph_computes_what_the_eager_step_computes():
    eager, graphed = make(), make(graph=True)
    for i in range(EAGER_STEPS + 4):
        for step in (eager, graphed):
            step(*batch(i))
    assert graphed.graph is not None
    a, b = eager.read(), graphed.read()
    assert a.steps == b.steps == EAGER_STEPS + 4
    # cuDNN adds up weight gradients in no fixed order, and seven steps of training amplify it: 1.4e-3 was seen
    assert b.loss == pytest.approx(a.loss, rel=5e-3)
    assert b.iou == pytest.approx(a.iou, abs=0.02)


def cosines(step, reference):
    """Cosine of each parameter's gradient after one batch with that of `reference`, but where batch norm cancels it."""
    for s in (step, reference):
        s.set_learning_rate(0.0)
        s(*batch(1))
    pairs = zip(step.net.named_parameters(), reference.net.parameters(), strict=True)
    kept = [(p.grad.flatten(), q.grad.flatten()) for (name, p), q in pairs if not name.endswith("conv_s1.bias")]
    return torch.tensor([torch.nn.functional.cosine_similarity(p, q, 0) for p, q in kept if q.norm() > 1e-5])


def test_gradients_are_as_close_to_fp32_as_those_of_autocast():
    """An untrained network multiplies rounding: PyTorch's own bf16 autocast leaves a median cosine of 0.24 to 0.47
    (measured on a CPU), so that is the yardstick and not 1. test_networks compares the fused layers in fp32."""
    autocast, fast = cosines(make("bf16"), make()), cosines(make("bf16", kernels=True), make())
    assert fast.median() > autocast.median() - 0.1
    assert fast.quantile(0.1) > autocast.quantile(0.1) - 0.15


@pytest.mark.parametrize("norm_at", ["none", "gate"])
def test_the_fast_step_learns_as_the_plain_one(norm_at):
    plain, fast = make(norm_at=norm_at), make("bf16", kernels=True, graph=True, norm_at=norm_at)
    for i in range(60):
        for step in (plain, fast):
            step(*batch(i % 6))
    assert fast.read().loss == pytest.approx(plain.read().loss, rel=0.02)


def test_learning_rate_changes_without_a_new_capture():
    step = make(graph=True)
    for i in range(EAGER_STEPS + 2):
        step(*batch(i))
    graph = step.graph
    step.set_learning_rate(0.0)
    before = [p.detach().clone() for p in step.net.parameters()]
    step(*batch(9))
    assert step.graph is graph
    assert all(torch.equal(a, b) for a, b in zip(before, step.net.parameters(), strict=True))
    step.set_learning_rate(1e-3)
    step(*batch(10))
    assert any(not torch.equal(a, b) for a, b in zip(before, step.net.parameters(), strict=True))


@pytest.mark.parametrize("kernels", [False, True])
def test_a_bad_batch_inside_the_graph_changes_nothing(kernels):
    step = make("bf16" if kernels else "fp32", kernels=kernels, graph=True, ema_decay=0.9, clip=1.0)
    for i in range(EAGER_STEPS + 2):
        step(*batch(i))
    before = {k: v.clone() for k, v in step.net.state_dict().items() if "num_batches" not in k}
    images, masks = batch(9)
    images[0, 0, 0, 0] = math.nan
    step(images, masks)
    for key, value in before.items():
        assert torch.equal(value, step.net.state_dict()[key]), key
    means = step.read()
    assert (means.bad_steps, means.bad_in_a_row, means.steps) == (1, 1, EAGER_STEPS + 2)
    step(*batch(10))
    assert step.read().bad_in_a_row == 0


def test_a_smaller_last_batch_and_then_the_graph_again():
    step = make("bf16", kernels=True, graph=True)
    for i in range(EAGER_STEPS + 2):
        step(*batch(i))
    step(*batch(20, n=3))
    step(*batch(21))
    means = step.read()
    assert means.steps == EAGER_STEPS + 4 and math.isfinite(means.loss)


@pytest.mark.parametrize("kernels", [False, True])
def test_a_batch_in_parts_through_the_graph(kernels):
    options = {"precision": "bf16" if kernels else "fp32", "kernels": kernels}
    eager, graphed = make(**options, accumulate=2), make(**options, graph=True, accumulate=2)
    for i in range(EAGER_STEPS + 4):
        for step in (eager, graphed):
            step(*batch(i))
    assert graphed.graph is not None
    a, b = eager.read(), graphed.read()
    assert b.loss == pytest.approx(a.loss, rel=5e-3) and a.steps == b.steps  # as of whole batches, above
    half = make(**options)  # the two halves by hand, each a step that does not move
    half.net.load_state_dict(graphed.net.state_dict())
    for step in (half, graphed):
        step.set_learning_rate(0.0)
    images, masks = batch(9)
    halves = []
    for x, y in zip(images.chunk(2), masks.chunk(2), strict=True):
        half(x, y)
        halves.append([p.grad for p in half.net.parameters()])
    graphed(images, masks)
    compared = 0
    for a, b, p in zip(*halves, graphed.net.parameters(), strict=True):
        if a is not None and (a + b).norm() > 1e-3:  # batch norm cancels a bias before it
            assert torch.nn.functional.cosine_similarity((a + b).flatten(), 2 * p.grad.flatten(), 0) > 0.99
            compared += 1
    assert compared > 200


def test_state_goes_on_from_a_graphed_run():
    step = make(graph=True)
    for i in range(EAGER_STEPS + 3):
        step(*batch(i))
    other = make(graph=True)
    other.net.load_state_dict(step.net.state_dict())
    other.load_state_dict(step.state_dict())
    for i in range(6):
        for s in (step, other):
            s(*batch(30 + i))
    assert other.read().loss == pytest.approx(step.read().loss, rel=1e-3)


def test_smaller_last_batches_take_memory_once():
    step = make(graph=True)
    for i in range(EAGER_STEPS + 2):
        step(*batch(i))
    taken = [torch.cuda.memory_reserved(DEVICE)]
    for i in range(8):
        step(*batch(i, n=3))
        step(*batch(i))
        taken.append(torch.cuda.memory_reserved(DEVICE))
    assert taken[-1] - taken[2] <= taken[1] - taken[0], taken  # six more together no more than the first
