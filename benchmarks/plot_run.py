"""Draws a run's curves from its log.csv, without TensorBoard, into FOLDER/curves.png.

python -m benchmarks.plot_run saved_models/fast
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro
from matplotlib.figure import Figure

from benchmarks.hardware import cli

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


def main(cfg: Config) -> None:
    folder = Path(cfg.folder)
    log = np.genfromtxt(folder / "log.csv", delimiter=",", names=True, ndmin=1, invalid_raise=False)
    figure = Figure(figsize=(15, 8), dpi=100, layout="constrained")
    figure.suptitle(folder.resolve().name)
    for axes, (title, curves) in zip(figure.subplots(2, 3).flat, PANELS.items(), strict=True):
        for label, column in curves.items():
            if column in log.dtype.names:
                known = np.isfinite(log[column])  # a row holds either losses or validation scores
                axes.plot(log["ite"][known], log[column][known], label=label, linewidth=1.2)
                axes.legend(fontsize="small")
        axes.set(title=title, xlabel="iteration")
        axes.grid(alpha=0.3)
    figure.savefig(folder / "curves.png")
    print(folder / "curves.png")


if __name__ == "__main__":
    cli(main, Config, __doc__)
