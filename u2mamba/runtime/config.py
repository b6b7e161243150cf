"""The constants of a script, given in its file or on the command line, checked before anything is started."""

import dataclasses
import itertools
import json
import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

from u2mamba.runtime.errors import UserError

C = TypeVar("C")

CONSTANTS = "constants.json"  # in a run's folder
SMALLEST = 33  # pixels: the deepest maps of 32 are one pixel, which batch norm cannot normalise in a batch of one
LIMITS = {  # a training constant: (least, most)
    "rescale": (SMALLEST, 4096), "crop": (SMALLEST, 4096), "flip_upside_down": (0, 1), "mirror": (0, 1),
    "epoch_num": (1, 10**9), "batch_size_train": (1, 65536), "batch_size_val": (1, 65536), "lr": (0, 10),
    "warmup": (0, 10**9), "weight_decay": (0, 10), "clip": (0, 1e9), "ema_decay": (0, 0.999999),
    "max_bad_steps": (1, 10**9), "log_frq": (1, 10**9), "save_frq": (1, 10**9), "save_minutes": (0, 1e6),
    "crop_early": (0, 4096), "early": (0, 1), "window": (0, 1), "beyond": (0, 1), "rotate": (0, 180),
    "colour": (0, 1), "iou_loss": (0, 1000), "edge_loss": (0, 1000),
    "val_frq": (1, 10**9), "gpu": (0, 1024), "seed": (0, 2**63 - 1),
    "overfit": (0, 10**9), "accumulate": (1, 65536), "keep_checkpoints": (0, 10**9),
}  # fmt: skip
MAY_CHANGE = {  # constants that a resumed run may have otherwise: they do not change what it computes
    "cuda_graph", "fused_kernels", "resume", "saved_models", "data_dir", "tra_image_dir", "tra_label_dir",
    "val_image_dir", "val_label_dir",
    "scan_backend", "batch_size_val", "max_bad_steps", "log_frq", "save_frq", "save_minutes",
    "keep_checkpoints", "accumulate", "deterministic", "device", "gpu", "processes", "val_frq",
}  # fmt: skip
MAY_DIFFER = MAY_CHANGE - {"val_frq", "log_frq", "max_bad_steps"}  # between the processes of a run


def read_settings(
    default: C, presets: Mapping[str, C], limits: Mapping[str, tuple[float, float]], argv: Sequence[str] | None = None
) -> C:
    """The constants of `default`, or of the preset that the first word names, changed by `--key value` words.

    limits: constant -> (least, most), both allowed. argv: words after the script's name (None: the process's).
    Raises UserError for a value of the wrong type or out of range; exits with 2 for an unknown `--key`.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    if argv and not argv[0].startswith("-"):
        if argv[0] not in presets:
            raise UserError(f'no preset is called "{argv[0]}"; there are: {", ".join(presets)}')
        default = presets[argv.pop(0)]
    for before, word in itertools.pairwise(argv):
        if word in presets and (not before.startswith("-") or before.startswith(("--no-", "--no_"))):
            raise UserError(f"the preset comes first: python {Path(sys.argv[0]).name} {word} --key value ...")
    check_settings(default, limits)  # before tyro, which would blame the command line for a constant of the file
    description = f"presets (first word): {', '.join(presets)}; the defaults below are those of the one chosen"
    config = tyro.cli(type(default), default=default, args=argv, description=description, use_underscores=True)
    check_settings(config, limits)
    return config


def check_settings(config: Any, limits: Mapping[str, tuple[float, float]]) -> None:
    """Raises UserError naming the first constant whose type, choice or range is wrong."""
    for field, hint in typing.get_type_hints(type(config)).items():
        value = getattr(config, field)
        choices = typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()
        if choices and value not in choices:
            raise UserError(f"{field} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        if not choices and not _is_a(value, hint):
            raise UserError(f"{field} = {value!r}: must be of type {getattr(hint, '__name__', hint)}")
        least, most = limits.get(field, (None, None))
        if least is not None and not least <= value <= most:  # "not <=" so that nan is refused too
            raise UserError(f"{field} = {value!r}: must be from {least:g} to {most:g}")


def check_together(cfg: Any, files: bool = True) -> None:
    """Raises UserError for training constants that are in their ranges, but do not go together. files: whether those
    they name are looked for too, in the process that reads saved_models."""
    if cfg.crop > cfg.rescale or cfg.crop_early > cfg.rescale:
        raise UserError(f"crop = {max(cfg.crop, cfg.crop_early)}: cannot be larger than rescale = {cfg.rescale}")
    if 0 < cfg.crop_early < SMALLEST:
        raise UserError(f"crop_early = {cfg.crop_early}: must be 0 or from {SMALLEST}")
    if cfg.accumulate > cfg.batch_size_train:
        raise UserError(f"accumulate = {cfg.accumulate}: more parts than the batch of {cfg.batch_size_train} has pairs")
    begins = not Path(cfg.saved_models, cfg.model_name, "last.pth").exists()  # one that goes on needs it no more
    if files and cfg.pretrained and begins and not pretrained_file(cfg.pretrained).is_file():
        raise UserError(f"pretrained = {cfg.pretrained!r}: there is no such checkpoint")
    if cfg.model_name in ("", "..") or Path(cfg.model_name).name != cfg.model_name:
        raise UserError(f"model_name = {cfg.model_name!r}: must be the name of a folder, without a path")


def pretrained_file(pretrained: str | Path) -> Path:
    """The file of that constant; a relative path that leads nowhere from here is one from the project's folder."""
    here, there = Path(pretrained), Path(__file__).parents[2] / pretrained
    return there if there.is_file() and not here.is_file() else here


def tell_odd_sizes(cfg: Any, pairs: int, processes: int, iterations: int) -> None:
    """Warns of training constants that do not suit the number of pairs, and of iterations still to come."""
    if (batch := cfg.batch_size_train * processes) > pairs:
        print(f"warning: a batch of {batch} is more than the {pairs} pairs: one step an epoch, of all of them")
    if cfg.warmup > iterations:
        print(
            f"warning: warmup = {cfg.warmup} is longer than the run of {iterations} iterations: lr is never reached; "
            "give a smaller warmup, or more epochs"
        )


def _is_a(value: Any, hint: Any) -> bool:
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return any(_is_a(value, h) for h in typing.get_args(hint))
    if origin is tuple:
        item = typing.get_args(hint)[0]
        return isinstance(value, tuple) and all(_is_a(v, item) for v in value)
    if origin is typing.Literal:
        return value in typing.get_args(hint)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, hint)


def input_size(wanted: int, weights: Path) -> int:
    """Pixels of the square that a network sees: `wanted`, or for 0 what the weights were trained at, by the constants
    that their run has left beside them, else 320."""
    if wanted:
        return wanted
    try:
        trained = json.loads((weights.parent / CONSTANTS).read_text())["rescale"]
    except (OSError, ValueError, KeyError, TypeError):
        return 320
    least, most = LIMITS["rescale"]
    return trained if isinstance(trained, int) and least <= trained <= most else 320


def check_input_size(size: int) -> None:
    """Raises UserError for one that `input_size` takes and no network does."""
    if 0 < size < 32:
        raise UserError(f"size = {size}: must be from 32 to 4096, or 0 for the size of the training")


def differences(a: Mapping[str, Any], b: Mapping[str, Any], ignore: set[str]) -> list[str]:
    """`key: a -> b` for each constant in which two runs differ; one that only one of them knows counts too."""
    keys = [k for k in dict.fromkeys((*a, *b)) if k not in ignore]
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if _plain(a.get(k)) != _plain(b.get(k))]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def as_plain_dict(config: Any) -> dict[str, Any]:
    """The constants as a dict of plain values, which a checkpoint may hold under weights_only=True."""
    return {k: _plain(v) for k, v in dataclasses.asdict(config).items()}
