"""Rescaling to the network's square and back, measured by scikit-image and PyTorch."""

import time

import numpy as np
import pytest
import torch
from skimage import transform as sk
from torch.nn import functional as F

from tests.dataset.samples import ROUNDING, photo
from u2mamba.dataset.rescale import rescale_image, resize_map


def test_a_very_long_image():
    image = photo(9000, 50)
    expected = sk.resize(image, (320, 320), mode="constant")
    assert np.abs(rescale_image(image, 320) / 255.0 - expected).max() <= ROUNDING + 1e-6


@pytest.mark.parametrize("shape", [(65_535, 3), (3, 65_535), (1, 1)])
def test_shapes_at_the_limit_are_rescaled(shape):
    start = time.process_time()
    rows = np.arange(shape[0] * shape[1], dtype=np.uint32).reshape(shape)
    out = rescale_image(np.dstack([rows * 255 // max(1, rows.max())] * 3).astype(np.uint8), 320)
    assert out.shape == (320, 320, 3)
    assert time.process_time() - start < 5  # a dense operator of 65,535 x 320 took minutes and 1 GB


@pytest.mark.parametrize("shape", [(3000, 1500), (7, 201), (20, 10), (1, 1), (31, 33)])
@pytest.mark.parametrize("source", [(32, 32), (40, 24), (1, 1)])
def test_maps_are_resized_as_pytorch_does(shape, source):
    saliency = np.random.default_rng(0).random(source)
    expected = F.interpolate(torch.from_numpy(saliency)[None, None], shape, mode="bilinear", align_corners=False)[0, 0]
    np.testing.assert_allclose(resize_map(saliency, shape), expected.numpy(), rtol=0, atol=1e-12)
    single = resize_map(saliency.astype(np.float32), shape)
    assert single.dtype == np.float32
    np.testing.assert_allclose(single, expected.numpy(), rtol=0, atol=4 * 2**-24)  # weights, two products and a sum
