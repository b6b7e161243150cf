"""What a run prints and records: warnings that name layers and files, log.csv, TensorBoard, the plot of a log."""

import csv
import gc
import math
import re
import threading
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from benchmarks import plot_run
from data_loader import epoch_plan
from model import U2MAMBAP, U2NETP
from tests.engine.tiny import weights
from u2mamba.dataset.augment import INDEX
from u2mamba.engine import logger as module
from u2mamba.engine.logger import TrainLogger
from u2mamba.engine.schedule import TrainState
from u2mamba.runtime.environment import memory_in_use
from u2mamba.runtime.errors import UserError

SCHEDULE = SimpleNamespace(cfg=SimpleNamespace(epoch_num=3), total_iterations=30)


def rows_of(folder):
    with (folder / "log.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize(
    "arch, advised", [(U2NETP, False), (U2MAMBAP, True), (partial(U2MAMBAP, mamba_norm="gate"), False)]
)
def test_an_exploding_layer_is_named_once(tmp_path, capsys, arch, advised):
    net = arch()
    logger = TrainLogger(tmp_path, [], SCHEDULE, TrainState())
    logger._warn_large_activations(net)
    assert capsys.readouterr().out == ""
    net.stage6.rebnconv3d.bn_s1.running_var[3] = 4e19
    logger._warn_large_activations(net)
    logger._warn_large_activations(net)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "stage6.rebnconv3d.bn_s1 (6e+09)" in out
    assert ("mamba_norm" in out) == advised
    logger.__exit__()


def poisoned(*names):
    """Batches in which the images of these names hold NaN."""

    def poison(source, batch):
        stems = [source.pairs[i].stem for i in batch.rows[:, INDEX].tolist()]
        for place in (i for i, stem in enumerate(stems) if stem in names):
            batch.x[place, 0, 0, 0] = math.nan
        return batch

    return poison


def test_a_batch_of_nan_is_skipped_and_its_images_are_named(run, tmp_path):
    code, out = run(poison=poisoned("d13"), log_frq=4, epoch_num=2)
    assert code == 0
    warned = re.findall(r"warning: skipped iteration (\d+): NaN or Inf in (.+); images: (.+)\n", out)
    assert len(warned) == 2  # once per epoch, although a line comes every fourth iteration
    for iteration, outputs, files in warned:
        assert outputs == "d0, d1, d2, d3, d4, d5, d6"
        epoch, place = divmod(int(iteration) - 1, 6)
        plan = epoch_plan(23, epoch, 0, 40, 40)[4 * place : 4 * place + 4, INDEX]
        names = [f"d{i}.png" for i in range(10, 34) if i != 27]
        assert files.split(", ") == [names[i] for i in plan.tolist()] and "d13.png" in files
    assert "ite: 12]" in out and "2 skipped steps" in out
    assert all(v.isfinite().all() for v in weights(tmp_path / "tiny").values())


def test_nan_in_every_batch_ends_the_run_and_it_can_be_resumed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_NONFINITE_STEPS", 5)
    with pytest.raises(UserError, match=r"5 steps in a row gave NaN or Inf \(the last: d0, d1, .*last\.pth"):
        run(poison=poisoned(*[f"d{i}" for i in range(10, 34)]), save_frq=100)
    code, out = run(resume="force", lr=1e-5, epoch_num=2)
    assert code == 0 and "resuming from" in out and "iteration 5" in out
    assert all(v.isfinite().all() for v in weights(tmp_path / "tiny").values())


def test_rows_of_an_epoch_that_is_repeated_are_dropped(tmp_path):
    state = TrainState(iteration=10)
    logger = TrainLogger(tmp_path, ["a"], SCHEDULE, state)
    scores = {"IoU": 0.5, "MAE": 0.1, "maxF": 0.6}
    logger.log_validation(scores, True, 0.1, U2NETP())
    state.end_epoch()
    state.iteration = 20
    logger.log_validation(scores | {"wF": 0.4}, True, 0.1, U2NETP())  # a score more is a column more
    logger.__exit__()
    assert [(r["epoch"], r["val_wF"]) for r in rows_of(tmp_path)] == [("1", ""), ("2", "0.4")]
    TrainLogger(tmp_path, ["a"], SCHEDULE, TrainState(epoch=1, iteration=20)).__exit__()
    assert [row["epoch"] for row in rows_of(tmp_path)] == ["1"]
    TrainLogger(tmp_path, ["a"], SCHEDULE, TrainState(epoch=1, iteration=5)).__exit__()
    assert not rows_of(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1,2,3\n", b"ite,loss\nx,1\n", b"\xff\xfe\x00 not a log"])
def test_a_damaged_log_does_not_stop_a_run(content, tmp_path):
    (tmp_path / "log.csv").write_bytes(content)
    logger = TrainLogger(tmp_path, ["a"], SCHEDULE, TrainState(epoch=1, iteration=20))
    logger.log_validation({"maxF": 0.6}, True, 0.1, U2NETP())
    logger.__exit__()
    assert [(r["ite"], r["val_maxF"]) for r in rows_of(tmp_path)] == [("20", "0.6")]


def test_tensorboard_holds_each_value_and_the_images(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(epoch_num=2)
    events = accumulator.EventAccumulator(str(tmp_path / "tiny" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    rows = rows_of(tmp_path / "tiny")
    columns = {f"train/d{i}": f"d{i}" for i in range(1, 7)} | {"train/d0": "tar", "train/data wait": "wait"}
    columns |= {f"train/{name}": name for name in ("loss", "IoU", "lr", "images_s", "memory_GiB", "skipped_steps")}
    columns |= {f"val/{name}": f"val_{name}" for name in ("IoU", "MAE", "maxF")}
    assert set(events.Tags()["scalars"]) == set(columns)
    for tag, column in columns.items():
        drawn = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(tag)]
        assert drawn == [(int(r["ite"]), float(r[column])) for r in rows if r[column]]
    assert [e.step for e in events.Images("validation/image, mask, d0")] == [2, 4, 6, 8, 10, 12]


def test_the_plot_of_a_log(run, tmp_path, capsys):
    run(epoch_num=2)
    plot_run.main(plot_run.Config(folder=str(tmp_path / "tiny")))
    path = tmp_path / "tiny" / "curves.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # lines, not only frames


def test_a_warmup_longer_than_the_run_is_warned_of(run):
    assert "warning: warmup_iters = 7 exceeds the run's 6 iterations" in run(warmup_iters=7)[1]
    assert "warmup_iters" not in run(warmup_iters=6, model_name="other")[1]


def test_a_run_of_many_iterations_does_not_grow(run):
    """Memory and threads of the second half of 360 iterations."""
    held = []

    def look():
        gc.collect()
        held.append((1024 * memory_in_use(torch.device("cpu")), threading.active_count()))

    run(at={1: look}, epoch_num=60, log_frq=6, val_frq=10, save_frq=60, keep_checkpoints=3)
    assert len(held) == 60
    assert held[-1][0] - held[25][0] < 24 and held[-1][1] <= held[25][1] + 1  # MiB, threads
