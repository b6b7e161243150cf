"""Foreground colors on composites whose foreground is known, and cut-outs of images that leave nothing to estimate."""

import numpy as np
import pytest
import torch
from PIL import Image

from tests.inference.test_predict import weights
from u2mamba.inference.foreground import foreground_colors
from u2mamba_predict import MODES, Config, main


def disk(height: int, width: int, edge: float) -> np.ndarray:
    """Alpha of a disk in the middle, falling from 1 to 0 over `edge` pixels."""
    y, x = np.mgrid[:height, :width] + 0.5
    distance = np.hypot(y - height / 2, x - width / 2) - min(height, width) / 3
    return np.rint(np.clip(0.5 - distance / edge, 0, 1) * 255).astype(np.uint8)


@pytest.mark.parametrize(("height", "width", "edge"), [(90, 120, 6), (700, 500, 10), (900, 1501, 40)])
def test_soft_edges_lose_the_old_background(height, width, edge):
    alpha, rng = disk(height, width, edge), np.random.default_rng(0)
    a = alpha[..., None] / 255
    colors = np.array([200, 60, 30]) + rng.normal(0, 8, (height, width, 3))
    image = np.rint((a * colors + (1 - a) * [20, 110, 190]).clip(0, 255)).astype(np.uint8)
    before = image.copy()
    result, soft = foreground_colors(image, alpha), (alpha > 0) & (alpha < 255)
    assert np.array_equal(image, before)
    assert np.array_equal(result[~soft], image[~soft])  # opaque pixels are the photo's
    errors = [np.abs(c - colors)[soft].mean() for c in (image, result)]
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("value", [0, 255])
def test_constant_maps_of_small_transparent_and_large_images(value, tmp_path, capsys):
    """A cut-out has the image's colors and at most its alpha; what is too large is refused before it is decoded."""
    state = weights() | {"outconv.weight": torch.zeros(1, 6, 1, 1), "outconv.bias": torch.tensor([value - 127.5])}
    torch.save(state, tmp_path / "net.pth")
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (1, 1), (10, 130, 250)).save(tmp_path / "photos/pixel.png")
    Image.new("RGBA", (9, 5), (255, 255, 255, 70)).save(tmp_path / "photos/transparent.png")
    Image.new("1", (8193, 8192)).save(tmp_path / "photos/large.png")
    cfg = Config((str(tmp_path / "photos"),), str(tmp_path / "net.pth"), str(tmp_path / "out"), tuple(MODES), 48)
    assert main(cfg) == 1
    lines = capsys.readouterr().err.splitlines()
    assert sum(f"its map is constant ({value} of 255)" in line for line in lines) == 2
    assert sum("large.png: declares 8193x8192 pixels" in line for line in lines) == 1
    assert len([p for p in (tmp_path / "out").rglob("*") if p.is_file()]) == 3 * len(MODES)  # with settings.json
    for name, pixel in (("pixel", (10, 130, 250, value)), ("transparent", (255, 255, 255, min(value, 70)))):
        with Image.open(tmp_path / f"out/cutout/{name}.png") as cutout:
            assert (np.asarray(cutout) == pixel).all()
