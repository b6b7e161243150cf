"""Photographs that scikit-image ships, with the map and the cut-out of a network: docs/results.jpg.

    python -m benchmarks.gallery                                          the weights that ship
    python -m benchmarks.gallery --checkpoint saved_models/fast/best.pth --out gallery.jpg

The photographs were chosen by name before any map of them was seen; docs/README.md names their licences.
"""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro
from PIL import Image

from engine.run import one_line_errors
from u2mamba_test import Options as Cut
from u2mamba_test import run

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
WIDTH = 900  # pixels of the figure


@dataclass
class Options:
    checkpoint: str = ""  # weights; default: those that ship
    out: str = "docs/results.jpg"


def main(options: Options) -> int:
    """Writes the figure; returns the exit code of `u2mamba_test.py`."""
    folder = Path(find_spec("skimage").origin).parent / "data"
    with tempfile.TemporaryDirectory() as made:
        inputs = tuple(str(folder / name) for name in PHOTOGRAPHS)
        if code := run(Cut(inputs, options.checkpoint, out=made, mode=("sheet",), precision="fp32", device="cpu")):
            return code
        rows = [Image.open(Path(made, "sheet", name).with_suffix(".jpg")) for name in PHOTOGRAPHS]
        rows = [row.resize((WIDTH, round(row.height * WIDTH / row.width)), Image.Resampling.LANCZOS) for row in rows]
    figure = Image.new("RGB", (WIDTH, sum(row.height + 4 for row in rows) - 4), "white")
    top = 0
    for row in rows:
        figure.paste(row, (0, top))
        top += row.height + 4
    figure.save(options.out, quality=88)
    print(f"{options.out}: photograph, map, cut-out of {', '.join(PHOTOGRAPHS)}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(tyro.cli(Options, use_underscores=True)))
