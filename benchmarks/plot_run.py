"""Draws a run's curves from its log.csv, without TensorBoard, into FOLDER/curves.png.

python -m benchmarks.plot_run saved_models/fast
"""

import contextlib
import csv
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.hardware import cli
from u2mamba.runtime.errors import UserError

PANELS = {  # title: {label: column of log.csv}
    "loss, mean since the last checkpoint": {"d0": "tar"} | {f"d{i}": f"d{i}" for i in range(1, 7)},
    "IoU": {"training": "IoU", "validation": "val_IoU"},
    "validation": {"MAE": "val_MAE", "maxF": "val_maxF"},
    "learning rate": {"lr": "lr"},
    "images per second": {"images/s": "images_s"},
    "fraction of time waiting for data": {"wait": "wait"},
}


@dataclass
class Config:
    folder: tyro.conf.Positional[str] = "saved_models/fast"  # of a run


def read_log(path: Path) -> dict[str, list[tuple[int, float]]]:
    """Column of a log.csv -> its (iteration, value) pairs. Raises UserError."""
    try:
        with path.open(newline="", encoding="utf-8", errors="replace") as file:
            rows = [row for row in csv.DictReader(file) if (row.get("ite") or "").isdigit()]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give the folder of a run") from None
    if not rows:
        raise UserError(f"{path} is not the log of a run, or has no row yet")
    columns: dict[str, list[tuple[int, float]]] = {name: [] for name in rows[0]}
    for row in rows:
        for name, points in columns.items():
            with contextlib.suppress(ValueError, TypeError):  # an empty cell, or one that a crash has cut
                points.append((int(row["ite"]), float(row[name])))
    return columns


def main(cfg: Config) -> None:
    from matplotlib.figure import Figure  # not pyplot, which looks for a screen

    folder = Path(cfg.folder)
    columns, path = read_log(folder / "log.csv"), folder / "curves.png"
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    figure.suptitle(folder.resolve().name)
    for axes, (title, curves) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for label, column in curves.items():
            if points := columns.get(column):
                axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2)
                axes.legend(fontsize="small")
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
    figure.savefig(path)
    print(path)


if __name__ == "__main__":
    cli(main, Config, __doc__)
