"""Draws docs/architecture.png: U²-Net's stages, one residual U-block, and where the networks have Mamba layers.

python -m benchmarks.draw_architecture
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from benchmarks.hardware import cli
from model import U2MAMBA
from model.u2net import RSU_CONFIG

BLUE, GREEN, ORANGE = "#dce9f5", "#e4efdc", "#f0883e"  # encoder, decoder, Mamba layers
WIDTH, HEIGHT = 1.7, 0.5  # of a box; rows are 1 apart
LEFT, MIDDLE, RIGHT = 0.0, 1.8, 3.6  # left sides of the boxes


@dataclass
class Config:
    out: str = "docs/architecture.png"


def mamba_levels(mamba_at: str) -> dict[str, list[int]]:
    """Stage -> the levels of its RSU that have a Mamba layer."""
    with torch.device("meta"):
        net = U2MAMBA(mamba_at=mamba_at)
    return {s: [i for i in range(1, 8) if hasattr(getattr(net, s), f"mamba{i}")] for s in RSU_CONFIG}


def box(ax: Axes, x: float, y: float, text: str, color: str) -> None:
    style = "round,pad=0.02,rounding_size=0.06"
    ax.add_patch(FancyBboxPatch((x, y - HEIGHT / 2), WIDTH, HEIGHT, boxstyle=style, fc=color, ec="#444444"))
    ax.text(x + WIDTH / 2, y, text, ha="center", va="center", fontsize=9)


def badge(ax: Axes, x: float, y: float, filled: bool, text: str = "") -> None:
    circle = {"boxstyle": "circle,pad=0.25", "fc": ORANGE if filled else "white", "ec": ORANGE}
    ax.text(x, y, "M", ha="center", va="center", fontsize=8, weight="bold", zorder=3, bbox=circle)
    ax.text(x + 0.25, y, text, va="center", fontsize=9)


def arrow(ax: Axes, start: tuple[float, float], end: tuple[float, float], **style: str) -> None:
    ax.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#555555"} | style)


def draw_u(ax: Axes, names: list[str], title: str) -> list[tuple[float, float]]:
    """Boxes of `names` down the left side, in the middle, and up the right side, with skip connections -> places."""
    n = len(names) // 2
    places = [*((LEFT, -i) for i in range(n)), (MIDDLE, -n), *((RIGHT, 1 - n + i) for i in range(n))]
    for i, ((x, y), name) in enumerate(zip(places, names, strict=True)):
        box(ax, x, y, name, GREEN if i > n else BLUE)
        if i < n:
            arrow(ax, (x + WIDTH, y), (RIGHT, y), ls="--")
        if 0 < i < n:
            arrow(ax, (x + WIDTH / 2, y + 1 - HEIGHT / 2), (x + WIDTH / 2, y + HEIGHT / 2))
            arrow(ax, (RIGHT + WIDTH / 2, y + HEIGHT / 2), (RIGHT + WIDTH / 2, y + 1 - HEIGHT / 2))
    arrow(ax, (LEFT + WIDTH / 2, 1 - n - HEIGHT / 2), (MIDDLE, -n))
    arrow(ax, (MIDDLE + WIDTH, -n), (RIGHT + WIDTH / 2, 1 - n - HEIGHT / 2))
    ax.set(xlim=(-0.3, 6.3), ylim=(-6.8, 1.9), aspect="equal")
    ax.set_title(title, y=0.97)
    ax.axis("off")
    return places


def main(cfg: Config) -> None:
    default, encoder = mamba_levels("bottleneck"), mamba_levels("encoder")
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    network, block = figure.subplots(1, 2)

    names = [f"{s}: RSU-{height}{'F' if dilated else ''}" for s, (height, dilated, *_) in RSU_CONFIG.items()]
    for stage, (x, y) in zip(RSU_CONFIG, draw_u(network, names, "U2MAMBA: residual U-blocks (RSU)"), strict=True):
        badge(network, x + WIDTH - 0.1, y + HEIGHT / 2, filled=True)
        if encoder[stage] != default[stage]:
            badge(network, x + WIDTH - 0.5, y + HEIGHT / 2, filled=False)
        if x != LEFT:
            arrow(network, (x + WIDTH, y - 0.12), (x + WIDTH + 0.4, y - 0.12))
            network.text(x + WIDTH + 0.45, y - 0.12, f"d{stage[5]}", va="center", fontsize=9)
    network.text(RIGHT + WIDTH / 2, 0.7, "d0: fusion of d1, ..., d6", ha="center", fontsize=9)
    badge(network, 0, -6.0, True, "Mamba layer after the deepest convolution (default)")
    badge(network, 0, -6.5, False, 'also with mamba_at = "encoder"')

    names = [f"rebnconv{level}" for level in ("1", "2", "3", "4", "5", "6", "7", "6d", "5d", "4d", "3d", "2d", "1d")]
    for level, (x, y) in enumerate(draw_u(block, names, "Inside stage1, an RSU-7"), start=1):
        if level in encoder["stage1"]:
            badge(block, x + WIDTH - 0.1, y + HEIGHT / 2, filled=level in default["stage1"])
    box(block, LEFT, 1, "rebnconvin", BLUE)
    arrow(block, (LEFT + WIDTH / 2, 1 - HEIGHT / 2), (LEFT + WIDTH / 2, HEIGHT / 2))
    arrow(block, (LEFT + WIDTH, 1), (RIGHT + WIDTH / 2, HEIGHT / 2), connectionstyle="angle,angleA=0,angleB=90")
    block.text(MIDDLE + WIDTH / 2, 1.1, "residual", ha="center", fontsize=9)
    figure.savefig(cfg.out, dpi=100)


if __name__ == "__main__":
    cli(main, Config, __doc__)
