"""Constants of the wrong type or out of range are refused by name; presets and keys change what they should."""

from dataclasses import dataclass
from typing import Literal

import pytest

from u2mamba.runtime.config import (
    CONSTANTS,
    check_settings,
    check_together,
    differences,
    input_size,
    read_settings,
    tell_odd_sizes,
)
from u2mamba.runtime.errors import UserError
from u2mamba_train import Config


@dataclass
class Constants:
    lr: float = 1e-4
    batch: int = 12
    arch: Literal["a", "b"] = "a"
    cache: bool = True
    name: str = "u2net"


LIMITS = {"lr": (0, 10), "batch": (1, 64)}
PRESETS = {"fast": Constants(lr=1e-3, batch=32)}


def read(*argv):
    return read_settings(Constants(), PRESETS, LIMITS, argv)


def test_defaults_presets_and_keys():
    assert read() == Constants()
    assert read("fast") == Constants(lr=1e-3, batch=32)
    assert read("fast", "--lr", "0.5", "--arch", "b", "--no-cache") == Constants(0.5, 32, "b", False)
    assert read("--batch", "3").batch == 3


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"lr": "1e-4"}, "lr = '1e-4': must be of type float"),
        ({"lr": -1.0}, "lr = -1.0: must be from 0 to 10"),
        ({"lr": float("nan")}, "lr = nan"),
        ({"batch": 12.0}, "batch = 12.0: must be of type int"),
        ({"batch": True}, "batch = True"),
        ({"batch": 0}, "batch = 0: must be from 1 to 64"),
        ({"arch": "c"}, "arch = 'c': must be one of 'a', 'b'"),
        ({"cache": 1}, "cache = 1: must be of type bool"),
        ({"name": None}, "name = None"),
    ],
)
def test_wrong_constants_are_named(wrong, says):
    with pytest.raises(UserError) as error:
        check_settings(Constants(**wrong), LIMITS)
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_an_int_is_a_float():
    check_settings(Constants(lr=1), LIMITS)


def test_unknown_preset_lists_those_there_are():
    with pytest.raises(UserError, match=r"fastest.*fast"):
        read("fastest")


@pytest.mark.parametrize("argv", [("--lr", "1", "fast"), ("--no-cache", "fast"), ("--batch", "3", "fast", "--lr", "1")])
def test_a_preset_that_does_not_come_first_is_told_so(argv):
    with pytest.raises(UserError, match=r"the preset comes first: python \S* fast --key value"):
        read(*argv)
    assert read("--name", "fast").name == "fast"  # a value is no preset


@pytest.mark.parametrize("argv", [("--learning-rate", "1"), ("--lr", "much"), ("--batch", "1.5"), ("--arch", "c")])
def test_unusable_words_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_differences_name_both_values_and_skip_what_may_change():
    a, b = {"lr": 1, "gpu": 0, "sizes": [1, 2]}, {"lr": 2, "gpu": 1, "sizes": (1, 2), "new": 3}
    assert differences(a, b, {"gpu"}) == ["lr: 1 -> 2", "new: None -> 3"]


@pytest.mark.parametrize(
    ("kept", "size"),
    [
        ('{"rescale": 96}', 96),
        (None, 320),
        ("{", 320),
        ('{"rescale": "96"}', 320),
        ('{"rescale": 7}', 320),
        ("[]", 320),
    ],
)
def test_size_of_the_training_is_found_beside_the_weights(kept, size, tmp_path):
    if kept:
        (tmp_path / CONSTANTS).write_text(kept)
    assert input_size(0, tmp_path / "best.pth") == size
    assert input_size(224, tmp_path / "best.pth") == 224


@pytest.mark.parametrize(
    ("constants", "said"),
    [
        ({"batch_size_train": 9}, "a batch of 18 is more than the 16 pairs"),
        ({"warmup": 5}, "give a smaller warmup"),
        ({}, ""),
    ],
)
def test_odd_sizes_are_told(capsys, constants, said):
    tell_odd_sizes(Config(**{"batch_size_train": 8, "warmup": 4} | constants), pairs=16, processes=2, iterations=4)
    assert said in (out := capsys.readouterr().out) and bool(out) == bool(said)


def test_pretrained_weights_are_looked_for_where_a_run_begins_and_saved_models_are_read(tmp_path):
    config = Config(saved_models=str(tmp_path), pretrained=str(tmp_path / "gone.pth"))
    with pytest.raises(UserError, match="there is no such checkpoint"):
        check_together(config)
    check_together(config, files=False)  # another machine, which has no saved_models
    (tmp_path / config.model_name).mkdir()
    (tmp_path / config.model_name / "last.pth").touch()
    check_together(config)  # goes on
