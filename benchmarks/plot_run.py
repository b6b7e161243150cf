"""Draws the curves of a run from its log.csv, without TensorBoard: FOLDER/curves.png.

    python -m benchmarks.plot_run saved_models/u2net

Losses of d0..d6, IoU, held-out MAE and max F-measure, learning rate, images a second, share of time waiting for data.
"""

import csv
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

from u2mamba.runtime.errors import UserError, one_line_errors

PANELS = {  # title: {label: column of log.csv}
    "loss, mean since the last checkpoint": {"d0": "tar"} | {f"d{i}": f"d{i}" for i in range(1, 7)},
    "IoU": {"training": "IoU", "held-out": "val_IoU"},
    "held-out": {"MAE": "val_MAE", "maxF": "val_maxF"},
    "learning rate": {"lr": "lr"},
    "images a second": {"img/s": "img_s"},
    "share of time waiting for data": {"wait": "wait"},
}


@dataclass
class Options:
    folder: Annotated[str, tyro.conf.Positional] = "saved_models/u2net"  # of a run


def read_log(path: Path) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Column of a log.csv -> (iterations, values), without the rows that do not have it. Raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = [r for r in csv.DictReader(file) if (r.get("ite") or "").isdigit()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; name the folder of a run") from None
    except (ValueError, csv.Error):
        rows = []
    if not rows:
        raise UserError(f"{path}: is not the log of a run, or has no line yet")
    columns = {}
    for name in rows[0]:
        pairs = [(int(r["ite"]), float(r[name])) for r in rows if _is_number(r[name])]
        columns[name] = tuple(np.array(pairs).T) if pairs else (np.empty(0), np.empty(0))
    return columns


def _is_number(text: str | None) -> bool:
    try:
        float(text or "")
    except ValueError:  # a line cut by a power failure
        return False
    return True


def draw(columns: dict[str, tuple[np.ndarray, np.ndarray]], title: str, path: Path) -> None:
    """PANELS as one PNG of 1500x800 pixels, to a temporary name and renamed."""
    from matplotlib.figure import Figure  # not pyplot, which would look for a screen

    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    figure.suptitle(title)
    for axes, (name, lines) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for label, column in lines.items():
            x, y = columns.get(column, ((), ()))
            axes.plot(x, y, label=label, marker="." if len(x) < 50 else "", linewidth=1.2)
        axes.set(title=name, xlabel="iteration")
        axes.grid(alpha=0.3)
        if name.startswith(("images", "share")):
            axes.set_ylim(bottom=0, top=1 if name.startswith("share") else None)
        if len(lines) > 1:
            axes.legend(fontsize="small")
    temporary = path.with_stem(f".{path.stem}")
    figure.savefig(temporary)
    os.replace(temporary, path)


def main(options: Options) -> None:
    folder = Path(options.folder)
    columns, path = read_log(folder / "log.csv"), folder / "curves.png"
    try:
        draw(columns, folder.resolve().name, path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None
    print(path)


if __name__ == "__main__":
    with one_line_errors():
        main(tyro.cli(Options, description=__doc__, use_underscores=True))
