"""Augmentation: where pixels go, that masks go along, and the plan of an epoch."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_loader import MEAN, STD, augment, epoch_plan
from u2mamba.dataset.augment import (
    ANGLE,
    BRIGHTNESS,
    CENTER_X,
    CONTRAST,
    FLIP,
    HFLIP,
    INDEX,
    LEFT,
    LUMA,
    NOISE,
    NOISE_X,
    NUM_RANDOM,
    SATURATION,
    SCALE,
    SHARPNESS,
    TOP,
    VFLIP,
    Augmentation,
    _affine_params,
    _crop_gather,
    _crop_slice,
    augment_batch,
)


def random(count=1, **values):
    """All at 0.5, which changes nothing, but those given."""
    n = torch.full((count, NUM_RANDOM), 0.5)
    for column, value in values.items():
        n[:, int(column[1:])] = value
    return n


def pair(size=32, count=1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator), torch.rand(count, 1, size, size, generator=generator)


STRAIGHT = torch.ones(1, 2)


@pytest.mark.parametrize(
    "augmentation", [Augmentation(1, 1), Augmentation(rotation_degrees=30), Augmentation(color_jitter=0.5)]
)
def test_random_numbers_in_the_middle_change_nothing(augmentation):
    image, mask = pair()
    got = augment_batch(image, mask, random(), STRAIGHT, 32, augmentation)
    assert torch.allclose(got, torch.cat((image, mask), 1), atol=1e-5)


def test_the_smallest_crop_is_the_middle_enlarged():
    image, mask = pair()
    got = augment_batch(image, mask, random(**{f"_{SCALE}": 0.0}), STRAIGHT, 16, Augmentation(0.5, 1))
    assert torch.allclose(got[:, :3], image[:, :, 8:24, 8:24], atol=1e-5)
    assert torch.allclose(got[:, 3:], mask[:, :, 8:24, 8:24], atol=1e-5)


@pytest.mark.parametrize("center_x", [0.0, 0.5, 1.0])
def test_the_largest_crop_holds_the_whole_image_and_reflection_padding(center_x):
    image, mask = pair()
    largest = random(**{f"_{SCALE}": 1.0, f"_{CENTER_X}": center_x})
    got = augment_batch(image, mask, largest, STRAIGHT, 48, Augmentation(0.6, 1.5))
    left = round(16 * center_x)  # of the 16 columns that are more than the image's
    expected = np.pad(torch.cat((image, mask), 1), ((0, 0), (0, 0), (8, 8), (left, 16 - left)), mode="symmetric")
    assert np.allclose(got, expected, atol=1e-4)


def test_no_side_is_longer_than_scale_max():
    n = torch.rand(500, NUM_RANDOM, generator=torch.Generator().manual_seed(1))
    sides = _affine_params(n, torch.ones(500, 2), Augmentation(0.6, 1.4))[:, :, :2].abs().amax(1)  # width, height
    assert 0.5 < sides.min() < 0.6  # the smallest, at 3:4
    assert 1.35 < sides.max() <= 1.4


@pytest.mark.parametrize(("flips", "dims"), [((-1, 1), (3,)), ((1, -1), (2,)), ((-1, -1), (2, 3))])
def test_flips(flips, dims):
    image, mask = pair()
    got = augment_batch(image, mask, random(), torch.tensor([flips]), 32, Augmentation(1, 1))
    assert torch.allclose(got, torch.cat((image, mask), 1).flip(dims), atol=1e-5)


def test_a_quarter_turn():
    image, mask = pair()
    got = augment_batch(image, mask, random(**{f"_{ANGLE}": 1.0}), STRAIGHT, 32, Augmentation(rotation_degrees=90))
    whole = torch.cat((image, mask), 1)
    assert min((got - whole.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4


def test_crops_stay_inside_the_image():
    """Without rotation there is no padding: a ramp never falls."""
    n = torch.rand(500, NUM_RANDOM, generator=torch.Generator().manual_seed(1))
    ramp = torch.linspace(0, 1, 64).expand(500, 3, 64, 64)
    got = augment_batch(ramp, ramp[:, :1], n, torch.ones(500, 2), 64, Augmentation(0.3, 1))[:, 0, 32]
    steps = got.diff(dim=1)
    assert steps.min() >= -1e-6  # reflected parts would fall
    shares = got[:, -1] - got[:, 0]
    assert 0.25 < shares.min() < 0.35
    assert shares.max() > 0.95


def test_color_jitter():
    image, mask = pair()
    augmentation = Augmentation(color_jitter=0.4)
    bright = augment_batch(image * 0.5, mask, random(**{f"_{BRIGHTNESS}": 1.0}), STRAIGHT, 32, augmentation)
    assert torch.allclose(bright[:, :3], image * 0.5 * 1.4, atol=1e-5)
    assert torch.allclose(bright[:, 3:], mask, atol=1e-6)
    luma = torch.tensor(LUMA).view(1, 3, 1, 1)
    gray = augment_batch(image, mask, random(**{f"_{SATURATION}": 0.0}), STRAIGHT, 32, Augmentation(color_jitter=1.0))[
        :, :3
    ]
    assert torch.allclose(gray, (image * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-5)
    flat = augment_batch(image, mask, random(**{f"_{CONTRAST}": 0.0}), STRAIGHT, 32, Augmentation(color_jitter=1.0))[
        :, :3
    ]
    assert torch.allclose(flat, torch.full_like(flat, float((image * luma).sum(1).mean())), atol=1e-5)


def test_the_plan_is_the_same_with_and_without_random_numbers():
    plain, more = epoch_plan(50, 3, 7), epoch_plan(50, 3, 7, random=True)
    assert torch.equal(more[:, :4], plain)
    assert more.shape == (50, 4 + NUM_RANDOM)
    assert torch.equal(more, epoch_plan(50, 3, 7, random=True))
    assert 0 <= more[:, 4:].min() < 1e6 < 15e6 < more[:, 4:].max() < 2**24


def test_batches_are_normalized_and_flipped_as_without_augmentation():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (3, 40, 40, 3), dtype=torch.uint8, generator=generator)
    masks = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=generator)
    rows = torch.tensor([[2, 0, 0, 0], [0, 0, 0, HFLIP], [1, 0, 0, VFLIP | HFLIP]])
    middle = torch.full((3, NUM_RANDOM), 1 << 23)
    x, y = augment(images, masks, rows, 40, channels_last=True)
    got = augment(images, masks, torch.cat((rows, middle), 1), 40, True, Augmentation(1, 1, 20, 0.3))
    assert torch.allclose(got[0], x, atol=1e-4)
    assert torch.allclose(got[1], y, atol=1e-5)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous()
    assert math.isclose(float(x.max()), (1 - min(MEAN)) / STD[MEAN.index(min(MEAN))], rel_tol=0.05)


def test_plan_is_a_function_of_its_arguments():
    plan = epoch_plan(500, epoch=3, seed=7)
    assert torch.equal(plan, epoch_plan(500, epoch=3, seed=7))
    assert not torch.equal(plan, epoch_plan(500, epoch=4, seed=7))
    assert not torch.equal(plan, epoch_plan(500, epoch=3, seed=7 + 2**32))  # more than 32 bits of the seed count
    assert plan.dtype == torch.int64
    assert sorted(plan[:, INDEX].tolist()) == list(range(500))
    for column in (TOP, LEFT):
        assert (int(plan[:, column].min()), int(plan[:, column].max())) == (0, 32)  # the last offset too
    assert abs(int((plan[:, FLIP] == VFLIP).sum()) - 250) < 45  # four standard deviations of 11.2
    assert int(plan[:, FLIP].max()) == VFLIP
    assert set(epoch_plan(500, 0, 0, hflip_prob=0.5)[:, FLIP].tolist()) == {0, 1, 2, 3}
    assert int(epoch_plan(9, 0, 0, rescale=288)[:, [TOP, LEFT]].max()) == 0
    with pytest.raises(ValueError, match="crop = 288 must be"):
        epoch_plan(9, 0, 0, rescale=256)


def test_augment_of_black_and_both_ways_to_crop():
    torch.manual_seed(0)
    images, masks = torch.randint(0, 256, (5, 40, 40, 3), dtype=torch.uint8), torch.zeros(5, 40, 40, dtype=torch.uint8)
    images[2], masks[3] = 0, torch.arange(40, dtype=torch.uint8) * 6
    rows = torch.tensor(list(itertools.product(range(5), (0, 3, 8), (0, 8), range(4))))
    for one, other in zip(
        _crop_slice(images, masks, rows, 32),
        _crop_gather(images, masks, rows, 32),
        strict=True,
    ):
        assert torch.equal(one, other)
    x, y = augment(images, masks, torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0]]), crop=32)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]))
    torch.testing.assert_close(y[1, 0, 0], torch.arange(32) * 6 / 255)


def test_sharpness_blurs_toward_the_smoothing_filter_and_sharpens_away_from_it():
    torch.manual_seed(1)
    pixels = torch.randint(60, 190, (1, 3, 32, 32), dtype=torch.uint8)
    smooth = Image.fromarray(pixels[0].permute(1, 2, 0).numpy()).filter(ImageFilter.SMOOTH)
    smooth = torch.from_numpy(np.asarray(smooth).copy()).permute(2, 0, 1)[None].float() / 255
    image = pixels.float() / 255
    for number, strength in ((0.0, 1.2), (1.0, 1.2), (0.0, 3.0)):
        factor = math.exp(strength * (2 * number - 1))
        got = augment_batch(
            image,
            image[:, :1],
            random(**{f"_{SHARPNESS}": number}),
            STRAIGHT,
            32,
            Augmentation(1, 1, sharpness=strength),
        )
        expected = (smooth + factor * (image - smooth)).clamp(0, 1)
        inside = (slice(None), slice(0, 3), slice(1, -1), slice(1, -1))  # Pillow leaves the border as it is
        assert (got[inside] - expected[inside]).abs().max() < (1 + factor) / 255  # its result is rounded
        assert torch.allclose(got[:, 3:], image[:, :1], atol=1e-6)  # the mask stays


def test_noise_has_the_deviation_and_depends_on_the_plan_alone():
    image, mask = torch.full((2, 3, 64, 64), 0.5), torch.zeros(2, 1, 64, 64)
    numbers = random(**{f"_{NOISE}": 0.5}).repeat(2, 1)
    numbers[1, NOISE_X] = 0.25  # another part of the field
    before = torch.get_rng_state()
    first, again = (
        augment_batch(image, mask, numbers, STRAIGHT.repeat(2, 1), 64, Augmentation(1, 1, noise=0.1)) for _ in range(2)
    )
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    noise = first[:, :3] - 0.5
    assert noise.std().item() == pytest.approx(0.05, rel=0.05) and abs(noise.mean().item()) < 0.002
    assert not torch.equal(noise[0], noise[1]) and not first[:, 3:].any()
