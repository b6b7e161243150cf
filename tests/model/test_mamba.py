"""The Mamba block and its layer over images."""

import pytest
import torch
import torch.nn.functional as F

from model.mamba import Mamba, MambaLayer


def make(module, seed=0, **options):
    torch.manual_seed(seed)
    return module(**options)


def image(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("d_model", "dt_rank"), [(16, 1), (20, 2), (64, 4)])
def test_parameters_are_those_of_mamba_ssm(d_model, dt_rank):
    inner = 2 * d_model
    wanted = {
        "A_log": (inner, 16),
        "D": (inner,),
        "in_proj.weight": (2 * inner, d_model),
        "conv1d.weight": (inner, 1, 4),
        "conv1d.bias": (inner,),
        "x_proj.weight": (dt_rank + 32, inner),
        "dt_proj.weight": (inner, dt_rank),
        "dt_proj.bias": (inner,),
        "out_proj.weight": (d_model, inner),
    }
    assert {k: tuple(v.shape) for k, v in Mamba(d_model).state_dict().items()} == wanted


def test_initialization():
    block = make(Mamba, d_model=512)
    step = F.softplus(block.dt_proj.bias)
    assert step.min() >= 1e-3 * (1 - 1e-4) and step.max() <= 1e-1 * (1 + 1e-4)
    log_step = step.log10()  # uniform on [-3, -1]: mean -2 and standard deviation 2/√12 = 0.577, of 1024 draws
    assert abs(log_step.mean() + 2) < 0.08 and abs(log_step.std() - 0.577) < 0.04
    bound = block.dt_rank**-0.5
    assert 0.99 * bound < block.dt_proj.weight.abs().max() <= bound
    torch.testing.assert_close(block.A_log.exp(), torch.arange(1.0, 17).expand(1024, 16))
    assert torch.equal(block.D, torch.ones(1024))


@pytest.mark.parametrize("norm_at", ["none", "gate"])
def test_forward_is_the_definition(norm_at):
    """Figure 3 and algorithm 2 of the paper, token by token."""
    block, x = make(Mamba, d_model=20, d_state=4, norm_at=norm_at), image(2, 9, 20)
    u, z = F.linear(x, block.in_proj.weight).chunk(2, dim=-1)  # (B, L, d_inner)
    past = torch.cat([torch.zeros(2, 3, 40), u], 1)
    taps = block.conv1d.weight[:, 0]  # (d_inner, 4), the last tap is now
    u = F.silu(sum(past[:, k : k + 9] * taps[:, k] for k in range(4)) + block.conv1d.bias)
    dt, B, C = block.x_proj(u).split([2, 4, 4], dim=-1)
    dt = F.softplus(block.dt_proj(dt))
    h, ys = torch.zeros(2, 40, 4), []
    for t in range(9):
        h = torch.exp(dt[:, t, :, None] * -block.A_log.exp()) * h + (dt * u)[:, t, :, None] * B[:, t, None]
        ys.append((h * C[:, t, None]).sum(-1) + block.D * u[:, t])
    y = torch.stack(ys, 1) * F.silu(z)
    if norm_at == "gate":
        torch.nn.init.uniform_(block.norm.weight, 0.5, 2)
        y = block.norm(y)
    wanted = block.out_proj(y)
    torch.testing.assert_close(block(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(block(x, channels_first=True), wanted, rtol=1e-5, atol=1e-6)
    assert block(x).is_contiguous()
    assert block(x, channels_first=True).mT.is_contiguous()


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_layer_is_norm_and_mamba_over_pixels_also_exported(memory_format):
    layer, x = make(MambaLayer, dim=16), image(2, 16, 5, 7).contiguous(memory_format=memory_format)
    tokens = x.permute(0, 2, 3, 1).reshape(2, 35, 16)
    wanted = layer.mamba(layer.norm(tokens)).reshape(2, 5, 7, 16).permute(0, 3, 1, 2)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    assert layer(x).is_contiguous(memory_format=memory_format)
    program = torch.export.export(layer.eval(), (x,))
    assert not [n for n in program.graph.nodes if "autocast" in str(n.target)]
    torch.testing.assert_close(program.module()(x), wanted, rtol=1e-5, atol=1e-6)


def test_fp32_inside_autocast():
    layer, x = make(MambaLayer, dim=16), image(2, 16, 5, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside, half = layer(x), layer(x.bfloat16())
    assert inside.dtype == torch.float32
    assert torch.equal(inside, layer(x))
    assert half.dtype == torch.bfloat16
    assert torch.equal(half, layer(x.bfloat16().float()).bfloat16())


def test_channels_as_tokens():
    layer, x = make(MambaLayer, dim=35, channel_token=True), image(2, 6, 5, 7)
    wanted = layer.mamba(layer.norm(x.reshape(2, 6, 35))).reshape(2, 6, 5, 7)
    torch.testing.assert_close(layer(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(layer(x.to(memory_format=torch.channels_last)), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("options", "shape", "says"),
    [
        ({"dim": 16}, (1, 8, 4, 4), "C must be dim=16, got 8"),
        ({"dim": 16, "channel_token": True}, (1, 16, 4, 5), "H·W, with channel_token=True, must be dim=16, got 20"),
        ({"dim": 16}, (16, 4, 4), "x must be (B, C, H, W), got (16, 4, 4)"),
        ({"dim": 16, "norm_at": "both"}, (1, 16, 4, 4), 'norm_at must be "none" or "gate"'),
    ],
)
def test_wrong_sizes_and_options(options, shape, says):
    with pytest.raises(ValueError) as caught:
        MambaLayer(**options)(torch.zeros(shape))
    assert says in str(caught.value)
