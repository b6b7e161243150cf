"""Draws docs/architecture.png: U²-Net's stages, one residual U-block, and where the Mamba layers are in them.

python -m benchmarks.draw_architecture

Blocks and layers are read from the networks.
"""

from dataclasses import dataclass

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from model import U2MAMBA
from model.u2net import RSU_CONFIG
from u2mamba.runtime.config import read_settings

BLUE, GREEN, ORANGE = "#dce9f5", "#e4efdc", "#f0883e"  # encoder, decoder, Mamba layers
WIDTH, HEIGHT = 1.7, 0.5  # of a box; rows are 1 apart
LEFT, MIDDLE, RIGHT = 0.0, 1.8, 3.6  # left sides of the boxes
BLOCK = "stage1"  # drawn in detail


@dataclass
class Config:
    out: str = "docs/architecture.png"


def mamba_levels(mamba_at: str) -> dict[str, list[int]]:
    """Stage -> the levels of its RSU that have a Mamba layer."""
    with torch.device("meta"):
        net = U2MAMBA(mamba_at=mamba_at)
    rsus = {stage: getattr(net, stage) for stage in RSU_CONFIG}
    return {stage: [i for i in range(1, rsu.height + 1) if hasattr(rsu, f"mamba{i}")] for stage, rsu in rsus.items()}


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


def draw_u(ax: Axes, names: list[str], title: str) -> None:
    """Boxes of `names`: down the left side, one in the middle, up the right side; with skip connections."""
    n = len(names) // 2
    for i in range(n):
        box(ax, LEFT, -i, names[i], BLUE)
        box(ax, RIGHT, -i, names[-1 - i], GREEN)
        arrow(ax, (LEFT + WIDTH, -i), (RIGHT, -i), ls="--")
        if i:
            arrow(ax, (LEFT + WIDTH / 2, 1 - i - HEIGHT / 2), (LEFT + WIDTH / 2, HEIGHT / 2 - i))
            arrow(ax, (RIGHT + WIDTH / 2, HEIGHT / 2 - i), (RIGHT + WIDTH / 2, 1 - i - HEIGHT / 2))
    box(ax, MIDDLE, -n, names[n], BLUE)
    arrow(ax, (LEFT + WIDTH / 2, 1 - n - HEIGHT / 2), (MIDDLE, -n))
    arrow(ax, (MIDDLE + WIDTH, -n), (RIGHT + WIDTH / 2, 1 - n - HEIGHT / 2))
    ax.set(xlim=(-0.3, 6.3), ylim=(-6.8, 1.9), aspect="equal")
    ax.set_title(title, y=0.97)
    ax.axis("off")


def main(cfg: Config) -> None:
    default, encoder = mamba_levels("bottleneck"), mamba_levels("encoder")
    figure = Figure(figsize=(12, 7.6), layout="constrained")
    network, block = figure.subplots(1, 2)

    titles = [f"{s}: RSU-{height}{'F' if dilated else ''}" for s, (height, dilated, *_) in RSU_CONFIG.items()]
    draw_u(network, titles, "U2MAMBA: eleven residual U-blocks (RSU)")
    for i, stage in enumerate(RSU_CONFIG):
        x, y = (LEFT, -i) if i < 5 else (MIDDLE, -i) if i == 5 else (RIGHT, i - 10)
        for place, filled in enumerate([True] * bool(default[stage]) + [False] * (encoder[stage] != default[stage])):
            badge(network, x + WIDTH - 0.1 - 0.4 * place, y + HEIGHT / 2, filled)
        if i >= 5:
            arrow(network, (x + WIDTH, y - 0.12), (x + WIDTH + 0.4, y - 0.12))
            network.text(x + WIDTH + 0.45, y - 0.12, f"d{stage[5]}", va="center", fontsize=9)
    network.text(RIGHT + WIDTH / 2, 0.7, "d0: fusion of d1, ..., d6", ha="center", fontsize=9)
    badge(network, 0, -6.0, True, "Mamba layer after the deepest convolution (default)")
    badge(network, 0, -6.5, False, 'also with mamba_at = "encoder"')

    height = RSU_CONFIG[BLOCK][0]
    down, up = [f"rebnconv{i}" for i in range(1, height + 1)], [f"rebnconv{i}d" for i in range(height - 1, 0, -1)]
    draw_u(block, down + up, f"Inside {BLOCK}, an RSU-{height}")
    box(block, LEFT, 1, "rebnconvin", BLUE)
    arrow(block, (LEFT + WIDTH / 2, 1 - HEIGHT / 2), (LEFT + WIDTH / 2, HEIGHT / 2))
    arrow(block, (LEFT + WIDTH, 1), (RIGHT + WIDTH / 2, HEIGHT / 2), connectionstyle="angle,angleA=0,angleB=90")
    block.text(MIDDLE + WIDTH / 2, 1.1, "residual", ha="center", fontsize=9)
    for level in encoder[BLOCK]:
        x = MIDDLE if level == height else LEFT
        badge(block, x + WIDTH - 0.1, 1 - level + HEIGHT / 2, level in default[BLOCK])
    figure.savefig(cfg.out, dpi=100)


if __name__ == "__main__":
    main(read_settings(Config()))
