"""The settings of a command: a dataclass, edited in its file or changed on the command line, checked at the start."""

import dataclasses
import difflib
import itertools
import os
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import tyro

from u2mamba.runtime.errors import UserError

C = TypeVar("C")

MIN_SIZE = 33  # pixels: at 32 the deepest maps are one pixel, which batch norm cannot normalize in a batch of one
MAX_SIZE = 4096  # pixels


class Range(NamedTuple):
    """The values that a field annotated with it may have, both ends included."""

    low: float
    high: float


Size = Annotated[int, Range(MIN_SIZE, MAX_SIZE)]
Count = Annotated[int, Range(1, 10**9)]
CountOrZero = Annotated[int, Range(0, 10**9)]
Fraction = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0, 1000)]

OLD_NAMES = {  # options, values and the preset of 0.1.0 -> their replacement
    "--flip_upside_down": "now --vflip_prob",
    "--mirror": "now --hflip_prob",
    "--crop_early": "now --early_crop",
    "--early": "now --early_fraction",
    "--window": "now --scale_min",
    "--beyond": "now --scale_max, 1 plus its value",
    "--rotate": "now --rotation_degrees",
    "--colour": "now --color_jitter",
    "--accumulate": "now --grad_accum_steps",
    "--whole_batches": "now --drop_last",
    "--clip": "now --grad_clip",
    "--warmup": "now --warmup_iters",
    "--iou_loss": "now --iou_weight",
    "--edge_loss": "now --edge_weight",
    "--optimizer": "gone (AdamW if weight_decay is above 0, else Adam)",
    "--stretch": "now --normalize",
    "--resume anyway": "now --resume force",
    "--mode soft": "now --mode map",
    "--mode binary": "now --mode mask",
    "--mode rgba": "now --mode cutout",
    "--mamba_norm scan": "gone (use gate)",
    "best": "now fast_4gpu",
    "--paste": "gone (it lowered the scores)",
    "--mamba_residual": "gone (always on)",
    "--mamba_directions": "gone (a second direction brought no gain)",
    "--mamba_zero": "gone (--pretrained with plain U²-Net weights does it)",
    "--sync_batch_norm": "gone (each GPU normalizes its own batch)",
    "--scan_backend": "gone (always the fastest available; --plain uses PyTorch's)",
    "--channels_last": "gone (--precision bf16 implies it)",
    "--fused_kernels": "gone (--precision bf16 implies them; --plain disables them)",
    "--cuda_graph": "gone (always used on CUDA; --plain disables it)",
    "--cache": "gone (pairs are cached if they fit into memory)",
    "--num_workers": "gone (set by the number of cores)",
    "--batch_size_val": "gone (the validation batch size is fixed)",
    "--max_bad_steps": "gone (20 NaN/Inf steps in a row end a run)",
    "--save_minutes": "gone (last.pth is written every 5 minutes)",
    "--csv": "gone (--json writes the scores)",
    "--speed": "gone (python -m benchmarks.inference measures it)",
    "--workers": "gone (one thread per core)",
    "--gpu": "gone (CUDA_VISIBLE_DEVICES chooses the GPU)",
}


def read_settings(default: C, presets: Mapping[str, C] | None = None, argv: Sequence[str] | None = None) -> C:
    """The settings in `default`, or in the preset named by the first word, changed by `--key value` words.

    argv: words after the script's name (None: the process's). Raises UserError for a value of the wrong type or out of
    range, an option of 0.1.0 or a misspelled one; exits with code 2 for any other unknown option.
    """
    argv, presets = list(sys.argv[1:] if argv is None else argv), presets or {}
    names, description = ", ".join(presets), type(default).__doc__
    _refuse_wrong_options(argv, typing.get_type_hints(type(default)))
    if presets:
        description = f"presets (first word): {names}; the defaults below are those of the chosen one"
        if argv and not argv[0].startswith("-"):
            if argv[0] not in presets:
                raise UserError(f"{argv[0]}: {OLD_NAMES.get(argv[0], f'no such preset; choose one of {names}')}")
            default = presets[argv.pop(0)]
    for before, word in itertools.pairwise(argv):
        if word in presets and (not before.startswith("-") or before.startswith(("--no-", "--no_"))):
            raise UserError(f"the preset comes first: python {sys.argv[0]} {word} --key value ...")
    check_settings(default)  # before tyro, which would report a wrong value in the file as one of the command line
    config = tyro.cli(type(default), default=default, args=argv, description=description, use_underscores=True)
    return check_settings(config)


def _expand_home(value: Any) -> Any:
    """`~/...` at the start of a path; the shell does it in most places, but not behind `=`."""
    if isinstance(value, (tuple, list)):
        return type(value)(map(_expand_home, value))
    return type(value)(os.path.expanduser(value)) if isinstance(value, (str, Path)) else value


def _refuse_wrong_options(argv: Sequence[str], hints: Mapping[str, Any]) -> None:
    option = ""
    for word, following in itertools.pairwise([*argv, ""]):
        value = word
        if is_option := word.startswith("--"):
            name, _, value = word[2:].replace("-", "_").partition("=")
            name = name if name in hints else name.removeprefix("no_")
            option = f"--{name}"
            if hints.get(name) is bool and ("=" in word or following.lower() in ("true", "false")):
                raise UserError(f"--{name} takes no value: --{name} switches it on, --no-{name} off")
        for key in (option, f"{option} {value}"):
            if key in OLD_NAMES and key[2:] not in hints:
                raise UserError(f"{key}: {OLD_NAMES[key]}")
        if is_option and name not in hints and (close := difflib.get_close_matches(name, hints, 1)):
            raise UserError(f"{word}: there is no such option; did you mean --{close[0]}?")


def check_settings(config: C) -> C:
    """The settings with `~` expanded. Raises UserError naming the first field whose type, choice or range is wrong."""
    for field, hint in typing.get_type_hints(type(config), include_extras=True).items():
        value = getattr(config, field)
        hint, *notes = typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)
        several = typing.get_origin(hint) in (tuple, list)
        kind = typing.get_args(hint)[0] if several else hint
        choices = typing.get_args(kind) if typing.get_origin(kind) is typing.Literal else ()
        values = value if several and isinstance(value, (tuple, list)) else (value,)
        if choices and not all(v in choices for v in values):
            raise UserError(f"{field} = {value!r}: must be one of {', '.join(map(repr, choices))}")
        types = {float: (int, float), str: (str, Path)}.get(kind, type(choices[0]) if choices else kind)
        right = all(isinstance(v, types) and isinstance(v, bool) == (kind is bool) for v in values)
        if not right or several != (values is value):
            raise UserError(f"{field} = {value!r}: must be of type {getattr(hint, '__name__', hint)}")
        for low, high in (note for note in notes if isinstance(note, Range)):
            if not all(low <= v <= high for v in values):  # "not <=", so that NaN is refused too
                raise UserError(f"{field} = {value!r}: must be from {low:g} to {high:g}")
    return dataclasses.replace(config, **{f.name: _expand_home(getattr(config, f.name)) for f in fields(config)})


def to_dict(config: Any) -> dict[str, Any]:
    """The settings as a dict of plain values, which a checkpoint may hold under weights_only=True."""
    plain = {tuple: list, type(Path()): str}
    return {k: plain.get(type(v), lambda v: v)(v) for k, v in dataclasses.asdict(config).items()}


def differences(a: Mapping[str, Any], b: Mapping[str, Any], ignore: set[str]) -> list[str]:
    """`key: a -> b` for each setting in which two runs differ; one that only one run has counts too."""
    keys = [k for k in dict.fromkeys((*a, *b)) if k not in ignore]
    return [f"{k}: {a.get(k)!r} -> {b.get(k)!r}" for k in keys if a.get(k) != b.get(k)]
