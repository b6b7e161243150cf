"""Settings of the wrong type or out of range are refused by name; presets and keys change what they should."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import pytest

from u2mamba.runtime.config import OLD_NAMES, Range, check_settings, read_settings, to_dict
from u2mamba.runtime.errors import UserError


@dataclass
class Settings:
    lr: Annotated[float, Range(0, 10)] = 1e-4
    batch: Annotated[int, Range(1, 64)] = 12
    arch: Literal["a", "b"] = "a"
    shuffle: bool = True
    name: str = "u2net"
    mode: tuple[Literal["map", "mask"], ...] = ("map",)
    weights: Annotated[list[float], Range(0, 2)] = field(default_factory=lambda: [1.0, 0.5])
    listing: Path = Path("names.txt")


PRESETS = {"fast": Settings(lr=1e-3, batch=32)}


def read(*argv):
    return read_settings(Settings(), PRESETS, argv)


def test_defaults_presets_and_keys():
    assert read() == Settings()
    assert read("fast") == Settings(lr=1e-3, batch=32)
    check_settings(Settings(lr=1))
    assert read("fast", "--lr", "0.5", "--arch", "b", "--no-shuffle") == Settings(0.5, 32, "b", False)
    assert read("--batch", "3", "--mode", "mask", "map") == Settings(batch=3, mode=("mask", "map"))
    plain = to_dict(read("--weights", "2", "1"))
    assert (plain["mode"], plain["weights"], plain["listing"]) == (["map"], [2.0, 1.0], "names.txt")


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
        ({"shuffle": 1}, "shuffle = 1: must be of type bool"),
        ({"name": None}, "name = None"),
        ({"mode": ("map", "x")}, "mode = ('map', 'x')"),
        ({"weights": [1.0, 3.0]}, "weights = [1.0, 3.0]: must be from 0 to 2"),
    ],
)
def test_wrong_settings_are_named(wrong, says):
    with pytest.raises(UserError) as error:
        check_settings(Settings(**wrong))
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def test_the_home_folder_is_expanded_on_the_command_line_and_in_the_file(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("USERPROFILE", "/home/me")
    assert read("--name=~/a").name == "/home/me/a"
    assert read_settings(Settings(name="~/b"), argv=()).name == "/home/me/b"


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (("--shuffle", "False"), "--shuffle takes no value: --shuffle switches it on, --no-shuffle off"),
        (("--no-shuffle=True",), "--shuffle takes no value: --shuffle switches it on, --no-shuffle off"),
        (("--batches", "3"), "--batches: there is no such option; did you mean --batch?"),
        (("--lr", "1", "fast"), "the preset comes first: python "),
        (("--no-shuffle", "fast"), "the preset comes first: python "),
        (("--mirror", "0.5"), "--mirror: now --hflip_prob"),
        (("fast", "--crop-early=128"), "--crop_early: now --early_crop"),
        (("--beyond", "0.3"), "--beyond: now --scale_max, 1 plus its value"),
        (("--no-cache",), "--cache: gone"),
        (("--paste", "0.1"), "--paste: gone (it lowered the scores)"),
        (("--resume", "anyway"), "--resume anyway: now --resume force"),
        (("--resume=anyway",), "--resume anyway: now --resume force"),
        (("--mode", "map", "rgba"), "--mode rgba: now --mode cutout"),
        (("best",), "best: now fast_4gpu"),
        (("fastest",), "fastest: no such preset; choose one of fast"),
    ],
)
def test_a_wrong_word_names_the_right_one(argv, says):
    with pytest.raises(UserError) as error:
        read(*argv)
    assert str(error.value).startswith(says) and "\n" not in str(error.value)


@pytest.mark.parametrize("argv", [("--learning-rate", "1"), ("--lr", "much"), ("--batch", "1.5"), ("--arch", "c")])
def test_unusable_words_end_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as end:
        read(*argv)
    assert end.value.code == 2
    assert argv[0] in capsys.readouterr().err


def test_values_that_look_like_presets_and_old_names_pass():
    assert read("--name", "fast").name == "fast"
    assert read("--name", "best").name == "best"
    assert all(key.startswith("--") or key == "best" for key in OLD_NAMES)
