"""Photographs from scikit-image with the saliency map and cut-out of one network or of several: docs/results.jpg.

    python -m benchmarks.gallery --checkpoint saved_models/fast_4gpu/best.pth  the included weights, then those
    python -m benchmarks.gallery --out gallery.jpg                             the included weights alone

The photographs were chosen by name before any saliency map of them was seen; docs/README.md gives their licenses.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image

import u2mamba_predict
from benchmarks.hardware import cli
from u2mamba.dataset.decode import read_image
from u2mamba.dataset.demo import PHOTOGRAPHS
from u2mamba.inference import Predictor, load_model
from u2mamba.inference.render import render

NAMES = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
WIDTH, GAP = 900, 8  # pixels of the figure, and between the parts of a sheet


@dataclass
class Config:
    checkpoint: tuple[str, ...] = ()  # more weights, to the right of the included ones
    out: str = "docs/results.jpg"


def main(cfg: Config) -> None:
    networks = [Predictor(load_model(checkpoint)) for checkpoint in ("small", *cfg.checkpoint)]
    settings, rows = u2mamba_predict.Config(), []
    for name in NAMES:
        image = read_image(PHOTOGRAPHS / name)
        sheets = [np.asarray(render("sheet", predict.saliency(image), image, settings)) for predict in networks]
        start = (sheets[0].shape[1] + GAP) // 3 - GAP  # of the map: the photograph before it is shown once
        row = Image.fromarray(np.hstack([sheets[0], *(sheet[:, start:] for sheet in sheets[1:])]))
        row = row.resize((WIDTH, round(row.height * WIDTH / row.width)), Image.Resampling.LANCZOS)
        rows.append(np.pad(row, ((0, 4), (0, 0), (0, 0)), constant_values=255))
    Image.fromarray(np.vstack(rows)).save(cfg.out, quality=88)
    print(f"{cfg.out}: photograph, then map and cut-out by each network, of {', '.join(NAMES)}")


if __name__ == "__main__":
    cli(main, Config, __doc__)
