"""The training step: losses by hand, what it leaves alone, averaged weights, equality with the plain loop."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from u2mamba.engine.step import TrainStep
from u2mamba.runtime.errors import UserError

spec = importlib.util.spec_from_file_location("u2mamba_train", Path(__file__).parents[2] / "u2mamba_train.py")
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)


class Net(nn.Module):
    """Seven outputs, batch norm, nothing else: a network small enough to follow by hand."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 7, 3, padding=1, bias=False)  # before batch norm a bias has rounding for a gradient
        self.bn = nn.BatchNorm2d(7)

    def forward(self, x, logits=False):
        d = self.bn(self.conv(x)).split(1, 1)
        return d if logits else tuple(torch.sigmoid(v) for v in d)


def batch(seed=0, n=4):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 8, 8, generator=g), (torch.rand(n, 1, 8, 8, generator=g) > 0.5).float()


def make(net, **options):
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2, fused=True)
    return TrainStep(net, optimizer, script.multi_bce_loss_fusion, torch.device("cpu"), **options)


def test_loss_equals_the_formula_by_hand():
    logits = tuple(torch.full((1, 1, 1, 2), float(i)) for i in range(7))
    masks = torch.tensor([1.0, 0.25]).view(1, 1, 1, 2)
    expected = []
    for z in range(7):
        p = 1 / (1 + math.exp(-z))
        expected.append(-(math.log(p) + 0.25 * math.log(p) + 0.75 * math.log(1 - p)) / 2)
    assert script.multi_bce_loss_fusion(logits, masks).tolist() == pytest.approx(expected, rel=1e-5)


def test_loss_of_certain_and_wrong_is_finite():
    wrong = script.multi_bce_loss_fusion((torch.full((1, 1, 2, 2), -200.0),) * 7, torch.ones(1, 1, 2, 2))
    assert wrong.tolist() == pytest.approx([200.0] * 7)


def test_steps_equal_the_plain_loop():
    net, plain = Net(), Net()
    step = make(net)
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
    for a, b in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.allclose(a, b, atol=1e-5)
    means = step.read()
    assert means.losses == pytest.approx(torch.tensor(losses).mean(0).tolist(), abs=1e-5)
    assert means.loss == pytest.approx(sum(means.losses))
    assert means.steps == 5 and means.bad_steps == 0


def test_means_start_again_after_reset():
    step = make(Net())
    step(*batch(0))
    step.reset()
    assert math.isnan(step.read().loss)
    step(*batch(1))
    assert step.read().steps == 1


@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_a_bad_step_changes_nothing_and_is_counted(poison):
    net = Net()
    step = make(net)
    step(*batch(0))
    before = {k: v.clone() for k, v in net.state_dict().items() if "num_batches" not in k}
    moments = [s["exp_avg"].clone() for s in step.optimizer.state.values()]
    means = step.read()
    images, masks = batch(1)
    images[0, 0, 0, 0] = poison
    step(images, masks)
    step(images, masks)
    for key, value in before.items():
        assert torch.equal(value, net.state_dict()[key]), key
    for old, new in zip(moments, step.optimizer.state.values(), strict=True):
        assert torch.equal(old, new["exp_avg"])
    bad = step.read()
    assert (bad.bad_steps, bad.bad_in_a_row, bad.steps) == (2, 2, 1)
    assert bad.loss == means.loss
    step(*batch(2))
    good = step.read()
    assert (good.bad_steps, good.bad_in_a_row, good.steps) == (2, 0, 2)
    assert math.isfinite(good.loss)


def test_clipping_bounds_the_step():
    net = Net()
    step = TrainStep(
        net,
        torch.optim.SGD(net.parameters(), lr=1.0, fused=True),
        script.multi_bce_loss_fusion,
        torch.device("cpu"),
        clip=0.01,
    )
    before = [p.detach().clone() for p in net.parameters()]
    step(*batch())
    moved = math.sqrt(sum((a - b).pow(2).sum().item() for a, b in zip(before, net.parameters(), strict=True)))
    assert moved == pytest.approx(0.01, rel=1e-3)


def test_averaged_weights_are_the_weighted_mean_of_all_steps():
    net = Net()
    step = make(net, ema_decay=0.5)
    seen = []
    for i in range(3):
        step(*batch(i))
        seen.append((net.conv.weight.detach().clone(), net.bn.running_mean.clone()))
    weights = [0.125, 0.25, 0.5]
    kept = step.averaged()
    for got, which in ((kept.conv.weight, 0), (kept.bn.running_mean, 1)):
        expected = sum(w * s[which] for w, s in zip(weights, seen, strict=True)) / sum(weights)
        assert torch.allclose(got, expected, atol=1e-6)
    assert not torch.equal(kept.conv.weight, net.conv.weight)


def test_without_average_the_network_itself_is_kept():
    net = Net()
    step = make(net)
    step(*batch())
    assert step.averaged() is net


def test_state_goes_on_exactly():
    one, other = Net(), Net()
    step = make(one, ema_decay=0.9)
    for i in range(4):
        step(*batch(i))
    half = make(Net(), ema_decay=0.9)
    for i in range(2):
        half(*batch(i))
    resumed = make(other, ema_decay=0.9)
    other.load_state_dict(half.net.state_dict())
    resumed.load_state_dict(half.state_dict())
    for i in range(2, 4):
        resumed(*batch(i))
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert resumed.read() == step.read()
    for a, b in zip(step.averaged().parameters(), resumed.averaged().parameters(), strict=True):
        assert torch.equal(a, b)


def test_an_average_goes_on_with_another_decay():
    step = make(Net(), ema_decay=0.9)
    for i in range(4):
        step(*batch(i))
    other = make(Net(), ema_decay=0.9995)
    other.load_state_dict(step.state_dict())
    for a, b in zip(step.averaged().state_dict().values(), other.averaged().state_dict().values(), strict=True):
        if a.is_floating_point():
            assert torch.allclose(a, b, rtol=1e-4)


def test_learning_rate_warms_up_and_falls():
    cfg = script.Config(lr=1.0, lr_schedule="cosine", warmup=10)
    rates = [script.learning_rate(cfg, i, i / 100) for i in range(1, 101)]
    assert rates[0] == pytest.approx(0.1, rel=1e-2)
    assert max(rates) == rates[9]
    assert rates[-1] == pytest.approx(0.01)
    assert rates[54] == pytest.approx(0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * 0.55)))
    constant = script.Config(lr=0.5)
    assert {script.learning_rate(constant, i, i / 100) for i in (1, 50, 100)} == {0.5}


def test_no_decay_for_norms_biases_and_the_scan():
    net = script.ARCHS["u2mambap"]()
    decayed, plain = script.decayed_and_not(net)
    names = {id(p): n for n, p in net.named_parameters()}
    decayed, plain = ({names[id(p)] for p in g["params"]} for g in (decayed, plain))
    assert "stage1.rebnconvin.conv_s1.weight" in decayed and "stage1.mamba7.mamba.in_proj.weight" in decayed
    assert {
        "stage1.rebnconvin.bn_s1.weight",
        "stage1.mamba7.mamba.A_log",
        "stage1.mamba7.mamba.D",
        "side1.bias",
    } <= plain
    assert len(decayed) + len(plain) == len(names)


def test_the_optimizer_goes_on_in_another_memory_format():
    nets = [Net().to(memory_format=torch.channels_last if i == 2 else torch.contiguous_format) for i in range(3)]
    whole, half, resumed = (make(net) for net in nets)
    for i in range(3):
        whole(*batch(i))
    half(*batch(0))
    nets[2].load_state_dict(nets[1].state_dict())
    resumed.load_state_dict(half.state_dict())
    for i in range(1, 3):
        resumed(*batch(i))
    assert torch.allclose(nets[0].conv.weight, nets[2].conv.weight, atol=1e-5)


def test_edge_weights_by_hand():
    g = torch.Generator().manual_seed(0)
    masks, logits = (torch.rand(2, 1, 40, 37, generator=g) > 0.5).float(), torch.randn(7, 2, 1, 40, 37, generator=g)
    weights = torch.empty_like(masks)
    for y in range(40):
        for x in range(37):
            around = masks[..., max(y - 15, 0) : y + 16, max(x - 15, 0) : x + 16]
            weights[..., y, x] = 5 * (around.mean((2, 3)) - masks[..., y, x]).abs()
    bce = nn.functional.binary_cross_entropy_with_logits(logits, masks.expand(7, -1, -1, -1, -1), reduction="none")
    got = script.total_loss(tuple(logits), masks, 0.0, 2.0, False)
    assert torch.allclose(got, ((1 + 2 * weights) * bce).mean((1, 2, 3, 4)), rtol=1e-5)
    assert script.edge_weights(torch.ones_like(masks)).max() == 0  # no edge, no weight


@pytest.mark.parametrize(("iou", "edge"), [(0.0, 0.0), (0.5, 0.0), (0.0, 2.0), (0.5, 2.0)])
def test_total_loss_is_the_same_by_plain_functions_and_by_the_kernels_definition(iou, edge):
    g = torch.Generator().manual_seed(0)
    masks, logits = torch.rand(2, 1, 40, 37, generator=g), tuple(torch.randn(7, 2, 1, 40, 37, generator=g))
    parts = script.multi_bce_loss_fusion(logits, masks) + iou * script.soft_iou_loss(logits, masks)
    plain = script.total_loss(logits, masks, iou, edge, False)
    assert torch.allclose(plain, script.total_loss(logits, masks, iou, edge, True), rtol=1e-5)
    assert torch.allclose(plain, parts) == (not edge)


def test_soft_iou_by_hand():
    masks = torch.zeros(2, 1, 2, 2)
    masks[0, 0, 0] = 1  # two of four pixels; the second image has no object
    sure = torch.where(masks > 0, 30.0, -30.0)
    loss = script.soft_iou_loss((sure, -sure, torch.zeros_like(masks)), masks)
    # each image: 1 - (both + 1) / (either + 1)
    assert torch.allclose(loss, torch.tensor([0, (4 / 5 + 4 / 5) / 2, ((1 - 2 / 4) + (1 - 1 / 3)) / 2]), atol=1e-6)


class PlainNet(nn.Module):
    """Seven outputs, nothing that looks at the whole batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 7, 3, padding=1)
        self.bn = nn.BatchNorm2d(7)  # looks at nothing: the step keeps statistics, of which there must be some

    def forward(self, x, logits=False):
        return self.conv(x).split(1, 1)


@pytest.mark.parametrize("parts", [2, 3, 5])  # 5 images: parts of 3 and 2, of 2, 2 and 1, and of one each
def test_a_batch_in_parts_is_the_same_step(parts):
    whole, split = PlainNet(), PlainNet()
    steps = make(whole), make(split, accumulate=parts)
    for i in range(3):
        for step in steps:
            step(*batch(i, n=5))
    for a, b in zip(whole.conv.parameters(), split.conv.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)
    assert not torch.equal(whole.conv.weight, PlainNet().conv.weight)
    one, other = (step.read() for step in steps)
    assert other.losses == pytest.approx(one.losses, rel=1e-5)
    assert (other.iou, other.steps) == (pytest.approx(one.iou), one.steps)


@pytest.mark.parametrize("parts, says", [(1, "try accumulate = 2, which takes it in 2 parts, or batch_size_train = 2"),
                                         (4, "of cpu: try batch_size_train = 2")])  # fmt: skip
def test_memory_that_does_not_suffice_names_what_to_try(parts, says):
    def no_memory(*_):
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes")

    step = make(Net(), accumulate=parts)
    step.loss = no_memory
    with pytest.raises(UserError) as error:
        step(*batch(n=4))
    assert "a batch of 4 does not fit into the memory of cpu" in str(error.value) and says in str(error.value)
