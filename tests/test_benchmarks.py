"""The benchmarks start: a name that moved away shows here and not months later."""

import importlib
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from u2mamba.runtime.config import LIMITS, check_settings, differences
from u2mamba.runtime.errors import UserError

NAMES = sorted(p.stem for p in (Path(__file__).parents[1] / "benchmarks").glob("*.py") if p.stem != "__init__")


@pytest.mark.parametrize("name", NAMES)
def test_it_imports(name):
    importlib.import_module(f"benchmarks.{name}")


def test_predict_runs(capsys):
    predict = importlib.import_module("benchmarks.predict")
    predict.main(predict.Options(arch="u2netp", size=64, count=4, runs=1, device="cpu"))
    assert "ratio:" in capsys.readouterr().out


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


def test_what_the_terms_on_trial_measure():
    trials = importlib.import_module("benchmarks.trials")
    mask = torch.zeros(2, 1, 40, 40)
    mask[..., 10:30, 10:30] = 1
    right, wrong = (20 * (2 * mask - 1),) * 7, (20 * (1 - 2 * mask),) * 7
    good, bad = trials.ssim_term(right, mask), trials.ssim_term(wrong, mask)
    assert good.shape == (7,) and good.abs().max() < 1e-3 and bad.min() > 0.5
    one_off = (*right[:6], wrong[0])
    kl = trials.kl_term(one_off, mask)
    assert kl[:6].abs().max() < 1e-5 and kl[6] > 10


def test_dropout_on_trial_drops_in_training_only():
    trials = importlib.import_module("benchmarks.trials")
    with trials.TRIALS["dropout of channels"]():
        net = importlib.import_module("u2mamba_train").ARCHS["u2netp"]()
    x = torch.rand(1, 3, 64, 64)
    assert torch.equal(net.eval()(x)[0], net(x)[0])
    norms = [m for m in net.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for m in net.train().modules():
        m.training = m not in norms  # so that only the dropout differs
    assert not torch.equal(net(x)[0], net(x)[0])
