"""Checkpoints of a run: whole or absent, resumed from the newest whole file; full, read-only and corrupting disks."""

import errno
import os
import re
import shutil
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
import torch

import u2mamba_train as script
from model import U2NETP
from model.weights import read_file
from tests.engine.tiny import Net, last, same, weights
from u2mamba.dataset import batches
from u2mamba.engine import run_folder
from u2mamba.engine.checkpoint import Checkpointer
from u2mamba.engine.schedule import TrainState
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import UserError

# TensorBoard's thread ends with an error when the disk fails
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@pytest.fixture
def saver(tmp_path):
    """A Checkpointer in `tmp_path` around a tiny network."""
    net = Net()
    net.settings = {"arch": "tiny"}
    step = TrainStep(net, torch.optim.Adam(net.parameters(), fused=True), None, Environment(torch.device("cpu")))
    return Checkpointer(tmp_path, script.Config(), step, fingerprint=1)


def iteration(path):
    return read_file(path)["state"]["iteration"]


def flip(path):
    """Inverts the third quarter of the file: some of the bytes between its records nobody would miss."""
    content = path.read_bytes()
    a, b = len(content) // 2, 3 * len(content) // 4
    path.write_bytes(content[:a] + bytes(v ^ 0xFF for v in content[a:b]) + content[b:])


# ------- writing


def test_the_file_before_stays_and_a_failed_write_touches_neither(saver, tmp_path, monkeypatch, capsys):
    before = tmp_path / "last_before.pth"
    saver.save_last(TrainState(iteration=1))
    assert not before.exists()
    saver.save_last(TrainState(iteration=2))
    saver.save_last(TrainState(iteration=3))
    assert (iteration(saver.last), iteration(before)) == (3, 2)
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    saver.save_last(TrainState(iteration=4))
    assert not saver.saved and "Input/output error" in capsys.readouterr().out
    assert (iteration(saver.last), iteration(before)) == (3, 2)
    assert "the previous save" in saver.resume_hint()
    monkeypatch.undo()
    saver.save_last(TrainState(iteration=5))
    assert saver.resume_hint() == "the same command resumes from here"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "last_before.pth"]


def test_on_a_full_disk_the_file_before_gives_way(saver, tmp_path, monkeypatch, capsys):
    before = tmp_path / "last_before.pth"
    saver.save_last(TrainState(iteration=1))
    saver.save_last(TrainState(iteration=2))
    write = torch.save

    def only_two_files_fit(content, file):
        if before.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", only_two_files_fit)
    saver.save_last(TrainState(iteration=3))
    assert saver.saved and not capsys.readouterr().out
    assert iteration(saver.last) == 3 and not before.exists()


def test_a_damaged_last_pth_never_takes_the_place_of_the_good_one(saver, tmp_path):
    saver.save_last(TrainState(iteration=1))
    saver.last.rename(saver.before)
    saver.last.write_bytes(b"damaged")
    saver.last_is_whole = False
    saver.save_last(TrainState(iteration=2))
    assert (iteration(saver.last), iteration(saver.before)) == (2, 1)


def test_old_weights_files_are_deleted_and_the_rest_stays(run, tmp_path):
    run(save_frq=1, seed=1)
    folder = tmp_path / "tiny"
    (left := folder / ".last-abc.tmp").write_bytes(b"of a killed writer")
    run(save_frq=1, resume="never", keep_checkpoints=2, epoch_num=2)
    assert not left.exists()
    assert [i for i, _ in run_folder.weights_files(folder)] == [11, 12]
    assert len(list(folder.glob("tiny_bce_itr_*_1.pth"))) == 6  # the archived run's
    for name in ("last.pth", "last_before.pth", "best.pth", "last_1.pth", "best_1.pth"):
        read_file(folder / name)


def test_a_later_file_of_an_earlier_try_does_not_cost_the_new_one(tmp_path):
    for number in (3000, 3500, 4000):
        (tmp_path / run_folder.weights_name("tiny", number, 1, 1)).touch()
    run_folder.prune(tmp_path, keep=1, iteration=3500)
    assert [i for i, _ in run_folder.weights_files(tmp_path)] == [3500, 4000]


def test_the_last_weights_file_is_there_before_the_run_is_called_finished(run, tmp_path, monkeypatch):
    def killed(checkpoints, state, finished=False):
        if finished:
            assert [i for i, _ in run_folder.weights_files(tmp_path / "tiny")][-1] == state.iteration == 6
            raise MemoryError("killed here")

    monkeypatch.setattr(Checkpointer, "save_last", killed)
    with pytest.raises(MemoryError):
        run(save_frq=1000)


# ------- resuming


@pytest.mark.parametrize("damage", [flip, Path.unlink])
def test_the_run_resumes_from_the_file_before_as_if_nothing_was(damage, run, tmp_path):
    run(model_name="whole", epoch_num=2)
    run()
    path, before = tmp_path / "tiny" / "last.pth", tmp_path / "tiny" / "last_before.pth"
    damage(path)
    code, out = run(epoch_num=2)
    assert code == 0
    assert f"resuming from {before}: epoch " in out
    assert (f"warning: {path}: is" in out) == (damage is flip)
    assert same(weights(tmp_path / "tiny"), weights(tmp_path / "whole"))


def test_when_both_are_damaged_the_newest_whole_weights_serve(run, tmp_path):
    run()
    folder = tmp_path / "tiny"
    for name in ("last.pth", "last_before.pth"):
        flip(folder / name)
    (_, fourth), (_, sixth) = run_folder.weights_files(folder)[1:]
    flip(sixth)
    weights_before = torch.load(fourth, weights_only=True)
    code, out = run(epoch_num=2, lr=0.0, resume="force")
    assert code == 0
    for name in ("last.pth", "last_before.pth", sixth.name):
        assert f"warning: {folder / name}: is " in out
    assert f"warning: {fourth} holds weights only: the states of the optimizer" in out
    assert f"resuming from {fourth}: epoch 1, iteration 4" in out
    assert "[epoch: 1/2, batch: 20/23, ite: 5]" in out and "ite: 12]" in out
    assert same(weights(folder)["conv.weight"], weights_before["conv.weight"])


def test_when_nothing_is_whole_one_line_says_so_and_nothing_is_touched(run, tmp_path):
    run()
    folder = tmp_path / "tiny"
    for path in folder.glob("*.pth"):
        flip(path)
    before = {p: p.read_bytes() for p in folder.glob("*.pth")}
    with pytest.raises(UserError, match=r"last\.pth: is damaged, and no other checkpoint"):
        run(epoch_num=2)
    assert {p: p.read_bytes() for p in folder.glob("*.pth")} == before


@pytest.mark.parametrize(
    "content",
    [U2NETP().state_dict(), {"state": {"epoch": "x"}}, {"step": {}}, {"model": U2NETP().state_dict()},
     {"model": os.remove}, 1],
    ids=["weights", "odd state", "odd step", "another network", "code", "a number"],
)  # fmt: skip
def test_a_file_that_holds_no_run_of_ours_is_refused_and_kept(content, run, tmp_path):
    """Although the file before is whole."""
    run()
    path = tmp_path / "tiny" / "last.pth"
    torch.save(read_file(path) | content if isinstance(content, dict) and len(content) == 1 else content, path)
    before = path.read_bytes()
    with pytest.raises(UserError, match=r"last\.pth: (refused, it contains code|.*--resume never)"):
        run(epoch_num=2)
    assert path.read_bytes() == before


def test_a_finished_run_is_left_alone_and_resumed_under_another_name(run, tmp_path):
    run()
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")}
    code, out = run()
    assert code == 0 and "holds a finished run of 1 epochs" in out
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*.*")} == before
    (tmp_path / "tiny").rename(tmp_path / "other")
    code, out = run(epoch_num=2, model_name="other")
    assert code == 0 and "resuming from" in out and "iteration 6" in out


def test_a_finished_run_can_be_longer_unless_it_would_have_small_crops_for_longer(run, tmp_path):
    run(early_crop=33)
    with pytest.raises(UserError, match="epoch_num: 1 -> 2"):
        run(early_crop=33, epoch_num=2)
    run(lr_schedule="cosine", resume="never")
    out = run(lr_schedule="cosine", epoch_num=2)[1]
    assert "epoch_num: 1 -> 2: lr follows the longer run's schedule" in out and "lr 5.05e-05" not in out
    saved = read_file(tmp_path / "tiny" / "last.pth")
    saved["state"]["finished"] = False
    torch.save(saved, tmp_path / "tiny" / "last.pth")
    with pytest.raises(UserError, match="epoch_num: 2 -> 3"):  # a stopped one: not by itself
        run(lr_schedule="cosine", epoch_num=3)


def test_a_setting_that_is_gone_counts_where_it_was_not_its_default(run, tmp_path):
    run()
    path = tmp_path / "tiny" / "last.pth"
    saved = read_file(path)
    for value in (0.0, 0.5):
        saved["run"]["settings"]["old_option"], saved["run"]["defaults"]["old_option"] = value, 0.0
        torch.save(saved, path)
        with pytest.raises(UserError, match=r"old_option: 0\.5 -> None") if value else nullcontext():
            assert "holds a finished run" in run()[1]


def test_where_a_run_was_made_is_recorded(run, tmp_path):
    run()
    made = last(tmp_path / "tiny")["run"]["made"]
    assert made["torch"] == torch.__version__ and made["device"] == "cpu" and made["version"]
    assert re.fullmatch(r"[0-9a-f]{40}( with changes)?|unknown", made["commit"])
    assert f'"commit": "{made["commit"]}"' in (tmp_path / "tiny" / "config.json").read_text()


def test_a_file_that_goes_while_pairs_are_streamed_costs_no_step(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    pairs = shutil.copytree(data, tmp_path / "data")
    goes = partial((pairs / "images" / "d12.png").unlink, missing_ok=True)
    with pytest.raises(script.DataError, match=r"d12\.png"):
        run(at={3: goes}, data_dir=str(pairs), epoch_num=2, save_frq=1000)
    done = int(re.findall(r"ite: (\d+)\]", capsys.readouterr().out)[-1])
    assert iteration(tmp_path / "tiny" / "last.pth") == done
    (pairs / "masks" / "d12.png").unlink()
    code, out = run(data_dir=str(pairs), epoch_num=2, resume="force")
    assert code == 0 and f"iteration {done}" in out


# ------- a disk that fails during the run


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_costs_warnings_and_not_the_run(run, tmp_path):
    """No file may grow beyond 1 KiB from iteration 3 to 5, which is what a full disk looks like to the writer."""
    import resource

    folder, kept, (_, hard) = tmp_path / "tiny", [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def limit(size):
        kept.append([i for i, _ in run_folder.weights_files(folder)])
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

    try:
        code, out = run(at={3: partial(limit, 1024), 6: partial(limit, resource.RLIM_INFINITY)}, keep_checkpoints=1)
    finally:
        limit(resource.RLIM_INFINITY)
    assert code == 0 and kept == [[2], [2], [6]]  # 4 was refused, and cost no older one
    assert f"warning: {folder / 'last.pth'} could not be written (File too large); training continues" in out
    assert "inline_container" not in out
    assert iteration(folder / "last.pth") == 6
    assert not list(folder.glob(".*"))


def test_a_folder_that_goes_away_costs_the_files_and_is_reported_at_the_end(run, tmp_path, capsys):
    folder = tmp_path / "tiny"

    def replace_by_a_file():
        folder.rename(tmp_path / "aside")
        folder.write_text("in the way")

    with pytest.raises(UserError, match=r"the run is finished, but .*last\.pth could not be written"):
        run(at={3: replace_by_a_file})
    out = capsys.readouterr().out
    assert "ite: 6]" in out and "last.pth could not be written (File exists)" in out
    assert iteration(tmp_path / "aside" / "last.pth") == 2


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "No locks available"), NotImplementedError("no flock here")])
def test_a_file_system_without_locks_is_one_warning(error, run, monkeypatch):
    monkeypatch.setattr(run_folder.FileLock, "acquire", lambda *_, **__: (_ for _ in ()).throw(error))
    code, out = run()
    assert code == 0 and "cannot be locked" in out
