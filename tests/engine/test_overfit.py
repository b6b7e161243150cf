"""The sanity check: it learns one pair and says so, or says why not."""

import re

import pytest
import torch

import u2mamba_train as script
from data_loader import open_data, train_val_split
from tests.engine.tiny import Net
from u2mamba.dataset.pairs import pair_folders
from u2mamba.engine import overfit as module
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.overfit import overfit
from u2mamba.engine.step import TrainStep
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import UserError


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


@pytest.fixture
def source(data, tmp_path):
    return open_data(*train_val_split(pair_folders(data / "images", data / "masks")), 32, cache_dir=tmp_path).train


def check(source, folder, count, lr=1e-3, dist=DistContext()):  # noqa: B008 - immutable
    net = Net()
    optimizer = torch.optim.Adam(net.parameters(), lr=lr, fused=True)
    step = TrainStep(net, optimizer, script.multi_bce_loss_fusion, Environment(torch.device("cpu")), dist)
    return overfit(step, source, count, 2, folder)


def test_overfit_says_that_it_failed(source, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 20)
    with pytest.raises(UserError, match=r"overfit failed, IoU 0\.\d+ after 20 iterations") as error:
        check(source, tmp_path, 3, lr=0.0)
    assert str(tmp_path / "preview.png") in str(error.value) and "\n" not in str(error.value)
    assert (tmp_path / "preview.png").exists()


def test_overfit_requires_pairs_that_show_an_object_and_one_process(source, tmp_path):
    with pytest.raises(UserError, match="overfit = 30: only 23 training pairs"):
        check(source, tmp_path, 30)
    with pytest.raises(UserError, match="one process"):
        check(source, tmp_path, 1, dist=DistContext(0, 2, 0, 2))
