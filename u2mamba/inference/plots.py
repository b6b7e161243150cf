"""Plots of an evaluation, as PNG bytes: curves, error by object size, a contact sheet of the worst images."""

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont, ImageOps

TILE = (240, 180)  # pixels of an image on the sheet
LINE = 18  # pixels of the text above it
GAP = 6


def curves(datasets: Mapping[str, Mapping[str, np.ndarray]]) -> bytes:
    """dataset -> `DatasetMetrics.curves()`: precision over recall; both definitions of F over the thresholds."""
    figure = Figure(figsize=(12, 5), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1))
    right.set(xlabel="threshold", ylabel="F (β² = 0.3)", xlim=(0, 255), ylim=(0, 1))
    for name, values in datasets.items():
        label = f"{_label(name)}, max F (A) {values['f_a'].max():.3f}"
        (line,) = left.plot(values["recall"], values["precision"], label=label)
        for key, style, what in (("f_a", "-", "A: of mean precision and recall"), ("f_b", "--", "B: mean of F")):
            color = line.get_color()
            right.plot(range(255, -1, -1), values[key], style, color=color, label=f"{_label(name)}, {what}")
    return _png(figure)


def error_by_size(sizes: Mapping[str, Mapping[str, Mapping]]) -> bytes:
    """dataset -> `DatasetMetrics.by_size()`: stacked bars (missed, extra) per dataset and size that occurs."""
    shown = [size for size in next(iter(sizes.values())) if any(values[size]["n"] for values in sizes.values())]
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot(ylabel="MAE")
    width = 0.8 / len(sizes)
    for index, (name, values) in enumerate(sizes.items()):
        x = np.arange(len(shown)) + (index - (len(sizes) - 1) / 2) * width
        missed, extra = ([values[size][part] or 0 for size in shown] for part in ("missed", "extra"))
        bars = axes.bar(x, missed, width, label=f"{_label(name)}, missed", edgecolor="white")
        color = (*bars[0].get_facecolor()[:3], 0.4)
        axes.bar(x, extra, width, missed, label=f"{_label(name)}, extra", color=color, edgecolor="white")
    axes.set_xticks(range(len(shown)), shown)
    return _png(figure)


def contact_sheet(rows: Sequence[tuple[str, Sequence[np.ndarray]]]) -> bytes:
    """Rows of (text, images), the images, (H, W, 3) or (H, W) uint8, side by side below their text, in two columns."""
    columns = min(2, len(rows))
    width = max(len(images) for _, images in rows) * (TILE[0] + GAP) + GAP
    height = TILE[1] + LINE + GAP
    sheet = Image.new("RGB", (width * columns, height * -(-len(rows) // columns) + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for index, (text, images) in enumerate(rows):
        left, top = index % columns * width + GAP, index // columns * height + GAP
        draw.text((left, top), _latin(text), "black", font)
        for column, image in enumerate(images):
            tile = ImageOps.pad(Image.fromarray(image).convert("RGB"), TILE, color="lightgrey")
            sheet.paste(tile, (left + column * (TILE[0] + GAP), top + LINE))
    file = io.BytesIO()
    sheet.save(file, "PNG")
    return file.getvalue()


def _latin(text: str) -> str:
    """Escapes what a Latin font lacks, and invalid bytes of file names."""
    return text.encode("latin-1", "backslashreplace").decode("latin-1")


def _label(name: str) -> str:
    return _latin(name).replace("$", r"\$")  # matplotlib would read it as the start of a formula


def _png(figure: Figure) -> bytes:
    for axes in figure.axes:
        axes.grid(alpha=0.3)
        axes.legend()
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=120)
    return file.getvalue()
