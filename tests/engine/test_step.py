"""The script's losses by hand; the training step against a plain loop, and what it leaves unchanged."""

import math
from functools import partial

import pytest
import torch
from torch import nn

import u2mamba_train as script
from tests.engine.tiny import Net, NetWithoutNorm, batch
from u2mamba.engine.parameters import param_groups_weight_decay
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import UserError

try:
    from u2mamba import fast

    KINDS = [TrainStep, fast.TrainStep]
except ImportError:
    KINDS = [TrainStep]
CPU = Environment(torch.device("cpu"))
both_steps = pytest.mark.parametrize("kind", KINDS)


def make(net, loss=script.multi_bce_loss_fusion, kind=TrainStep, fused=True, optimizer=None, **options):
    optimizer = optimizer or torch.optim.Adam(net.parameters(), lr=1e-2, fused=fused)
    return kind(net, optimizer, loss, CPU, **options)


def weights(net):
    return {k: v.clone() for k, v in net.state_dict().items() if "num_batches" not in k}


def same(net, before, prefix=""):
    return all(torch.equal(value, before[key]) for key, value in weights(net).items() if key.startswith(prefix))


# ------- the loss of the script


def test_bce_by_hand():
    logits = tuple(torch.full((1, 1, 1, 2), float(i)) for i in range(7))
    masks = torch.tensor([1.0, 0.25]).view(1, 1, 1, 2)
    expected = []
    for z in range(7):
        p = 1 / (1 + math.exp(-z))
        expected.append(-(math.log(p) + 0.25 * math.log(p) + 0.75 * math.log(1 - p)) / 2)
    assert script.multi_bce_loss_fusion(logits, masks).tolist() == pytest.approx(expected, rel=1e-5)
    wrong = script.multi_bce_loss_fusion((torch.full((1, 1, 2, 2), -200.0),) * 7, torch.ones(1, 1, 2, 2))
    assert wrong.tolist() == pytest.approx([200.0] * 7)


def test_edge_weights_by_hand():
    g = torch.Generator().manual_seed(0)
    masks, logits = (torch.rand(2, 1, 40, 37, generator=g) > 0.5).float(), torch.randn(7, 2, 1, 40, 37, generator=g)
    expected = torch.empty_like(masks)
    for y in range(40):
        for x in range(37):
            around = masks[..., max(y - 15, 0) : y + 16, max(x - 15, 0) : x + 16]
            expected[..., y, x] = 5 * (around.mean((2, 3)) - masks[..., y, x]).abs()
    bce = nn.functional.binary_cross_entropy_with_logits(logits, masks.expand(7, -1, -1, -1, -1), reduction="none")
    got = script.multi_bce_loss_fusion(tuple(logits), masks, 1 + 2 * script.edge_weights(masks))
    assert torch.allclose(got, ((1 + 2 * expected) * bce).mean((1, 2, 3, 4)), rtol=1e-5)
    assert script.edge_weights(torch.ones_like(masks)).max() == 0  # no edge, no weight


def test_soft_iou_by_hand():
    masks = torch.zeros(2, 1, 2, 2)
    masks[0, 0, 0] = 1  # two of four pixels; the second image has no object
    sure = torch.where(masks > 0, 30.0, -30.0)
    loss = script.soft_iou_loss((sure, -sure, torch.zeros_like(masks)), masks)
    # each image: 1 - (intersection + 1) / (union + 1)
    assert torch.allclose(loss, torch.tensor([0, (4 / 5 + 4 / 5) / 2, ((1 - 2 / 4) + (1 - 1 / 3)) / 2]), atol=1e-6)


# ------- the step


@both_steps
@pytest.mark.parametrize("fused", [True, False])
def test_steps_equal_the_plain_loop(kind, fused):
    net, plain = Net(), Net()
    step = make(net, kind=kind, fused=fused)
    optimizer = torch.optim.Adam(plain.parameters(), lr=1e-2)
    losses = []
    for i in range(5):
        images, masks = batch(i)
        step(images, masks)
        optimizer.zero_grad()
        parts = [nn.functional.binary_cross_entropy(torch.sigmoid(d), masks) for d in plain(images, logits=True)]
        losses.append([p.item() for p in parts])
        sum(parts).backward()
        optimizer.step()
    assert all(torch.allclose(value, plain.state_dict()[key], atol=1e-5) for key, value in net.state_dict().items())
    means = step.read()
    assert means.losses == pytest.approx(torch.tensor(losses).mean(0).tolist(), abs=1e-5)
    assert means.loss == pytest.approx(sum(means.losses))
    assert (means.steps, means.nonfinite_steps) == (5, 0)
    step.reset()
    assert math.isnan(step.read().loss)


def sum_of(logits, masks):
    return script.multi_bce_loss_fusion(logits, masks).sum()


def d0_alone(logits, masks):
    return script.multi_bce_loss_fusion(logits[:1], masks)


def tar_and_loss(logits, masks):
    losses = script.multi_bce_loss_fusion(logits, masks)
    return losses[0], losses.sum()


@both_steps
def test_the_step_takes_what_a_loss_returns(kind):
    losses = script.multi_bce_loss_fusion, sum_of, tar_and_loss, d0_alone
    steps = [make(Net(), loss, kind=kind) for loss in losses]
    for step in steps:
        step(*batch())
    per_output, number, pair, one = (step.read() for step in steps)
    assert number.losses == [number.loss] == [pytest.approx(per_output.loss)]
    assert pair.loss == pytest.approx(per_output.loss) and pair.losses == [pytest.approx(per_output.losses[0])]
    assert pair.tar == per_output.tar == pytest.approx(one.loss)
    trained = [step.net.conv.weight for step in steps]
    assert [torch.equal(trained[0], other) for other in trained[1:]] == [True, True, False]


class OneOutput(nn.Sequential):
    """Spectral norm updates buffers that autograd has read."""

    def forward(self, x, logits=False):
        return super().forward(x) if self[0].training else {"d0": super().forward(x)}


@both_steps
@pytest.mark.parametrize("training", [True, False])
def test_a_network_of_one_output_with_spectral_norm(kind, training):
    normed = nn.utils.parametrizations.spectral_norm
    net = OneOutput(normed(nn.Conv2d(3, 4, 1)), normed(nn.Conv2d(4, 1, 1))).train(training)
    step = make(net, partial(script.total_loss, cfg=script.Config(iou_weight=1.0)), kind, ema_decay=0.5)
    for i in range(2):
        step(*batch(i))
    assert 0 < step.read().iou < 1 and len(step.read().losses) == 1


@pytest.mark.parametrize(
    ("loss", "says"),
    [
        (lambda logits, masks: None, "a NoneType"),
        (lambda logits, masks: torch.stack(logits), r"a tensor \(7, 4, 1, 8, 8\)"),
        (lambda logits, masks: [d.sum() for d in logits], "a list"),
        (lambda logits, masks: logits[0].sum().detach(), r"a tensor \(\) without a gradient"),
    ],
)
def test_another_result_of_a_loss_is_named(loss, says):
    loss.__name__ = "my_loss"
    with pytest.raises(UserError, match=f"the loss my_loss returned {says}: it must return a number"):
        make(Net(), loss)(*batch())


@both_steps
@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(kind, poison, fused):
    step = make(Net(), kind=kind, fused=fused, grad_clip=1.0)
    step(*batch(0))
    before, means = weights(step.net), step.read()
    moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
    images, masks = batch(1)
    images[0, 0, 0, 0] = poison
    step(images, masks)
    step(images, masks)
    assert same(step.net, before)
    assert all(torch.equal(m, s["exp_avg"]) for m, s in zip(moments, step.optimizer.state.values(), strict=True))
    skipped = step.read()
    assert (skipped.nonfinite_steps, skipped.consecutive_nonfinite, skipped.steps) == (2, 2, 1)
    assert skipped.loss == means.loss and skipped.nonfinite[0] == "d0, d1, d2, d3, d4, d5, d6"
    step(*batch(2))
    good = step.read()
    assert (good.nonfinite_steps, good.consecutive_nonfinite, good.steps) == (2, 0, 2)


def test_clipping_bounds_the_step():
    net = Net()
    step = make(net, optimizer=torch.optim.SGD(net.parameters(), lr=1.0, fused=True), grad_clip=0.01)
    before = [p.detach().clone() for p in net.parameters()]
    step(*batch())
    moved = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in zip(before, net.parameters(), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_averaged_weights_are_the_weighted_mean_of_all_steps():
    net = Net()
    step, seen = make(net, ema_decay=0.5), []
    assert step.ema_model() is net
    for i in range(3):
        step(*batch(i))
        seen.append((net.conv.weight.detach().clone(), net.bn.running_mean.clone()))
    averaged = step.ema_model()
    for got, which in ((averaged.conv.weight, 0), (averaged.bn.running_mean, 1)):
        expected = sum(w * s[which] for w, s in zip((0.125, 0.25, 0.5), seen, strict=True)) / 0.875
        assert torch.allclose(got, expected, atol=1e-6)


@both_steps
def test_frozen_layers_stay_and_learn_again(kind):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Net(), nn.Conv2d(7, 2, 1)

        def forward(self, x, logits=False):
            return self.second(torch.cat(self.first(x, logits=True), 1)).split(1, 1)

    net = Two()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.1, fused=True)
    step = make(net, kind=kind, optimizer=optimizer, ema_decay=0.9)
    step(*batch(0))
    net.first.requires_grad_(False).eval()
    before, second = weights(net.first), net.second.weight.detach().clone()
    for i in range(3):
        step(*batch(i))
    assert same(net.first, before) and same(step.ema_model().first, before)
    assert all(p.grad is None for p in net.first.parameters()) and not torch.equal(net.second.weight, second)
    net.first.requires_grad_(True).train()
    step(*batch(4))
    assert all(not torch.equal(value, before[key]) for key, value in weights(net.first).items())
    average = step.ema_model().first.conv.weight  # begins where the weights were
    assert (average - before["conv.weight"]).norm() < (net.first.conv.weight - before["conv.weight"]).norm()


def test_a_parameter_that_never_gets_a_gradient_is_left_alone():
    net = NetWithoutNorm()
    step = make(net, optimizer=torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0.5, fused=True))
    for i in range(2):
        step(*batch(i))
    assert net.bn.weight.grad is None and torch.equal(net.bn.weight, torch.ones(7))


@both_steps
def test_state_resumes_exactly_also_with_another_number_of_losses(kind):
    whole, half, resumed = (make(Net(), kind=kind, ema_decay=0.9) for _ in range(3))
    for i in range(4):
        whole(*batch(i))
    for i in range(2):
        half(*batch(i))
    resumed.net.load_state_dict(half.net.state_dict())
    resumed.load_state_dict(half.state_dict())
    for i in range(2, 4):
        resumed(*batch(i))
    assert same(whole.net, resumed.net.state_dict())
    assert same(whole.ema_model(), resumed.ema_model().state_dict())
    one, other = whole.read(), resumed.read()
    assert (one.loss, one.losses, one.iou, one.steps) == (other.loss, other.losses, other.iou, other.steps)
    edited = make(Net(), d0_alone, kind=kind, ema_decay=0.9995)
    edited.load_state_dict(half.state_dict())
    for a, b in zip(half.ema_model().parameters(), edited.ema_model().parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-4)  # another decay: the same average
    edited(*batch(2))
    assert edited.read().steps == 1


def test_no_decay_for_norms_biases_and_the_scan():
    net = script.build_model({"arch": "u2mambap"})
    decayed, others = param_groups_weight_decay(net)
    names = {id(p): n for n, p in net.named_parameters()}
    decayed, others = ({names[id(p)] for p in g["params"]} for g in (decayed, others))
    assert {"stage1.rebnconvin.conv_s1.weight", "stage1.mamba7.mamba.in_proj.weight"} <= decayed
    assert {"stage1.rebnconvin.bn_s1.weight", "stage1.mamba7.mamba.A_log", "stage1.mamba7.mamba.D"} <= others
    assert len(decayed) + len(others) == len(names)


@both_steps
@pytest.mark.parametrize("parts", [2, 3, 5])  # 5 images: parts of 3 and 2, of 2, 2 and 1, and of one each
def test_micro_batches_are_the_same_step(kind, parts):
    steps = make(NetWithoutNorm()), make(NetWithoutNorm(), kind=kind, grad_accum_steps=parts)
    for i in range(3):
        for step in steps:
            step(*batch(i, n=5))
    one, other = (step.net.conv.weight for step in steps)
    assert torch.allclose(one, other, atol=1e-6) and not torch.equal(one, NetWithoutNorm().conv.weight)
    one, other = (step.read() for step in steps)
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    assert (other.iou, other.steps) == (pytest.approx(one.iou), one.steps)


@pytest.mark.parametrize(("parts", "says"), [(1, "try grad_accum_steps = 2 or batch_size_train = 2"),
                                             (4, "of cpu: try batch_size_train = 2")])  # fmt: skip
def test_out_of_memory_suggests_a_smaller_batch(parts, says):
    def no_memory(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    step = make(Net(), no_memory, grad_accum_steps=parts)
    with pytest.raises(UserError) as error:
        step(*batch(n=4))
    assert "a batch of 4 does not fit into the memory of cpu" in str(error.value) and says in str(error.value)
