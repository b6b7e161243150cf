"""The benchmarks start: a name that moved away shows here and not months later."""

import importlib
from dataclasses import asdict
from pathlib import Path

import pytest

from engine.run import UserError
from engine.settings import LIMITS, check_settings, differences

NAMES = sorted(p.stem for p in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


def test_median_and_spread_by_hand():
    hardware = importlib.import_module("benchmarks.hardware")
    assert hardware.median_and_spread([3.0, 1.0, 2.0, 7.0, 2.5]) == (2.5, 3.0)


@pytest.mark.parametrize("arch", ["u2mamba", "u2mambap"])
def test_every_variant_of_the_ablation_is_a_run_of_its_own(arch):
    ablation = importlib.import_module("benchmarks.ablation")
    made = {name: ablation.config_of(name, ablation.Options(arch=arch)) for name in ablation.VARIANTS}
    for name, config in made.items():
        check_settings(config, LIMITS)
        kept = set(differences(asdict(made["recipe"]), asdict(config), {"model_name"}))
        assert bool(kept) == (name != "recipe" and name not in ablation.TRIALS), name
    assert len({config.model_name for config in made.values()}) == len(made)


def test_the_ablation_names_odd_overrides():
    ablation = importlib.import_module("benchmarks.ablation")
    for odd, said in {'{"lrr": 1}': "lrr", '{"lr": "a"}': "lr = 'a'", "{": "--overrides"}.items():
        with pytest.raises(UserError, match=said):
            ablation.config_of("recipe", ablation.Options(overrides=odd))
