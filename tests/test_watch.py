"""Before and beside a run: the overfit check, pretrained weights, bad batches by name, the curves."""

import dataclasses
import re

import pytest
import torch

from data_loader import open_data
from engine import overfit as module
from engine.overfit import overfit
from engine.run import UserError
from model import U2MAMBAP, U2NET, U2NETP
from tests import test_train as tiny
from tests.test_step import Net, make, script

data = tiny.data  # the fixture: 24 pairs of a bright disc


@pytest.fixture
def run(data, tmp_path, capsys):
    """Runs the trainer with small constants in this process, which saves the seconds of a start -> (code, output)."""

    def start(**constants):
        cfg = script.Config(
            model_name="tiny", saved_models=str(tmp_path), arch="u2mambap", rescale=48, crop=40, batch_size_train=8,
            epoch_num=1, log_frq=1, save_frq=3, device="cpu", data_dir=str(data), tra_image_dir="images",
            tra_label_dir="masks",
        )  # fmt: skip
        code = script.run(dataclasses.replace(cfg, **constants))
        return code, capsys.readouterr().out

    return start


class Never:
    exit_code = 0

    def __bool__(self):
        return False


# ------- overfit


def test_overfit_learns_one_pair_and_writes_one_picture(run, tmp_path):
    code, out = run(overfit=1, lr=2e-3, rescale=64)
    assert code == 0
    iou = [float(v) for v in re.findall(r"IoU: (\d\.\d{3})\n", out)]
    assert iou[-1] > 0.95 >= max(iou[:-1])
    assert f"learned, IoU {iou[-1]:.3f} after {10 * len(iou)} iterations" in out
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()) == [
        "tiny_overfit/preview.png",
        "tiny_overfit/run.lock",
    ]


def source_of(data):
    return open_data(data / "images", data / "masks", cache=False, size=32, say=lambda line: None).train


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
    constants = {"pretrained": str(weights), "lr": 0.0}
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
        run(epoch_num=3, pretrained="other.pth", lr=0.0)


@pytest.mark.parametrize(("content", "says"), [(None, "there is no such checkpoint"), (U2NET, "u2netp.pth U2NETP")])
def test_pretrained_weights_that_do_not_fit(content, says, run, tmp_path):
    weights, kept = tmp_path / "weights.pth", tmp_path / "tiny" / "best.pth"
    kept.parent.mkdir()
    kept.write_bytes(b"an earlier run")
    if content:
        torch.save(content().state_dict(), weights)
    with pytest.raises(UserError) as error:
        run(pretrained=str(weights))
    assert str(weights) in str(error.value) and says in str(error.value) and "\n" not in str(error.value)
    assert kept.read_bytes() == b"an earlier run"
