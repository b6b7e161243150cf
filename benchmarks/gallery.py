"""Photographs that scikit-image ships, with the map and the cut-out of a network or of several: docs/results.jpg.

    python -m benchmarks.gallery --checkpoint saved_models/best/best.pth  the weights that ship, then those
    python -m benchmarks.gallery --out gallery.jpg                        the weights that ship alone

The photographs were chosen by name before any map of them was seen; docs/README.md names their licences.
"""

import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import tyro
from PIL import Image

from u2mamba.runtime.errors import one_line_errors
from u2mamba_predict import Options as Cut
from u2mamba_predict import run

PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
WIDTH = 900  # pixels of the figure


@dataclass
class Options:
    checkpoint: tuple[str, ...] = ()  # more weights, to the right of those that ship
    out: str = "docs/results.jpg"


def side_by_side(parts: list[Image.Image]) -> Image.Image:
    """Pictures of one height in a row, WIDTH wide together."""
    row = Image.new("RGB", (sum(part.width + 8 for part in parts) - 8, parts[0].height), "white")
    left = 0
    for part in parts:
        row.paste(part, (left, 0))
        left += part.width + 8
    return row.resize((WIDTH, round(row.height * WIDTH / row.width)), Image.Resampling.LANCZOS)


def main(options: Options) -> int:
    """Writes the figure; returns the exit code of `u2mamba_predict.py`."""
    folder = Path(find_spec("skimage").origin).parent / "data"
    inputs = tuple(str(folder / name) for name in PHOTOGRAPHS)
    rows: list[list[Image.Image]] = [[] for _ in PHOTOGRAPHS]  # of each photograph: a sheet by each network
    for checkpoint in ("", *options.checkpoint):
        with tempfile.TemporaryDirectory() as made:
            if code := run(Cut(inputs, checkpoint, out=made, mode=("sheet",), precision="fp32", device="cpu")):
                return code
            for row, name in zip(rows, PHOTOGRAPHS, strict=True):
                sheet = Image.open(Path(made, "sheet", name).with_suffix(".jpg"))
                third = (sheet.width + 8) // 3  # the photograph and the gap after it: once is enough
                row.append(sheet.crop((third if row else 0, 0, sheet.width, sheet.height)))
    pictures = [side_by_side(row) for row in rows]
    figure = Image.new("RGB", (WIDTH, sum(picture.height + 4 for picture in pictures) - 4), "white")
    top = 0
    for picture in pictures:
        figure.paste(picture, (0, top))
        top += picture.height + 4
    figure.save(options.out, quality=88)
    print(f"{options.out}: photograph, then map and cut-out by each network, of {', '.join(PHOTOGRAPHS)}")
    return 0


if __name__ == "__main__":
    with one_line_errors():
        raise SystemExit(main(tyro.cli(Options, use_underscores=True)))
