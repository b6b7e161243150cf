"""Checkpoints: whole or absent, safe to load, refused in one line that names the file."""

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
