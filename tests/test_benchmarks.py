"""Every benchmark explains itself, and measures something tiny on the CPU."""

import importlib
from pathlib import Path

import pytest
import tyro

from u2mamba.dataset.demo import make_demo
from u2mamba.engine.distributed import DistContext

NAMES = {p.stem for p in (Path(__file__).parents[1] / "benchmarks").glob("*.py")} - {"__init__", "hardware"}
SMALL = "--arch u2mambap --size 64 --runs 1 --device cpu"
TINY = {  # name: (options, what one of the last lines holds)
    "train_step": (f"{SMALL} --batches 2 --steps 1 --variants baseline fast", "1 × batch   2, fast"),
    "scan": ("--runs 1 --memory_length 64 --ratio_length 32 --device cpu", "ratio: "),
    "inference": (f"{SMALL} --warm_up 1 --cold_runs 0", "Predictor"),
    "cutout": ("--count 1 --width 160", "true alpha"),
    "data": ("--data {demo} --runs 1", "cached "),
    "remove_mamba": ("--data {demo} --size 64 --device cpu --each", "without stage1d.mamba"),
}


@pytest.mark.parametrize("name", sorted(NAMES))
def test_it_explains_itself_and_measures(name, tmp_path, capsys):
    module = importlib.import_module(f"benchmarks.{name}")
    with pytest.raises(SystemExit, match="0"):
        tyro.cli(module.Config, description=module.__doc__, use_underscores=True, args=["--help"])
    assert f"python -m benchmarks.{name}" in module.__doc__
    if name in TINY:
        make_demo(tmp_path, n=60)
        words, shown = TINY[name]
        words = words.format(demo=next(tmp_path.rglob("im_aug")).parent).split()
        cfg = tyro.cli(module.Config, use_underscores=True, args=words)
        assert not module.main(*(cfg, DistContext()) if name == "train_step" else (cfg,))
        assert any(shown in line for line in capsys.readouterr().out.splitlines()[-2:])
