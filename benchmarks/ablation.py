"""Which parts of the recipe help, and does Mamba: short trainings that differ in one thing, from one start.

    python -m benchmarks.ablation --data_dir train_data                     every variant, U2MAMBAP
    python -m benchmarks.ablation --only "plain U²-Net" "norm behind the gate" --epochs 20
    python -m benchmarks.ablation --arch u2mamba --minutes 5                equal minutes instead of equal images

Every variant is trained by `u2mamba_train.run` with the constants of the preset `small`, or `fast` for u2mamba, but
without edge_loss and norms in the Mamba layers, and with the milder changes of the pictures that the presets had first
(MILDER), so that all are variants; and measured on the held-out pairs. --minutes first times a short run of each
variant, and gives it the epochs that fit.
"""

import contextlib
import csv
import io
import json
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Literal

import tyro

from benchmarks.hardware import lines
from benchmarks.trials import TRIALS
from u2mamba.engine.distributed import DistContext
from u2mamba.runtime.config import LIMITS, check_settings
from u2mamba.runtime.environment import choose_device
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, UserError, one_line_errors
from u2mamba_train import PRESETS, Config, run

# what the tables of benchmarks/LOG.md and docs/results.md were measured with
MILDER = {"crop": 288, "window": 0.6, "beyond": 0.0, "rotate": 15.0, "colour": 0.3, "early": 0.6}
PLAIN = {"u2mambap": "u2netp", "u2mamba": "u2net"}
VARIANTS = {  # what differs: constants that do; a trial differs by what benchmarks/trials.py puts in
    "recipe": {},
    "recipe, another seed": {"seed": 1},
    "plain U²-Net": {"arch": PLAIN},
    "Mamba in the encoder": {"mamba_at": "encoder"},
    "norm behind the gate": {"mamba_norm": "gate"},
    "BCE alone": {"iou_loss": 0.0},
    "edges weigh more": {"edge_loss": 1.0},
    "no window, rotation, colour": {"window": 0.0, "rotate": 0.0, "colour": 0.0},
    "no mirroring": {"mirror": 0.0},
    "smaller windows": {"window": 0.4},
    "windows beyond the picture": {"beyond": 0.4},
    "more colour": {"colour": 0.5},
    "stronger changes": {"window": 0.4, "colour": 0.5},
    "stronger changes, more decay": {"window": 0.4, "colour": 0.5, "weight_decay": 0.1},
    "the presets' changes": {name: getattr(PRESETS["fast"], name) for name in ("window", "beyond", "rotate", "colour")},
    "pasted objects": {"paste": 0.3},
    "upside down too": {"flip_upside_down": 0.5},
    "twice the rate": {"lr": 2e-3},
    "half the rate": {"lr": 5e-4},
    "all at full size": {"crop_early": 0},
    "all at the small size": {"early": 1.0},
    "no warm-up": {"warmup": 0},
    "constant rate": {"lr_schedule": "constant"},
    "no clipping": {"clip": 0.0},
    "no averaging": {"ema_decay": 0.0},
    "no weight decay": {"weight_decay": 0.0},
    "more weight decay": {"weight_decay": 0.1},
    "batch 16": {"batch_size_train": 16},
    **{name: {} for name in TRIALS},
}
PAIRS = 9_997  # of DUTS-TR, for training
FIGURES = ("val_maxF", "val_MAE", "val_IoU")


@dataclass
class Options:
    data_dir: str = "train_data"
    arch: Literal["u2mambap", "u2mamba"] = "u2mambap"
    only: tuple[str, ...] = tuple(VARIANTS)
    epochs: int = 10
    minutes: float = 0.0  # of training a variant, instead of epochs
    overrides: str = "{}"  # JSON of constants for all of them, such as {"crop": 192}
    out: str = "saved_models"  # the runs' folders, and ablation.json


def config_of(variant: str, options: Options) -> Config:
    """The constants of a variant. Raises UserError for a name that is not in VARIANTS, and for odd --overrides."""
    if variant not in VARIANTS:
        raise UserError(f'no variant is called "{variant}"; there are: {", ".join(VARIANTS)}')
    changed = {k: v[options.arch] if isinstance(v, dict) else v for k, v in VARIANTS[variant].items()}
    base = replace(
        PRESETS["fast" if options.arch == "u2mamba" else "small"],
        arch=options.arch, data_dir=options.data_dir, saved_models=options.out, resume="never",
        epoch_num=options.epochs, save_frq=10**9, val_frq=10**9, save_minutes=1e6, warmup=100, ema_decay=0.998,
        edge_loss=0.0, mamba_norm="none", **MILDER,
        model_name="ablation_" + "_".join(variant.replace(",", "").replace("²", "2").split()),
    )  # fmt: skip
    try:
        config = replace(base, **json.loads(options.overrides) | changed)
    except (TypeError, ValueError) as error:
        raise UserError(f"--overrides {options.overrides}: {error}") from None
    check_settings(config, LIMITS)
    return config


def trained(config: Config) -> dict[str, float]:
    """Trains silently; the held-out figures at the end, and seconds and img/s of the training itself."""
    with contextlib.redirect_stdout(io.StringIO()):
        code = run(config, DistContext())
    with Path(config.saved_models, config.model_name, "log.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    if code not in (EXIT_OK, EXIT_SKIPPED) or not rows:
        raise UserError(f"{config.model_name}: was stopped before its end; the variants before it are written")
    figures = {k: float(rows[-1][k] or "nan") for k in FIGURES} if rows[-1]["val_maxF"] else {}
    speeds = [float(r["img_s"]) for r in rows if r["img_s"]] or [math.nan]  # none in a run shorter than log_frq
    return figures | {"seconds": float(rows[-1]["seconds"]), "img_s": median(speeds)}


def main(options: Options) -> None:
    print("\n".join(lines(choose_device()[0])))
    print(f"{'variant':32}epochs      s   img/s    maxF     MAE     IoU", flush=True)
    results = {}
    for variant in options.only:
        config, started = config_of(variant, options), time.monotonic()
        with TRIALS.get(variant, contextlib.nullcontext)():
            if options.minutes:
                early, late = (PAIRS / trained(replace(config, epoch_num=1, early=e))["img_s"] for e in (1.0, 0.0))
                an_epoch = config.early * early + (1 - config.early) * late  # in seconds, small and full pictures
                config = replace(config, epoch_num=max(1, round(options.minutes * 60 / an_epoch)))
            got = trained(config)
        got |= {"epochs": config.epoch_num, "wall": time.monotonic() - started}
        results[variant] = got
        print(
            f"{variant:32}{config.epoch_num:6}{got['seconds']:7.0f}{got['img_s']:8.0f}"
            + "".join(f"{got.get(k, float('nan')):8.4f}" for k in FIGURES),
            flush=True,
        )
        Path(options.out, "ablation.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, use_underscores=True))
