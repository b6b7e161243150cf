"""model/weights.py: files are read safely, carry their settings, and are refused in one line that names them."""

import contextlib
import math
import pickle
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import model
from model import U2MAMBAP, U2NETP, build_model
from model.weights import (
    CorruptFileError,
    cpu_state_dict,
    load_model,
    load_pretrained,
    load_state_dict,
    quantize,
    read_file,
    read_state_dict,
)


@contextlib.contextmanager
def refused(path: Path, match: str | None = None, kind: type = ValueError):
    """In one line that names the file."""
    with pytest.raises(kind, match=match) as error:
        yield
    assert str(path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "net.pth"


# ------------------------------------------------------------------------------------------------------- settings


def test_settings_travel_in_the_file_and_its_keys_stay_the_published_ones(path):
    net = build_model({"arch": "u2mambap", "mamba_norm": "gate", "out_ch": 2, "lr": 0.1, "backend": "torch"})
    assert net.settings == {"arch": "u2mambap", "mamba_norm": "gate", "out_ch": 2, "backend": "torch"}
    state = cpu_state_dict(net.to(memory_format=torch.channels_last), size=96)
    assert list(state) == list(net.state_dict()) and all(v.is_contiguous() for v in state.values())
    torch.save(state, path)
    again = load_model(path)
    assert again.settings == {"arch": "u2mambap", "mamba_norm": "gate", "out_ch": 2, "size": 96}
    assert not again.training
    assert all(torch.equal(again.state_dict()[k], v) for k, v in net.state_dict().items())
    twin = U2MAMBAP(out_ch=2, mamba_norm="gate")  # as U-2-Net's code does
    twin.load_state_dict(torch.load(path, weights_only=True), strict=True)
    saved = cpu_state_dict(torch.nn.DataParallel(again))
    assert saved._metadata["u2mamba"]["size"] == 96 and saved.keys() == state.keys()  # saved again, it keeps its size


@pytest.mark.parametrize(
    "settings",
    [
        {"arch": "u2netp", "in_ch": 4},
        {"arch": "u2mambap", "out_ch": 2},
        {"arch": "u2mambap", "mamba_at": "encoder", "mamba_norm": "gate"},
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("wrapper", "prefix"),
    [("", ""), ("model", "module._orig_mod."), ("state_dict", "net."), ("ema", "my_network."), ("params", "")],
)
def test_settings_of_files_without_any_are_inferred(settings, wrapper, prefix, path):
    net = build_model(settings)
    state = {k: v for k, v in net.state_dict().items() if not k.endswith("num_batches_tracked")}  # as old files
    state = {prefix + k: v for k, v in state.items()}
    if wrapper == "state_dict":  # as Lightning stores a loss with a buffer
        state["loss.pos_weight"] = torch.ones(1)
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    again = load_model(path)
    assert settings.items() <= again.settings.items() and "size" not in again.settings
    assert list(again.state_dict()) == list(net.state_dict())


def test_an_arch_of_the_users_own_is_built_with_the_options_of_its_signature(path, monkeypatch):
    def tiny(in_ch=3, width=4):
        return nn.Sequential(nn.Conv2d(in_ch, width, 3))

    monkeypatch.setitem(model.ARCHS, "tiny", tiny)
    torch.save(cpu_state_dict(build_model({"arch": "tiny", "width": 7, "mamba_at": "none"})), path)
    assert load_model(path)[0].out_channels == 7
    monkeypatch.delitem(model.ARCHS, "tiny")
    with refused(path, r"arch = 'tiny': must be one of u2net, "):
        load_model(path)


def test_safetensors_are_read_or_their_library_is_named(tmp_path, monkeypatch):
    net, path = U2NETP(), tmp_path / "net.safetensors"
    pytest.importorskip("safetensors.torch").save_file(net.state_dict(), path)
    assert torch.equal(load_model(path).outconv.weight, net.outconv.weight)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CorruptFileError):
        load_model(path)
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with refused(path, "pip install safetensors"):
        load_model(path)


# ------------------------------------------------------------------------------------------------------- int8 files


def test_an_int8_file_is_read_as_any_other_and_by_no_plain_loader(path):
    net = build_model({"arch": "u2mambap", "mamba_norm": "gate"})
    weight = net.stage2.rebnconv1.conv_s1.weight
    with torch.no_grad():
        weight[0], weight[1] = 0, 1e-7  # an empty channel, and one below the range of fp16 scales
    state = cpu_state_dict(net, size=96)
    torch.save(quantize(state), path)
    again = load_model(path)
    assert again.settings == {"arch": "u2mambap", "mamba_norm": "gate", "size": 96}
    stored = torch.load(path, weights_only=True)
    for key, value in again.state_dict().items():
        if f"{key}.int8" not in stored:
            assert value.dim() < 2 or value[0].numel() < 32
            assert torch.equal(value, state[key])
        else:
            step = state[key].flatten(1).abs().amax(1) / 127
            error = (value - state[key]).flatten(1).abs().amax(1)
            assert (error <= 0.51 * step.clamp(min=2**-24)).all(), key
    with pytest.raises(RuntimeError, match="Missing key"):
        U2MAMBAP(mamba_norm="gate").load_state_dict(stored, strict=True)
    assert "tensors matched, 0 new" in load_pretrained(U2MAMBAP(mamba_norm="gate"), path)


@pytest.mark.parametrize(
    ("part", "change"),
    [
        ("scale", lambda scale: scale[1:]),
        ("scale", lambda scale: scale.mul(math.nan)),
        ("scale", lambda scale: -scale),
        ("scale", lambda scale: scale.float()),
        ("int8", lambda levels: levels.float()),
    ],
)
def test_a_damaged_int8_file(part, change, path):
    state = quantize(cpu_state_dict(build_model({"arch": "u2netp"})))
    state[f"side1.weight.{part}"] = change(state[f"side1.weight.{part}"])
    torch.save(state, path)
    for read in (load_model, lambda path: load_pretrained(U2NETP(), path)):
        with refused(path, r"side1\.weight\.int8 does not have one finite scale", kind=CorruptFileError):
            read(path)


# ------------------------------------------------------------------------------------------------------- bad files


@pytest.mark.parametrize(
    "damage",
    [
        lambda whole: b"",
        lambda whole: whole[:100],
        lambda whole: whole[: len(whole) // 2],
        lambda whole: whole[:-100],
        lambda whole: whole.replace(bytes(400), bytes(399) + b"\1"),  # one bit
        lambda whole: b"no checkpoint" + bytes(64),
        lambda whole: b"PK\x03\x04" + bytes(64),
    ],
)
def test_a_truncated_file_a_flipped_bit_and_a_file_of_another_kind(damage, path):
    torch.save({f"w{i}": torch.randn(100) for i in range(30)} | {"zeros": torch.zeros(100)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with refused(path, kind=CorruptFileError):
        read_file(path)


class Malicious:
    def __reduce__(self):
        return (Path.touch, (Path("ran.txt"),))


@pytest.mark.parametrize("nested", [lambda code: {"w": code}, lambda code: {"model": [code]}, lambda code: code])
@pytest.mark.parametrize(
    "writer",
    [
        torch.save,
        lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False),
        lambda content, path: path.write_bytes(pickle.dumps(content)),
        lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2)),
    ],
)
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, path, writer, nested):
    monkeypatch.chdir(tmp_path)
    writer(nested(Malicious()), path)
    for read in (read_file, load_model, lambda path: load_pretrained(U2NETP(), path)):
        with refused(path, "refused, it contains code"):
            read(path)
    assert not Path("ran.txt").exists()


@pytest.mark.parametrize("content", [{}, [1, 2], {"w": 3}, torch.ones(2)], ids=str)
def test_a_file_without_weights(content, path):
    torch.save(content, path)
    with refused(path, "does not contain a state dict"):
        read_state_dict(path)


def test_weights_of_another_network_are_named(path):
    with refused(path, r"arch 'u2mambap': .* first stage1\.mamba7.*or a changed network"):
        load_state_dict(build_model({"arch": "u2mambap"}), U2NETP().state_dict(), path)
    torch.save({"layer1.weight": torch.ones(1)}, path)
    with refused(path, "a network other than U²-Net"):
        load_model(path)


# ------------------------------------------------------------------------------------------------------- warm start


def test_a_warm_start_takes_what_fits_and_counts_the_rest(path):
    source, net = U2NETP(out_ch=2), U2MAMBAP()
    torch.save(cpu_state_dict(source), path)
    line = load_pretrained(net, path, size=320)
    heads = 2 * 7  # weight and bias of d0's convolution and of the six side outputs
    mamba = len(net.state_dict()) - len(source.state_dict())
    matched = len(source.state_dict()) - heads
    assert f"{matched} tensors matched, {mamba} new, {heads} did not fit: side1.weight" in line
    own = net.state_dict()
    assert all(torch.equal(own[k], v) for k, v in source.state_dict().items() if "side" not in k and "outconv" not in k)
    assert not own["stage1.mamba7.mamba.out_proj.weight"].any()
    old = {k: v for k, v in U2NETP().state_dict().items() if "num_batches_tracked" not in k}
    assert len(model.load_u2net_weights(net, old).matched) == len(old)


@pytest.mark.parametrize(
    ("norm_at", "other", "says"),
    [
        ("none", lambda: nn.Linear(1, 1), "do not fit arch 'U2MAMBAP'"),
        ("none", model.U2NET, "do not fit arch 'U2MAMBAP'"),
        ("none", lambda: U2MAMBAP(mamba_norm="gate"), 'mamba_norm = "gate"'),
        ("gate", U2MAMBAP, 'mamba_norm = "none"'),
    ],
)
def test_a_warm_start_from_another_network_is_refused_and_changes_nothing(norm_at, other, says, path):
    net = U2MAMBAP(mamba_norm=norm_at)
    before = cpu_state_dict(net)
    torch.save(other().state_dict(), path)
    with refused(path, says):
        load_pretrained(net, path)
    assert all(torch.equal(before[k], v) for k, v in net.state_dict().items())


@pytest.mark.parametrize(("trained", "size", "warns"), [(96, 320, True), (None, 320, False), (320, 96, True)])
def test_weights_trained_at_another_size_are_warned_of(trained, size, warns, path):
    torch.save(cpu_state_dict(U2NETP(), trained), path)
    assert (f"warning: the weights were trained at {trained} pixels" in load_pretrained(U2NETP(), path, size)) == warns
