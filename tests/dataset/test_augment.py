"""Augmentation: where pixels go, that masks go along, and the plan of an epoch."""

import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from data_loader import MEAN, STD, augment, epoch_plan
from u2mamba.dataset import augment as module
from u2mamba.dataset.augment import FLIP, HFLIP, INDEX, LEFT, LUMA, NUM_RANDOM, TOP, VFLIP, Augmentation, augment_batch


def random(**values):
    """All at 0.5, which changes nothing, but those given: {name of a column in lower case: value}."""
    numbers = torch.full((1, NUM_RANDOM), 0.5)
    for column, value in values.items():
        numbers[:, getattr(module, column.upper())] = value
    return numbers


IMAGE, MASK = torch.rand(1, 4, 32, 32, generator=torch.Generator().manual_seed(0)).split([3, 1], dim=1)
BOTH = torch.cat((IMAGE, MASK), 1)
STRAIGHT = torch.ones(1, 2)
MANY = torch.rand(500, NUM_RANDOM, generator=torch.Generator().manual_seed(1))


def augmented(augmentation, image=IMAGE, mask=MASK, size=32, flips=STRAIGHT, **numbers):
    return augment_batch(image, mask, random(**numbers), torch.as_tensor(flips), size, augmentation)


def padded(left: int) -> torch.Tensor:
    """BOTH with 16 reflected rows and columns more, `left` of them on the left."""
    return torch.from_numpy(np.pad(BOTH, ((0, 0), (0, 0), (8, 8), (left, 16 - left)), mode="symmetric"))


@pytest.mark.parametrize(
    ("augmentation", "options", "expected"),
    [
        (Augmentation(1, 1), {}, BOTH),  # numbers in the middle change nothing
        (Augmentation(rotation_degrees=30), {}, BOTH),
        (Augmentation(color_jitter=0.5), {}, BOTH),
        (Augmentation(color_jitter=0.5, sharpness=1), {"image": IMAGE[:, :1]}, BOTH[:, [0, 3]]),
        (Augmentation(0.5, 1), {"scale": 0, "size": 16}, BOTH[..., 8:24, 8:24]),
        (Augmentation(rotation_degrees=90), {"angle": 1}, BOTH.rot90(1, (2, 3))),
        (Augmentation(1, 1), {"flips": [[-1, 1]]}, BOTH.flip(3)),
        (Augmentation(1, 1), {"flips": [[1, -1]]}, BOTH.flip(2)),
        *((Augmentation(0.6, 1.5), {"scale": 1, "center_x": x, "size": 48}, padded(int(16 * x))) for x in (0, 0.5, 1)),
    ],
)
def test_where_pixels_of_image_and_mask_go(augmentation, options, expected):
    torch.testing.assert_close(augmented(augmentation, **options), expected, rtol=0, atol=1e-4)


def test_no_side_is_longer_than_scale_max():
    params = module._affine_params(MANY, STRAIGHT.expand(500, 2), Augmentation(0.6, 1.4))
    sides = params[:, :, :2].abs().amax(1)  # width, height
    assert 0.5 < sides.min() < 0.6  # the smallest, at 3:4
    assert 1.35 < sides.max() <= 1.4


def test_crops_stay_inside_the_image():
    """Without rotation there is no padding: a ramp never falls."""
    ramp = torch.linspace(0, 1, 64).expand(500, 3, 64, 64)
    got = augment_batch(ramp, ramp[:, :1], MANY, STRAIGHT.expand(500, 2), 64, Augmentation(0.3, 1))[:, 0, 32]
    assert got.diff(dim=1).min() >= -1e-6  # reflected parts would fall
    shares = got[:, -1] - got[:, 0]
    assert 0.25 < shares.min() < 0.35
    assert shares.max() > 0.95


def test_color_jitter():
    bright = augmented(Augmentation(color_jitter=0.4), IMAGE * 0.5, brightness=1.0)
    assert torch.allclose(bright, torch.cat((IMAGE * 0.5 * 1.4, MASK), 1), atol=1e-5)
    luma = (IMAGE * torch.tensor(LUMA).view(1, 3, 1, 1)).sum(1, keepdim=True).expand(IMAGE.shape)
    gray, flat = (augmented(Augmentation(color_jitter=1), **{name: 0}) for name in ("saturation", "contrast"))
    assert torch.allclose(gray[:, :3], luma, atol=1e-5)
    assert torch.allclose(flat[:, :3], luma.mean().expand(luma.shape), atol=1e-5)


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
    more = epoch_plan(500, epoch=3, seed=7, random=True)
    assert torch.equal(more[:, :4], plan) and torch.equal(more, epoch_plan(500, epoch=3, seed=7, random=True))
    assert more.shape[1] == 4 + NUM_RANDOM and 0 <= more[:, 4:].min() < 1e6 < 15e6 < more[:, 4:].max() < 2**24
    with pytest.raises(ValueError, match="crop = 288 must be"):
        epoch_plan(9, 0, 0, rescale=256)


def test_augment_of_black_and_both_ways_to_crop():
    torch.manual_seed(0)
    images, masks = torch.randint(0, 256, (5, 40, 40, 3), dtype=torch.uint8), torch.zeros(5, 40, 40, dtype=torch.uint8)
    images[2], masks[3] = 0, torch.arange(40, dtype=torch.uint8) * 6
    rows = torch.tensor(list(itertools.product(range(5), (0, 3, 8), (0, 8), range(4))))
    one, other = (crop(images, masks, rows, 32) for crop in (module._crop_slice, module._crop_gather))
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    x, y = augment(images, masks, torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0]]), crop=32)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]))
    torch.testing.assert_close(y[1, 0, 0], torch.arange(32) * 6 / 255)


@pytest.mark.parametrize(("number", "strength"), [(0.0, 1.2), (1.0, 1.2), (0.0, 3.0)])
def test_sharpness_blurs_toward_the_smoothing_filter_and_sharpens_away_from_it(number, strength):
    pixels = np.random.default_rng(1).integers(60, 190, (32, 32, 3), dtype=np.uint8)
    smooth = Image.fromarray(pixels).filter(ImageFilter.SMOOTH)
    image, smooth = (torch.from_numpy(np.array(a)).permute(2, 0, 1)[None] / 255 for a in (pixels, smooth))
    got = augmented(Augmentation(1, 1, sharpness=strength), image, sharpness=number)
    factor = math.exp(strength * (2 * number - 1))
    expected = (smooth + factor * (image - smooth)).clamp(0, 1)
    inside = np.s_[:, :3, 1:-1, 1:-1]  # Pillow leaves the border as it is
    assert (got[inside] - expected[inside]).abs().max() < (1 + factor) / 255  # its result is rounded
    assert torch.allclose(got[:, 3:], MASK, atol=1e-6)


def test_noise_has_the_deviation_and_depends_on_the_plan_alone():
    image, mask = torch.full((2, 3, 64, 64), 0.5), torch.zeros(2, 1, 64, 64)
    numbers = random().repeat(2, 1)
    numbers[1, module.NOISE_X] = 0.25  # another part of the field
    before = torch.get_rng_state()
    first, again = (
        augment_batch(image, mask, numbers, STRAIGHT.repeat(2, 1), 64, Augmentation(1, 1, noise=0.1)) for _ in range(2)
    )
    assert torch.equal(first, again) and torch.equal(torch.get_rng_state(), before)
    noise = first[:, :3] - 0.5
    assert noise.std().item() == pytest.approx(0.05, rel=0.05) and abs(noise.mean().item()) < 0.002
    assert not torch.equal(noise[0], noise[1]) and not first[:, 3:].any()
