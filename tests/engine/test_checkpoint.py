"""Checkpoints: whole or absent, safe to load, refused in one line that names the file."""

import pickle
from pathlib import Path

import pytest
import torch

from model import U2MAMBAP, U2NETP
from u2mamba.engine import checkpoint, resume
from u2mamba.engine.checkpoint import CheckpointError


def one_line(error, path):
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_written_file_loads_safely_and_keeps_every_bit(tmp_path):
    net = U2MAMBAP()
    path = tmp_path / "deep" / "weights.pth"
    checkpoint.save(checkpoint.plain_state(net), path)
    state = torch.load(path, weights_only=True)
    for key, value in net.state_dict().items():
        assert torch.equal(state[key], value)
    assert [p.name for p in path.parent.iterdir()] == ["weights.pth"]


def test_channels_last_weights_are_saved_in_the_plain_order(tmp_path):
    net = U2NETP().to(memory_format=torch.channels_last)
    for value in checkpoint.plain_state(net).values():
        assert value.is_contiguous()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pth"
    checkpoint.save({"a": torch.ones(3)}, path)
    monkeypatch.setattr(
        torch, "save", lambda content, file: (file.write(b"half"), (_ for _ in ()).throw(OSError(28, "full")))
    )
    said = []
    assert not checkpoint.save_or_warn({"a": torch.zeros(3)}, path, said.append)
    assert len(said) == 1 and str(path) in said[0] and "full" in said[0]
    monkeypatch.undo()
    assert torch.load(path, weights_only=True)["a"].tolist() == [1, 1, 1]
    assert [p.name for p in tmp_path.iterdir()] == ["last.pth"]


def test_a_missing_file_and_a_folder(tmp_path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(CheckpointError) as error:
            checkpoint.load(path)
        one_line(error, path)


@pytest.mark.parametrize("part", [0, 1, 100, 0.5, 0.99])
def test_a_truncated_file(tmp_path, part):
    path = tmp_path / "weights.pth"
    checkpoint.save({f"w{i}": torch.randn(100) for i in range(30)}, path)
    content = path.read_bytes()
    path.write_bytes(content[: part if isinstance(part, int) else int(len(content) * part)])
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    one_line(error, path)


@pytest.mark.parametrize(
    "content", [b"not a checkpoint at all", b"\x89PNG\r\n\x1a\n" + bytes(64), b"PK\x03\x04" + bytes(60)]
)
def test_a_file_of_another_kind(tmp_path, content):
    path = tmp_path / "weights.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path)
    one_line(error, path)


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
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, monkeypatch, writer, nested):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "weights.pth"
    writer(nested(Malicious()), path)
    for read in (checkpoint.load, checkpoint.load_weights, lambda path: checkpoint.start_from(U2NETP(), path, 320)):
        with pytest.raises(CheckpointError) as error:
            read(path)
        assert "refused, it holds code" in one_line(error, path)
    assert not Path("ran.txt").exists()


@pytest.mark.parametrize(("network", "options"), [(U2NETP, {}), (U2MAMBAP, {}), (U2MAMBAP, {"mamba_at": "encoder"})])
def test_the_network_is_found_from_its_weights(network, options, tmp_path):
    net = network(**options)
    path = tmp_path / "w.pth"
    checkpoint.save({"model": checkpoint.plain_state(net)}, path)
    rebuilt = checkpoint.build_network(checkpoint.load_weights(path), path)
    assert type(rebuilt) is network and not rebuilt.training
    assert list(rebuilt.state_dict()) == list(net.state_dict())


def test_weights_of_another_architecture_name_both(tmp_path):
    path = tmp_path / "w.pth"
    with pytest.raises(CheckpointError) as error:
        checkpoint.fill(U2MAMBAP(), U2NETP().state_dict(), path, "u2mambap")
    text = one_line(error, path)
    assert "'u2mambap'" in text and "stage1.mamba7" in text
    with pytest.raises(CheckpointError) as error:
        checkpoint.build_network({"layer1.weight": torch.ones(1)}, path)
    one_line(error, path)


@pytest.mark.parametrize("content", [{}, [1, 2], {"w": 3}, torch.ones(2)])
def test_a_file_without_weights(tmp_path, content):
    path = tmp_path / "w.pth"
    torch.save(content, path)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_weights(path)
    one_line(error, path)


def test_starting_anew_keeps_the_old_run(tmp_path):
    for content in (1, 2):
        torch.save(content, tmp_path / "last.pth")
        assert resume.find_last(tmp_path, "never", {})[0] is None
        resume.put_aside(tmp_path)
    assert torch.load(tmp_path / "last_1.pth") == 1 and torch.load(tmp_path / "last_2.pth") == 2
    assert resume.find_last(tmp_path, "auto", {})[0] is None


def test_a_weight_file_called_last_is_not_a_run(tmp_path):
    torch.save(U2NETP().state_dict(), tmp_path / "last.pth")
    with pytest.raises(CheckpointError) as error:
        resume.find_last(tmp_path, "auto", {})
    one_line(error, tmp_path / "last.pth")


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_weights_within_a_file_of_more(key, tmp_path):
    weights = U2NETP().state_dict()
    torch.save({key: {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, tmp_path / "x.pth")
    assert checkpoint.load_weights(tmp_path / "x.pth").keys() == weights.keys()


def test_the_published_name():
    assert checkpoint.weight_file("u2net", 2000, 1.25, 0.1) == "u2net_bce_itr_2000_train_1.250000_tar_0.100000.pth"


def test_the_place_of_a_weight_file_counts_whole_batches(tmp_path):
    tmp_path = tmp_path / "run"  # the files' names begin with the folder's
    tmp_path.mkdir()
    (tmp_path / "last.pth").write_bytes(bytes(100))
    net = U2NETP()
    checkpoint.save(checkpoint.plain_state(net), tmp_path / checkpoint.weight_file(tmp_path.name, 6, 1.0, 0.5))
    constants = {"pairs": 13, "processes": 1, "batch_size_train": 4}
    for whole, place in ((True, (2, 0)), (False, (1, 8))):  # 3 steps an epoch, or 4
        found, _ = resume.find_last(tmp_path, "auto", constants | {"whole_batches": whole})
        assert (found["progress"]["epoch"], found["progress"]["position"]) == place


def test_what_a_stopping_run_promises(tmp_path):
    last = checkpoint.LastFile(tmp_path, 5.0, print, is_good=False)
    assert last.promise("auto") == "the same command goes on from there"
    assert last.promise("never") == "the same command without --resume never goes on from there"


def test_a_checkpoint_that_is_not_there_names_those_that_are(tmp_path):
    torch.save({}, tmp_path / "last.pth")
    with pytest.raises(checkpoint.CheckpointError, match=r"no such checkpoint; in that folder there are last\.pth"):
        checkpoint.load(tmp_path / "best.pth")
