"""Disks that are full, read-only or give back other bytes: the run warns, goes on, and finds what is still whole."""

import csv
import dataclasses
import errno
import gc
import os
import random
import re
import shutil
import signal
import sys
from functools import partial

import pytest
import torch

from tests.engine import test_train as tiny
from tests.engine.test_step import Net, script
from u2mamba.dataset.pairs import DataError
from u2mamba.engine import checkpoint
from u2mamba.engine.checkpoint import CheckpointError, Damaged, LastFile
from u2mamba.runtime.errors import UserError

# TensorBoard's thread ends when the disk refuses; pytest looks at it before our hook does
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
data = tiny.data  # the fixture: 24 pairs of a bright disc, of which one is held out


@pytest.fixture
def run(data, tmp_path, capsys, monkeypatch):
    """The trainer in this process with a network of one convolution: epochs of 6 iterations -> (code, output)."""
    monkeypatch.setitem(script.ARCHS, "u2netp", Net)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def start(at=None, poison=None, **constants):
        """at: batch of an epoch -> what happens before it; poison: what is done to each batch."""
        planned = script.batches

        def watched(source, plan, size, *more):
            done = (len(source) - len(plan)) // size
            for i, batch in enumerate(planned(source, plan, size, *more), done + 1):
                (at or {}).get(i, lambda: None)()
                yield poison(source, batch) if poison else batch

        monkeypatch.setattr(script, "batches", watched)
        cfg = script.Config(
            model_name="tiny", saved_models=str(tmp_path), arch="u2netp", rescale=40, crop=40, batch_size_train=4,
            epoch_num=1, log_frq=1, save_frq=2, device="cpu", data_dir=str(data), tra_image_dir="images",
            tra_label_dir="masks",
        )  # fmt: skip
        try:
            code = script.run(dataclasses.replace(cfg, **constants), script.DistContext())
        finally:
            monkeypatch.setattr(script, "batches", planned)
        return code, capsys.readouterr().out

    yield start
    for number, handler in handlers.items():
        signal.signal(number, handler)


def flip(path):
    """Inverts the third quarter of the file: some of the bytes between its records nobody would miss."""
    content = path.read_bytes()
    a, b = len(content) // 2, 3 * len(content) // 4
    path.write_bytes(content[:a] + bytes(v ^ 0xFF for v in content[a:b]) + content[b:])


def same(a, b):
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


# ------- what a file holds


def test_a_flipped_bit_is_found_or_harmless(tmp_path):
    """Harmless: in the padding between records. torch.load alone takes flipped weights for weights."""
    path, random_bits = tmp_path / "last.pth", random.Random(0)
    content = {"config": {"lr": 0.5, "name": "x"}, "model": {f"w{i}": torch.randn(60) for i in range(20)}}
    checkpoint.save(content, path)
    good = path.read_bytes()
    found = 0
    for at in random_bits.sample(range(len(good)), 500):
        bad = bytearray(good)
        bad[at] ^= 1 << random_bits.randrange(8)
        path.write_bytes(bad)
        try:
            assert same(checkpoint.load(path), content), at
        except Damaged as error:
            assert str(path) in str(error) and "\n" not in str(error)
            found += 1
    assert found > 250


@pytest.mark.parametrize("content", [b"", bytes(5000), b"PK\x03\x04" + bytes(96)])
def test_what_a_power_cut_leaves_is_damaged_and_not_code(content, tmp_path):
    path = tmp_path / "last.pth"
    path.write_bytes(content)
    with pytest.raises(Damaged):
        checkpoint.load(path)


def test_the_file_before_stays_and_a_failed_write_touches_neither(tmp_path, monkeypatch):
    said = []
    last = LastFile(tmp_path, 5.0, said.append, is_good=True)
    before = tmp_path / "last_before.pth"
    last.write({"n": 1})
    assert not before.exists()
    last.write({"n": 2})
    last.write({"n": 3})
    assert (checkpoint.load(last.path), checkpoint.load(before)) == ({"n": 3}, {"n": 2})
    monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    last.write({"n": 4})
    assert not last.is_safe and "Input/output error" in said[0]
    assert (checkpoint.load(last.path), checkpoint.load(before)) == ({"n": 3}, {"n": 2})
    monkeypatch.undo()
    monkeypatch.setattr(os, "link", lambda a, b: (_ for _ in ()).throw(OSError(errno.EPERM, "no links here")))
    last.write({"n": 5})
    assert (checkpoint.load(last.path), checkpoint.load(before)) == ({"n": 5}, {"n": 3})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.pth", "last_before.pth"]


def test_on_a_full_disk_the_file_before_gives_way(tmp_path, monkeypatch):
    said, before = [], tmp_path / "last_before.pth"
    last = LastFile(tmp_path, 5.0, said.append, is_good=True)
    last.write({"n": 1})
    last.write({"n": 2})
    write = torch.save

    def only_two_files_fit(content, file):
        if before.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, file)

    monkeypatch.setattr(torch, "save", only_two_files_fit)
    last.write({"n": 3})
    assert last.is_safe and not said
    assert checkpoint.load(last.path) == {"n": 3} and not before.exists()


def test_a_damaged_last_pth_never_takes_the_place_of_the_good_one(tmp_path):
    (tmp_path / "last.pth").write_bytes(b"damaged")
    checkpoint.save({"n": 1}, tmp_path / "last_before.pth")
    LastFile(tmp_path, 5.0, print, is_good=False).write({"n": 2})
    assert checkpoint.load(tmp_path / "last.pth") == {"n": 2}
    assert checkpoint.load(tmp_path / "last_before.pth") == {"n": 1}


# ------- what a run goes on from


@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_the_run_goes_on_from_the_file_before_as_if_nothing_was(damage, run, tmp_path):
    run(model_name="whole", epoch_num=2)
    run()
    last, before = tmp_path / "tiny" / "last.pth", tmp_path / "tiny" / "last_before.pth"
    if damage == "flipped":
        flip(last)
    elif damage == "truncated":
        last.write_bytes(last.read_bytes()[:-100])
    else:
        last.unlink()
    code, out = run(epoch_num=2)
    assert code == 0
    assert f"going on from {before}: epoch 1, iteration 6" in out
    assert (f"warning: {last}: is" in out) == (damage != "gone")
    assert same(tiny.weights(tmp_path / "tiny"), tiny.weights(tmp_path / "whole"))
    assert checkpoint.load(before)["progress"]["iteration"] == 12


def test_when_both_are_damaged_the_newest_whole_weights_serve(run, tmp_path):
    run()
    folder = tmp_path / "tiny"
    with (folder / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    rows[-1]["val_maxF"] = "0.999"  # the epoch that best.pth is of; none after it will be as good
    with (folder / "log.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    best = (folder / "best.pth").read_bytes()
    for name in ("last.pth", "last_before.pth"):
        flip(folder / name)
    (_, fourth), (_, sixth) = checkpoint.weight_files(folder)[1:]
    flip(sixth)
    code, out = run(epoch_num=2, lr=0.0, resume="anyway")
    assert code == 0
    for name in ("last.pth", "last_before.pth", sixth.name):
        assert f"warning: {folder / name}: is " in out
    assert f"warning: {fourth} holds weights only: the state of the optimizer" in out
    assert f"going on from {fourth}: epoch 1, iteration 4" in out
    assert "[epoch: 1/2, batch: 20/23, ite: 5]" in out and "ite: 12]" in out
    assert (folder / "best.pth").read_bytes() == best
    kept = torch.load(fourth, weights_only=True)
    assert same(tiny.weights(folder)["conv.weight"], kept["conv.weight"])


def test_when_nothing_is_whole_one_line_says_so_and_nothing_is_touched(run, tmp_path):
    run()
    folder = tmp_path / "tiny"
    for path in folder.glob("*.pth"):
        flip(path)
    before = {p: p.read_bytes() for p in folder.glob("*.pth")}
    with pytest.raises(CheckpointError, match=r"last\.pth: is damaged, and no other checkpoint"):
        run(epoch_num=2)
    assert {p: p.read_bytes() for p in folder.glob("*.pth")} == before


def test_code_in_last_pth_is_refused_although_the_file_before_is_whole(run, tmp_path):
    run()
    torch.save({"model": os.remove}, tmp_path / "tiny" / "last.pth")
    with pytest.raises(CheckpointError, match=r"last\.pth: refused, it holds code \((posix|nt)\.remove\)"):
        run(epoch_num=2)


def test_a_second_run_in_the_same_process_finds_the_folder_free(run):
    gc.disable()  # which frees what a run holds at some later time
    try:
        run()
        assert run(epoch_num=2)[0] == 0
    finally:
        gc.enable()


def test_a_longer_run_would_have_small_crops_for_longer(run):
    run(crop_early=33)
    with pytest.raises(UserError, match="epoch_num: 1 -> 2"):
        run(crop_early=33, epoch_num=2)


def test_a_file_that_goes_while_pairs_are_streamed_costs_no_step(run, data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("u2mamba.dataset.batches.MEMORY_SHARE", 0)  # stream
    copy = shutil.copytree(data, tmp_path / "data")
    goes = partial((copy / "images" / "d12.png").unlink, missing_ok=True)
    with pytest.raises(DataError, match=r"d12\.png.*--resume force"):
        run(at={3: goes}, data_dir=str(copy), epoch_num=2, save_frq=1000)
    done = int(re.findall(r"ite: (\d+)\]", capsys.readouterr().out)[-1])
    assert checkpoint.load(tmp_path / "tiny" / "last.pth")["progress"]["iteration"] == done
    (copy / "masks" / "d12.png").unlink()
    code, out = run(data_dir=str(copy), epoch_num=2, resume="anyway")
    assert code == 0 and f"iteration {done}" in out


# ------- a disk that refuses while the run goes on


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no limit on the size of files")
def test_a_full_disk_costs_warnings_and_not_the_run(run, tmp_path):
    """No file may grow beyond 1 KiB from iteration 3 to 5, which is what a full disk looks like to the writer."""
    import resource

    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = {3: 1024, 6: resource.RLIM_INFINITY}
    at = {i: lambda size=size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard)) for i, size in limit.items()}
    try:
        code, out = run(at=at)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, hard))
    folder = tmp_path / "tiny"
    assert code == 0
    assert f"warning: {folder / 'last.pth'} could not be written (File too large); training goes on" in out
    assert "inline_container" not in out
    assert checkpoint.load(folder / "last.pth")["progress"]["iteration"] == 6
    assert [i for i, _ in checkpoint.weight_files(folder)] == [2, 6]  # 4 was refused
    assert not list(folder.glob(".*"))


def test_a_folder_that_goes_away_costs_the_files_and_the_exit_code_tells(run, tmp_path, capsys):
    folder = tmp_path / "tiny"

    def replace_by_a_file():
        folder.rename(tmp_path / "aside")
        folder.write_text("in the way")

    with pytest.raises(UserError, match=r"the run is over, but .*last\.pth could not be written"):
        run(at={3: replace_by_a_file})
    out = capsys.readouterr().out
    assert "ite: 6]" in out and "last.pth could not be written (File exists)" in out
    assert checkpoint.load(tmp_path / "aside" / "last.pth")["progress"]["iteration"] == 2


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_made_read_only(run, tmp_path, capsys):
    folder = tmp_path / "tiny"
    try:
        with pytest.raises(UserError, match=r"last\.pth could not be written"):
            run(at={3: lambda: folder.chmod(0o500)})
    finally:
        folder.chmod(0o700)
    assert "Permission denied" in capsys.readouterr().out
    assert checkpoint.load(folder / "last.pth")["progress"]["iteration"] == 2


# ------- what is deleted


def test_old_weight_files_go_and_the_rest_stays(run, tmp_path):
    run(save_frq=1, seed=1)
    run(save_frq=1, resume="never", keep_checkpoints=2, epoch_num=2)
    folder = tmp_path / "tiny"
    assert [i for i, _ in checkpoint.weight_files(folder)] == [11, 12]
    assert len(list(folder.glob("tiny_bce_itr_*_1.pth"))) == 6  # the earlier run's, put aside
    for name in ("last.pth", "last_before.pth", "best.pth", "last_1.pth", "best_1.pth"):
        checkpoint.load(folder / name)


def test_a_later_file_of_an_earlier_try_does_not_cost_the_new_one(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    for iteration in (3000, 3500, 4000):
        (folder / checkpoint.weight_file("tiny", iteration, 1, 1)).touch()
    checkpoint.prune(folder, keep=1, iteration=3500)
    assert [i for i, _ in checkpoint.weight_files(folder)] == [3500, 4000]


def test_nothing_is_deleted_when_the_new_file_was_refused(run, tmp_path, monkeypatch):
    write = checkpoint.save

    def refuse_late(content, path, *more):
        if "itr_6" in path.name:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, path, *more)

    monkeypatch.setattr(checkpoint, "save", refuse_late)
    run(keep_checkpoints=1)
    assert [i for i, _ in checkpoint.weight_files(tmp_path / "tiny")] == [4]


def test_what_a_killed_writer_left_is_removed(run, tmp_path):
    (tmp_path / "tiny").mkdir()
    left = tmp_path / "tiny" / ".last-abc.tmp"
    left.write_bytes(b"half")
    run()
    assert not left.exists()
