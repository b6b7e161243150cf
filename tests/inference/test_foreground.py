"""u2mamba/inference/foreground.py: the colors of cut-outs on composites whose foreground is known."""

import numpy as np
import pytest

from u2mamba.inference.foreground import foreground_colors


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


@pytest.mark.parametrize("value", [0, 1, 128, 255])
@pytest.mark.parametrize("shape", [(1, 1), (1, 700), (33, 5)])
def test_any_map_gives_colors_of_the_image(value, shape):
    image = np.full((*shape, 3), (10, 130, 250), np.uint8)
    result = foreground_colors(image, np.full(shape, value, np.uint8))
    assert np.abs(result.astype(int) - image).max() <= 1  # of a single color nothing else can be estimated
