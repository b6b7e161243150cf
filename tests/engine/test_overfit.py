"""The sanity check: it learns one pair and says so, or says why not."""

import re
from types import SimpleNamespace

import pytest

from u2mamba.engine import overfit as module
from u2mamba.engine.distributed import DistContext
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


def test_overfit_says_that_it_failed(run, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "MAX_STEPS", 20)
    with pytest.raises(UserError, match=r"overfit failed, IoU 0\.\d+ after 20 iterations") as error:
        run(overfit=3, lr=0.0)
    preview = tmp_path / "tiny_overfit" / "preview.png"
    assert str(preview) in str(error.value) and "\n" not in str(error.value) and preview.exists()


def test_overfit_requires_pairs_that_show_an_object_and_one_process(run, tmp_path):
    with pytest.raises(UserError, match="overfit = 30: only 23 training pairs"):
        run(overfit=30)
    with pytest.raises(UserError, match="one process"):
        module.overfit(SimpleNamespace(dist=DistContext(0, 2, 0, 2)), None, 1, 2, tmp_path)
