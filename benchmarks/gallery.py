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
    images = [read_image(PHOTOGRAPHS / name) for name in NAMES]
    rows: list[list[np.ndarray]] = [[] for _ in NAMES]  # of each photograph, a sheet from each network
    for checkpoint in ("small", *cfg.checkpoint):
        predict = Predictor(load_model(checkpoint))
        for row, image in zip(rows, images, strict=True):
            sheet = np.asarray(render("sheet", predict.saliency(image), image, u2mamba_predict.Config()))
            third = (sheet.shape[1] + GAP) // 3  # the photograph and the gap after it: once is enough
            row.append(sheet[:, third - GAP if row else 0 :])
    wide = [Image.fromarray(np.hstack(row)) for row in rows]
    wide = [w.resize((WIDTH, round(w.height * WIDTH / w.width)), Image.Resampling.LANCZOS) for w in wide]
    figure = np.vstack([np.pad(w, ((0, 4), (0, 0), (0, 0)), constant_values=255) for w in wide])
    Image.fromarray(figure).save(cfg.out, quality=88)
    print(f"{cfg.out}: photograph, then map and cut-out by each network, of {', '.join(NAMES)}")


if __name__ == "__main__":
    cli(main, Config, __doc__)
