"""Pictures of an evaluation, as the bytes of PNG files: curves, and a sheet of the images that came out worst."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = (240, 180)  # pixels of a picture on the sheet
LINE = 18  # pixels of the text above it
GAP = 6


def precision_recall(curves: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """One line a data set; curves: name -> `SetScores.curves()`."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    for name, of in curves.items():
        axes.plot(of["recall"], of["precision"], label=f"{_label(name)}, max F (A) {of['f_a'].max():.3f}")
    return _png(figure, axes)


def f_against_threshold(curves: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """Both definitions of F over the thresholds, in one colour a data set."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.add_subplot(xlabel="threshold", ylabel="F (β² = 0.3)", xlim=(0, 255), ylim=(0, 1))
    for name, of in curves.items():
        of_means = axes.plot(
            np.arange(255, -1, -1), of["f_a"], label=f"{_label(name)}, A: of mean precision and recall"
        )
        axes.plot(
            np.arange(255, -1, -1),
            of["f_b"],
            "--",
            color=of_means[0].get_color(),
            label=f"{_label(name)}, B: mean of F",
        )
    return _png(figure, axes)


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]], columns: int = 2) -> bytes:
    """Rows of (text, pictures), the pictures side by side below their text, `columns` rows beside each other.

    Pictures: (H, W, 3) or (H, W), uint8; as many in each row.
    """
    width = len(rows[0][1]) * (TILE[0] + GAP) + GAP
    height = TILE[1] + LINE + GAP
    sheet = Image.new("RGB", (width * min(columns, len(rows)), height * -(-len(rows) // columns) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for place, (text, pictures) in enumerate(rows):
        left, top = place % columns * width + GAP, place // columns * height + GAP
        draw.text((left, top), _plain(text), "black", font)
        for number, picture in enumerate(pictures):
            tile = ImageOps.pad(Image.fromarray(picture).convert("RGB"), TILE, color="lightgrey")
            sheet.paste(tile, (left + number * (TILE[0] + GAP), top + LINE))
    return _bytes(lambda file: sheet.save(file, "PNG"))


def _plain(text: str) -> str:
    """For fonts that hold no more than Latin letters, and for names that are not text."""
    return text.encode("latin-1", "backslashreplace").decode("latin-1")


def _label(name: str) -> str:
    return _plain(name).replace("$", r"\$")  # which would begin a formula


def _png(figure: Figure, axes) -> bytes:
    axes.grid(alpha=0.3)
    axes.legend(loc="lower left")
    return _bytes(lambda file: figure.savefig(file, format="png", dpi=120))


def _bytes(save) -> bytes:
    file = io.BytesIO()
    save(file)
    return file.getvalue()
