"""Before and beside a run: the overfit check, pretrained weights, bad batches by name, the curves."""

import csv
import math
import re
import sys
from functools import partial

import pytest
import torch
from PIL import Image

from benchmarks import plot_run
from data_loader import DataSource, epoch_plan, pair_folders, train_val_split
from model import U2MAMBAP, U2NET, U2NETP
from model.weights import cpu_state_dict
from tests.engine import long_run
from tests.engine import test_bad_storage as storage
from tests.engine import test_train as tiny
from tests.engine.test_step import Net, batch, make
from u2mamba.dataset.augment import INDEX
from u2mamba.engine import overfit as module
from u2mamba.engine.logger import TrainLogger
from u2mamba.engine.overfit import overfit
from u2mamba.engine.step import RECENT, TrainStep
from u2mamba.runtime.environment import seed_everything
from u2mamba.runtime.errors import UserError

data, run = tiny.data, storage.run  # fixtures: 24 pairs of a bright disc; the trainer in this process
SMALL = {"arch": "u2mambap", "batch_size_train": 12, "save_frq": 100}


class Never:
    exit_code = 0

    def __bool__(self):
        return False


# ------- overfit


def test_overfit_learns_one_pair_and_writes_one_picture(run, tmp_path):
    code, out = run(overfit=1, lr=2e-3, rescale=64, arch="u2mambap")
    assert code == 0
    iou = [float(v) for v in re.findall(r"IoU: (\d\.\d{3})\n", out)]
    assert iou[-1] > 0.95 >= max(iou[:-1])
    assert f"learned, IoU {iou[-1]:.3f} after {10 * len(iou)} iterations" in out
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "tiny_overfit/preview.png",
        "tiny_overfit/run.lock",
    ]


def source_of(data):
    return DataSource(train_val_split(pair_folders(data / "images", data / "masks"))[0], 32)


def test_overfit_says_that_it_failed(data, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MOST_STEPS", 20)
    step = make(Net())
    step.set_learning_rate(0.0)
    with pytest.raises(UserError, match=r"overfit failed, IoU 0\.\d+ after 20 iterations") as error:
        overfit(step, source_of(data), 3, 2, False, tmp_path, Never())
    assert str(tmp_path / "preview.png") in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "preview.png").exists()


def test_overfit_wants_pairs_that_show_an_object(data, tmp_path):
    with pytest.raises(UserError, match="overfit = 30: only 23 training pairs"):
        overfit(make(Net()), source_of(data), 30, 2, False, tmp_path, Never())


# ------- pretrained weights


def parameters(folder):
    state = tiny.weights(folder)
    return {k: v for k, v in state.items() if "running" not in k and "num_batches" not in k}


def test_a_run_starts_from_pretrained_weights_once(run, tmp_path):
    torch.manual_seed(5)
    public = U2NETP().state_dict()
    weights = tmp_path / "u2netp.pth"
    torch.save({f"module.{k}": v for k, v in public.items()}, weights)
    constants = SMALL | {"pretrained": str(weights), "lr": 0.0}
    code, out = run(**constants)
    assert code == 0
    new = len(U2MAMBAP().state_dict()) - len(public)
    assert f"pretrained: {len(public)} tensors matched, {new} new ({weights})" in out
    for key, value in parameters(tmp_path / "tiny").items():
        if key in public:
            assert torch.equal(value, public[key]), key
        elif key.endswith("out_proj.weight"):
            assert not value.any(), key
    weights.unlink()  # the run that goes on needs it no more
    code, out = run(epoch_num=2, **constants)
    assert code == 0 and "going on from" in out and "pretrained" not in out
    with pytest.raises(UserError, match=r"u2netp\.pth' -> 'other\.pth'"):
        run(epoch_num=3, **constants | {"pretrained": "other.pth"})


def test_a_run_starts_anew_from_its_own_best_weights(run, tmp_path):
    run(lr=1e-2)
    best = tmp_path / "tiny" / "best.pth"
    kept = torch.load(best, weights_only=True)
    code, out = run(lr=0.0, resume="never", pretrained=str(best))
    assert code == 0 and f"({best})" in out and "now end in _1" in out
    assert torch.equal(tiny.weights(tmp_path / "tiny")["conv.weight"], kept["conv.weight"])
    assert storage.same(torch.load(tmp_path / "tiny" / "best_1.pth", weights_only=True), kept)


@pytest.mark.parametrize(
    ("content", "says"), [(None, "there is no such checkpoint"), (U2NET, "fits arch u2net and u2mamba")]
)
def test_pretrained_weights_that_do_not_fit(content, says, run, tmp_path):
    weights, kept = tmp_path / "weights.pth", tmp_path / "tiny" / "best.pth"
    kept.parent.mkdir()
    kept.write_bytes(b"an earlier run")
    if content:
        torch.save(content().state_dict(), weights)
    with pytest.raises(UserError) as error:
        run(pretrained=str(weights), **SMALL)
    assert str(weights) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert kept.read_bytes() == b"an earlier run"


def test_missing_pretrained_weights_are_told_before_the_data_are_read(run, tmp_path):
    with pytest.raises(UserError, match="there is no such checkpoint"):
        run(pretrained=str(tmp_path / "weights.pth"), data_dir=str(tmp_path / "nowhere"), **SMALL)


@pytest.mark.parametrize(("trained", "told"), [(320, True), (48, False)])
def test_weights_for_another_size_are_told(trained, told, run, tmp_path):
    (tmp_path / "other").mkdir()
    torch.save(cpu_state_dict(U2NETP(), trained), tmp_path / "other" / "best.pth")
    code, out = run(pretrained=str(tmp_path / "other" / "best.pth"), **SMALL)
    assert code == 0 and (f"warning: weights trained at {trained} pixels" in out) == told


# ------- layers that have grown


@pytest.mark.parametrize(
    "arch, advised", [(U2NETP, False), (U2MAMBAP, True), (partial(U2MAMBAP, mamba_norm="gate"), False)]
)
def test_a_grown_layer_is_named_once(tmp_path, capsys, arch, advised):
    net = arch()
    report = TrainLogger(tmp_path, 1, [], 1)
    report.name_grown_layers(net)
    assert capsys.readouterr().out == ""
    net.stage6.rebnconv3d.bn_s1.running_var[3] = 4e19
    report.name_grown_layers(net)
    report.name_grown_layers(net)
    out = capsys.readouterr().out
    assert out.count("\n") == 1 and "stage6.rebnconv3d.bn_s1 (6e+09)" in out
    assert ("mamba_norm" in out) == advised
    report.close()


# ------- batches that are not finite


def poisoned(*names):
    """Batches in which the pictures of these names hold NaN."""

    def poison(source, batch):
        stems = [source.pairs[i].stem for i in batch.rows[:, INDEX].tolist()]
        for place in (i for i, stem in enumerate(stems) if stem in names):
            batch.x[place, 0, 0, 0] = math.nan
        return batch

    return poison


def test_a_bad_batch_is_left_out_and_named(run, tmp_path):
    code, out = run(poison=poisoned("d13"), log_frq=4, epoch_num=2)
    assert code == 0
    warned = re.findall(r"warning: iteration (\d+) is left out, (.+) not finite, of (.+)\n", out)
    assert len(warned) == 2  # once an epoch, although a line comes every fourth iteration
    for iteration, outputs, files in warned:
        assert outputs == "d0, d1, d2, d3, d4, d5, d6"
        epoch, place = divmod(int(iteration) - 1, 6)
        plan = epoch_plan(23, epoch, 0, 32, 32)[4 * place : 4 * place + 4, INDEX]
        names = [f"d{i}.png" for i in range(10, 34) if i != 27]
        assert files.split(", ") == [names[i] for i in plan.tolist()] and "d13.png" in files
    assert "ite: 12]" in out and "2 bad steps" in out
    assert all(v.isfinite().all() for v in tiny.weights(tmp_path / "tiny").values())


def test_only_the_output_that_was_not_finite_is_named():
    def loss(logits, masks):
        losses = torch.stack([d.mean() for d in logits])
        return losses + torch.tensor([0.0, 0, 0, math.inf, 0, 0, math.nan])

    net = Net()
    step = TrainStep(net, torch.optim.Adam(net.parameters(), fused=True), loss, torch.device("cpu"))
    step(*batch())
    assert step.read().not_finite == {0: "d3, d6"}
    step.loss = lambda logits, masks: torch.stack([d.abs().sqrt().mean() * 0 for d in logits])
    net.bn.weight.data.zero_()  # sqrt at 0: a finite loss with a gradient of 0 * inf
    step(*batch())
    assert step.read().not_finite == {0: "the gradient", 1: "d3, d6"}
    for _ in range(RECENT):
        step.loss = lambda logits, masks: torch.stack([d.mean() for d in logits])
        step(*batch())
    assert step.read().not_finite == {}


def test_a_run_of_bad_batches_stops_with_the_outputs_named_and_can_go_on(run, tmp_path):
    everything = [f"d{i}" for i in range(10, 34)]
    with pytest.raises(UserError, match=r"5 steps in a row were not finite \(the last: d0, d1, .*last\.pth"):
        run(poison=poisoned(*everything), max_bad_steps=5, save_frq=100)
    code, out = run(resume="anyway", lr=1e-5, epoch_num=2, max_bad_steps=5)
    assert code == 0 and "going on from" in out and "iteration 5" in out
    assert all(v.isfinite().all() for v in tiny.weights(tmp_path / "tiny").values())


# ------- curves


def test_tensorboard_holds_each_figure_and_the_pictures(run, tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    run(epoch_num=2)
    events = accumulator.EventAccumulator(str(tmp_path / "tiny" / "tensorboard"), size_guidance={"images": 0})
    events.Reload()
    with (tmp_path / "tiny" / "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    columns = {f"train/d{i}": f"d{i}" for i in range(1, 7)} | {"train/d0": "tar", "train/data wait": "wait"}
    columns |= {f"train/{name}": name for name in ("loss", "IoU", "lr", "img_s", "memory_GiB", "bad_steps")}
    columns |= {f"val/{name}": f"val_{name}" for name in ("IoU", "MAE", "maxF")}
    assert set(events.Tags()["scalars"]) == set(columns)
    for tag, column in columns.items():
        drawn = [(e.step, pytest.approx(e.value, rel=1e-5)) for e in events.Scalars(tag)]
        assert drawn == [(int(r["ite"]), float(r[column])) for r in rows if r[column]]
    assert [e.step for e in events.Images("held-out/image, mask, d0")] == [2, 4, 6, 8, 10, 12]


def test_the_plot_of_a_log(run, tmp_path, capsys):
    run(epoch_num=2)
    plot_run.main(plot_run.Config(folder=str(tmp_path / "tiny")))
    path = tmp_path / "tiny" / "curves.png"
    assert str(path) in capsys.readouterr().out
    with Image.open(path) as picture:
        assert picture.size == (1500, 800)
        assert len(picture.convert("RGB").getcolors(1 << 20)) > 20  # lines, not only frames
    read = plot_run.read_log(tmp_path / "tiny" / "log.csv")
    assert [x for x, _ in read["d6"]] == list(range(1, 13)) and [x for x, _ in read["val_maxF"]] == [6, 12]


@pytest.mark.parametrize("content", [None, b"", b"1,2,3\n", b"ite,loss\n", b"\xff\xfe\x00"])
def test_a_log_that_cannot_be_drawn_is_named(content, tmp_path):
    if content is not None:
        (tmp_path / "log.csv").write_bytes(content)
    with pytest.raises(UserError) as error:
        plot_run.main(plot_run.Config(folder=str(tmp_path)))
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)
    assert not (tmp_path / "curves.png").exists()


# ------- the same result twice, and runs that do not grow


def test_deterministic_is_asked_of_pytorch_and_changes_nothing_on_the_cpu(run, tmp_path):
    try:
        run(**SMALL | {"model_name": "plain"})
        assert not torch.are_deterministic_algorithms_enabled()
        run(**SMALL | {"model_name": "exact", "deterministic": True})
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    finally:
        seed_everything(0)
    assert storage.same(tiny.weights(tmp_path / "plain"), tiny.weights(tmp_path / "exact"))


@pytest.mark.skipif(sys.platform != "linux", reason="memory and open files are read from /proc")
def test_a_run_of_a_thousand_iterations_does_not_grow(data, monkeypatch):
    monkeypatch.setattr(long_run.u2mamba_train, "ARCHS", dict(long_run.u2mamba_train.ARCHS))
    monkeypatch.setattr(long_run.u2mamba_train, "batches", long_run.u2mamba_train.batches)
    monkeypatch.setattr(long_run.u2mamba_train, "StopSignal", Never)  # which leaves Ctrl-C to pytest
    folders = {"data_dir": str(data), "tra_image_dir": "images", "tra_label_dir": "masks"}
    looks = long_run.measure(1000, epoch_num=84, **folders)
    assert len(looks) == 10
    assert looks[-1]["RSS, MiB"] - looks[2]["RSS, MiB"] < 24
    # a log or TensorBoard's file may be open at a look; one kept open at each of the 50 savings would show
    assert looks[-1]["files"] <= looks[2]["files"] + 3 and looks[-1]["threads"] <= looks[2]["threads"] + 1


# ------- what the start says


def test_a_warm_up_that_never_ends_is_warned_of(run):
    assert "warning: warmup = 7 is longer than the run of 6 iterations" in run(warmup=7)[1]
    assert "warmup" not in run(warmup=6, model_name="other")[1]
