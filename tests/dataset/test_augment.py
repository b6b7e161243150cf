"""The stronger changes of training pictures: where pixels go, that masks go along, what the plan holds."""

import math

import numpy as np
import pytest
import torch

from data_loader import MEAN, STD, augment, epoch_plan
from u2mamba.dataset.augment import (
    ACROSS,
    ANGLE,
    BRIGHTNESS,
    CONTRAST,
    GREY,
    MIRROR,
    NUMBERS,
    PASTE,
    SATURATION,
    SIDE,
    UPSIDE_DOWN,
    Changes,
    _windows,
    change,
)


def numbers(count=1, **values):
    """All at 0.5, which is no change, but those given."""
    n = torch.full((count, NUMBERS), 0.5)
    for column, value in values.items():
        n[:, int(column[1:])] = value
    return n


def pair(size=32, count=1):
    generator = torch.Generator().manual_seed(0)
    return torch.rand(count, 3, size, size, generator=generator), torch.rand(count, 1, size, size, generator=generator)


STRAIGHT = torch.ones(1, 2)


@pytest.mark.parametrize("by", [Changes(window=1), Changes(rotate=30), Changes(colour=0.5)])
def test_numbers_in_the_middle_change_nothing(by):
    picture, mask = pair()
    got = change(picture, mask, numbers(), STRAIGHT, 32, by)
    assert torch.allclose(got, torch.cat((picture, mask), 1), atol=1e-5)


def test_the_smallest_window_is_the_middle_enlarged():
    picture, mask = pair()
    got = change(picture, mask, numbers(**{f"_{SIDE}": 0.0}), STRAIGHT, 16, Changes(window=0.5))
    assert torch.allclose(got[:, :3], picture[:, :, 8:24, 8:24], atol=1e-5)
    assert torch.allclose(got[:, 3:], mask[:, :, 8:24, 8:24], atol=1e-5)


@pytest.mark.parametrize("across", [0.0, 0.5, 1.0])
def test_the_largest_window_holds_the_whole_picture_and_its_mirror_images(across):
    picture, mask = pair()
    largest = numbers(**{f"_{SIDE}": 1.0, f"_{ACROSS}": across})
    got = change(picture, mask, largest, STRAIGHT, 48, Changes(window=0.6, beyond=0.5))
    left = round(16 * across)  # of the 16 columns that are more than the picture's
    expected = np.pad(torch.cat((picture, mask), 1), ((0, 0), (0, 0), (8, 8), (left, 16 - left)), mode="symmetric")
    assert np.allclose(got, expected, atol=1e-4)


def test_no_side_is_longer_than_the_largest_window():
    n = torch.rand(500, NUMBERS, generator=torch.Generator().manual_seed(1))
    sides = _windows(n, torch.ones(500, 2), Changes(window=0.6, beyond=0.4))[:, :, :2].abs().amax(1)  # width, height
    assert 0.5 < sides.min() < 0.6  # the smallest, at 3:4
    assert 1.35 < sides.max() <= 1.4


@pytest.mark.parametrize(("flips", "dims"), [((-1, 1), (3,)), ((1, -1), (2,)), ((-1, -1), (2, 3))])
def test_flips(flips, dims):
    picture, mask = pair()
    got = change(picture, mask, numbers(), torch.tensor([flips]), 32, Changes(window=1))
    assert torch.allclose(got, torch.cat((picture, mask), 1).flip(dims), atol=1e-5)


def test_a_quarter_turn():
    picture, mask = pair()
    got = change(picture, mask, numbers(**{f"_{ANGLE}": 1.0}), STRAIGHT, 32, Changes(rotate=90))
    whole = torch.cat((picture, mask), 1)
    assert min((got - whole.rot90(k, (2, 3))).abs().max() for k in (1, 3)) < 1e-4


def test_windows_stay_inside_the_picture():
    """Without rotation nothing is mirrored in: a picture with a marked rim shows it at most at the rim."""
    n = torch.rand(500, NUMBERS, generator=torch.Generator().manual_seed(1))
    ramp = torch.linspace(0, 1, 64).expand(500, 3, 64, 64)
    got = change(ramp, ramp[:, :1], n, torch.ones(500, 2), 64, Changes(window=0.3))[:, 0, 32]
    steps = got.diff(dim=1)
    assert steps.min() >= -1e-6  # mirrored parts would fall
    shares = got[:, -1] - got[:, 0]
    assert 0.25 < shares.min() < 0.35
    assert shares.max() > 0.95


def test_colours():
    picture, mask = pair()
    by = Changes(colour=0.4)
    bright = change(picture * 0.5, mask, numbers(**{f"_{BRIGHTNESS}": 1.0}), STRAIGHT, 32, by)
    assert torch.allclose(bright[:, :3], picture * 0.5 * 1.4, atol=1e-5)
    assert torch.allclose(bright[:, 3:], mask, atol=1e-6)
    luma = torch.tensor(GREY).view(1, 3, 1, 1)
    grey = change(picture, mask, numbers(**{f"_{SATURATION}": 0.0}), STRAIGHT, 32, Changes(colour=1.0))[:, :3]
    assert torch.allclose(grey, (picture * luma).sum(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-5)
    flat = change(picture, mask, numbers(**{f"_{CONTRAST}": 0.0}), STRAIGHT, 32, Changes(colour=1.0))[:, :3]
    assert torch.allclose(flat, torch.full_like(flat, float((picture * luma).sum(1).mean())), atol=1e-5)


def test_an_object_is_pasted_with_its_mask():
    pictures, _ = pair(count=2)
    masks = torch.zeros(2, 1, 32, 32)
    masks[0, :, :8], masks[1, :, 20:] = 1, 1
    got = change(pictures, masks, numbers(2, **{f"_{PASTE}": 0.0}), torch.ones(2, 2), 32, Changes(paste=0.5))
    assert torch.allclose(got[0, :3, 20:], pictures[1, :, 20:], atol=1e-5)  # the other's object
    assert torch.allclose(got[0, :3, :20], pictures[0, :, :20], atol=1e-5)  # its own picture
    assert torch.allclose(got[0, 3:], masks.amax(0), atol=1e-5)
    none = change(pictures, masks, numbers(2, **{f"_{PASTE}": 0.5}), torch.ones(2, 2), 32, Changes(paste=0.5))
    assert torch.allclose(none[:, 3:], masks, atol=1e-6)


def test_the_plan_holds_the_numbers_and_stays_what_it_was_without_them():
    plain, more = epoch_plan(50, 3, 7), epoch_plan(50, 3, 7, numbers=True)
    assert torch.equal(more[:, :4], plain)
    assert more.shape == (50, 4 + NUMBERS)
    assert torch.equal(more, epoch_plan(50, 3, 7, numbers=True))
    assert 0 <= more[:, 4:].min() < 1e6 < 15e6 < more[:, 4:].max() < 2**24


def test_batches_are_normalised_and_flipped_as_without_changes():
    generator = torch.Generator().manual_seed(2)
    images = torch.randint(256, (3, 40, 40, 3), dtype=torch.uint8, generator=generator)
    masks = torch.randint(256, (3, 40, 40), dtype=torch.uint8, generator=generator)
    rows = torch.tensor([[2, 0, 0, 0], [0, 0, 0, MIRROR], [1, 0, 0, UPSIDE_DOWN | MIRROR]])
    middle = torch.full((3, NUMBERS), 1 << 23)
    x, y = augment(images, masks, rows, 40, channels_last=True)
    got = augment(images, masks, torch.cat((rows, middle), 1), 40, True, Changes(window=1, rotate=20, colour=0.3))
    assert torch.allclose(got[0], x, atol=1e-4)
    assert torch.allclose(got[1], y, atol=1e-5)
    assert got[0].is_contiguous(memory_format=torch.channels_last)
    assert got[1].is_contiguous()
    assert math.isclose(float(x.max()), (1 - min(MEAN)) / STD[MEAN.index(min(MEAN))], rel_tol=0.05)
