"""Every benchmark starts, and measures something tiny on the CPU."""

import importlib
from pathlib import Path

import pytest
import tyro

from u2mamba.dataset.demo import make_demo
from u2mamba.engine.distributed import DistContext

NAMES = {p.stem for p in (Path(__file__).parents[1] / "benchmarks").glob("*.py")} - {"__init__", "hardware"}
SMALL = "--arch u2mambap --size 64 --runs 1 --device cpu"
TINY = {  # name: (options, what the last line holds)
    "train_step": (f"{SMALL} --batches 2 --steps 1 --variants baseline fast", "1 × batch   2, fast"),
    "scan": ("--runs 1 --lengths 64 --ratio_length 32 --device cpu", "ratio: "),
    "inference": (f"{SMALL} --warm_up 1", "Predictor"),
    "data": ("--data {demo} --runs 1", "cached "),
    "remove_mamba": (
        "--data_dir {demo} --tra_image_dir im_aug --tra_label_dir gt_aug --size 64 --each --device cpu",
        "without stage1d.mamba",
    ),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    make_demo(tmp_path_factory.mktemp("benchmarks"), n=60)
    return next(tmp_path_factory.getbasetemp().glob("benchmarks*/*/*"))


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_explains_itself(name, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit) as end:
        tyro.cli(module.Config, description=module.__doc__, use_underscores=True, args=["--help"])
    assert end.value.code == 0 and f"python -m benchmarks.{name}" in module.__doc__


@pytest.mark.parametrize("name", TINY)
def test_it_measures(name, demo, capsys):
    module, (words, shown) = importlib.import_module(f"benchmarks.{name}"), TINY[name]
    cfg = tyro.cli(module.Config, use_underscores=True, args=words.format(demo=demo).split())
    assert not module.main(*(cfg, DistContext()) if name == "train_step" else (cfg,))
    lines = capsys.readouterr().out.splitlines()
    assert "PyTorch" in lines[1] and any(shown in line for line in lines[-2:]), lines


def test_median_and_spread_by_hand():
    hardware = importlib.import_module("benchmarks.hardware")
    assert hardware.median_and_spread([3.0, 1.0, 2.0, 7.0, 2.5]) == (2.5, 3.0)
