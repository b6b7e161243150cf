"""The benchmarks start: a name that moved away shows here and not months later."""

import importlib
from pathlib import Path

import pytest

NAMES = sorted(p.stem for p in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


def test_median_and_spread_by_hand():
    hardware = importlib.import_module("benchmarks.hardware")
    assert hardware.median_and_spread([3.0, 1.0, 2.0, 7.0, 2.5]) == (2.5, 3.0)
