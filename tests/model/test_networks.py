"""The networks equal the published ones: counts, keys, shapes, function."""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

import model
from model import U2MAMBA, U2MAMBAP, U2NET, U2NETP, load_u2net_weights
from model.u2net import RSU, saliency_map
from tests.trained import trained


@pytest.mark.parametrize(
    ("network", "count"),
    [
        (U2MAMBA, 45_657_037),
        (lambda: U2MAMBA(mamba_at="encoder"), 48_877_773),
        (lambda: U2MAMBA(mamba_at="none"), 44_009_869),
    ],
)
def test_parameter_counts(network, count):
    with torch.device("meta"):
        assert sum(p.numel() for p in network().parameters()) == count


@pytest.mark.parametrize(("network", "name"), [(U2NET, "u2net"), (U2NETP, "u2netp")])
def test_keys_and_shapes_are_the_published_ones(network, name):
    lines = (Path(__file__).parent / "reference" / f"{name}_keys.txt").read_text().splitlines()
    with torch.device("meta"):
        own = [f"{key} {tuple(value.shape)}" for key, value in network().state_dict().items()]
    assert own == [line.strip() for line in lines if line.strip()]


def small(network=U2MAMBAP, **options):
    torch.manual_seed(3)
    return trained(network(**options))


def test_without_mamba_it_equals_u2net_exactly():
    with torch.no_grad():
        x = torch.rand(1, 3, 64, 64)
        plain, ours = small(U2NETP), small(U2MAMBAP, mamba_at="none")
        ours.load_state_dict(plain.state_dict())
        for a, b in zip(plain(x), ours(x), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (71, 95)])
def test_outputs_have_the_size_of_the_image_and_are_probabilities(size):
    with torch.no_grad():
        outputs = small()(torch.rand(2, 3, *size))
    assert len(outputs) == 7
    for d in outputs:
        assert d.shape == (2, 1, *size)
        assert d.min() >= 0 and d.max() <= 1


@pytest.mark.parametrize("shape", [(1, 3, 31, 64), (1, 3, 64, 16), (3, 64, 64)])
def test_too_small_or_misshapen_images_are_refused_with_their_shape(shape):
    with pytest.raises(ValueError, match=str(shape[-1])):
        small()(torch.rand(*shape))


def test_an_rsu_equals_its_definition_written_out():
    """RSU-4(8, 4, 6) step by step, from figure 3 of the paper."""
    torch.manual_seed(0)
    rsu = RSU(4, False, 8, 4, 6).eval()

    def conv(name, x, dilation=1):
        m = getattr(rsu, name)
        y = F.conv2d(x, m.conv_s1.weight, m.conv_s1.bias, padding=dilation, dilation=dilation)
        return F.relu(y / math.sqrt(1 + 1e-5))  # batch norm of a new network in eval mode: mean 0, variance 1

    def pool(x):
        return F.max_pool2d(x, 2, 2, ceil_mode=True)

    def up(x, like):
        return F.interpolate(x, like.shape[2:], mode="bilinear", align_corners=False)

    x = torch.randn(2, 8, 13, 10)
    with torch.no_grad():
        hxin = conv("rebnconvin", x)
        h1 = conv("rebnconv1", hxin)
        h2 = conv("rebnconv2", pool(h1))
        h3 = conv("rebnconv3", pool(h2))
        h4 = conv("rebnconv4", h3, dilation=2)
        h3d = conv("rebnconv3d", torch.cat((h4, h3), 1))
        h2d = conv("rebnconv2d", torch.cat((up(h3d, h2), h2), 1))
        h1d = conv("rebnconv1d", torch.cat((up(h2d, h1), h1), 1))
        assert torch.allclose(rsu(x), h1d + hxin, atol=1e-6)


@pytest.mark.parametrize("mamba_at", ["bottleneck", "encoder"])
def test_public_weights_keep_their_function(mamba_at):
    plain, net = small(U2NETP), U2MAMBAP(mamba_at=mamba_at).eval()
    report = load_u2net_weights(net, {f"module.{k}": v for k, v in plain.state_dict().items()})
    assert len(report.matched) == len(plain.state_dict()) and report.unfit == []
    assert report.new and all(".mamba" in k for k in report.new)
    x = torch.rand(1, 3, 64, 80)
    with torch.no_grad():
        for a, b in zip(plain(x), net(x), strict=True):
            assert (a - b).abs().max() < 1e-6
    net(x)[0].sum().backward()  # and it can still learn: out_proj is zero, but its gradient is not
    assert net.stage1.mamba7.mamba.out_proj.weight.grad.abs().sum() > 0


def test_incomplete_weights_are_refused():
    state = {key: value for key, value in U2NETP().state_dict().items() if "stage3d" not in key}
    with pytest.raises(ValueError, match=r"first stage3d\..*u2netp\.pth"):
        load_u2net_weights(small(), state)


def test_classes_and_channels():
    """K classes, of which the first is the background, and four input channels."""
    net = U2NETP(in_ch=4, out_ch=3).eval()
    with torch.no_grad():
        logits, maps = (net(torch.rand(2, 4, 32, 40), logits=on)[0] for on in (True, False))
    assert logits.shape == (2, 3, 32, 40) and maps.shape == (2, 1, 32, 40)
    x = torch.tensor([1.0, 2.0, 0.5]).view(1, 3, 1, 1)
    expected = (math.exp(2) + math.exp(0.5)) / (math.exp(1) + math.exp(2) + math.exp(0.5))
    assert saliency_map(x).item() == pytest.approx(expected)


def test_torch_compile_gives_the_same_outputs_and_gradients():
    net = RSU(4, False, 3, 8, 8, partial(model.MambaLayer, norm_at="gate"), (4,))
    results, x = [], torch.randn(2, 3, 20, 20)
    for f in (net, torch.compile(net, backend="eager")):
        y = f(x)
        results.append([y, *torch.autograd.grad(y.square().mean(), net.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
