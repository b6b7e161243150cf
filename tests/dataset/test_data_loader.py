"""The published classes, measured by scikit-image; rescaling and augmentation of a run, measured by these classes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import color
from skimage import transform as sk

from data_loader import MEAN, STD, RandomCrop, Rescale, RescaleT, SalObjDataset, ToTensor, ToTensorLab, augment
from tests.dataset.samples import ROUNDING, disc, make_folders, photo, sample
from u2mamba.dataset.augment import HFLIP, VFLIP
from u2mamba.dataset.rescale import rescale_image, rescale_mask
from u2mamba.runtime.source import PUBLISHED_LOADER, source_checksum


def test_the_published_classes_are_unchanged():
    """After a change on purpose, which the tests below approve: enter the new checksum."""
    assert source_checksum(Path(__file__).parents[2] / "data_loader.py") == PUBLISHED_LOADER


def test_rescale_t_is_skimage_squash():
    image, label = photo(90, 70), disc(90, 70)
    got = RescaleT(32)(sample(image, label))
    np.testing.assert_array_equal(got["image"], sk.resize(image, (32, 32), mode="constant"))
    expected = sk.resize(label[..., None], (32, 32), mode="constant", order=0, preserve_range=True)
    np.testing.assert_array_equal(got["label"], expected)
    assert RescaleT((20, 30))(sample(image, label))["image"].shape == (20, 30, 3)


@pytest.mark.parametrize(("height", "width", "expected"), [(90, 60, (48, 32)), (60, 90, (32, 48)), (50, 50, (32, 32))])
def test_rescale_keeps_the_shape_and_flips(height, width, expected):
    image = photo(height, width)
    flipped = []
    for seed in range(8):
        torch.manual_seed(seed)
        got = Rescale(32)(sample(image, disc(height, width)))["image"]
        assert got.shape[:2] == expected
        flipped.append(np.allclose(got, sk.resize(image[::-1], expected, mode="constant")))
        assert flipped[-1] or np.allclose(got, sk.resize(image, expected, mode="constant"))
    assert {True, False} == set(flipped)


def test_random_crop_takes_every_offset_and_flips_half():
    image = np.arange(6 * 5).reshape(6, 5, 1).repeat(3, axis=2)
    torch.manual_seed(0)
    seen = {}
    for _ in range(600):
        got = RandomCrop((4, 4))(sample(image, image[..., 0]))
        np.testing.assert_array_equal(got["image"][..., :1], got["label"])
        key = tuple(got["image"][:2, 0, 0].tolist())
        seen[key] = seen.get(key, 0) + 1
    assert len(seen) == 3 * 2 * 2  # tops, lefts, vertical flip or not
    upside_down = sum(count for (first, second), count in seen.items() if first > second)
    assert abs(upside_down - 300) < 50  # four deviations of 12.2
    same = RandomCrop(5)(sample(image[:5], image[:5, :, 0]))  # the published one fails here
    assert same["image"].shape == (5, 5, 3)
    with pytest.raises(ValueError, match="only 6x5"):
        RandomCrop(7)(sample(image, image[..., 0]))


def test_to_tensor_lab_flag_0_and_to_tensor():
    image, label = photo(20, 24) / 300.0, disc(20, 24)
    for make in (ToTensorLab(), ToTensor()):
        got = make(sample(image, label))
        expected = (image / image.max() - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(got["image"].numpy(), expected.transpose(2, 0, 1), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(got["label"].numpy(), (label / 255)[None])
        assert got["imidx"].tolist() == [3]
    gray = ToTensorLab()(sample(image[..., :1], label))["image"].numpy()
    np.testing.assert_allclose(gray[2], (image[..., 0] / image[..., 0].max() - 0.406) / 0.225)


@pytest.mark.parametrize("flag", [1, 2])
def test_to_tensor_lab_flags_1_and_2(flag):
    image = photo(20, 24) / 255.0
    got = ToTensorLab(flag)(sample(image, disc(20, 24)))["image"].numpy()
    planes = list(color.rgb2lab(image).transpose(2, 0, 1))
    if flag == 2:
        planes = list(image.transpose(2, 0, 1)) + planes
    for plane, channel in zip(planes, got, strict=True):
        ranged = (plane - plane.min()) / (plane.max() - plane.min())
        np.testing.assert_allclose(channel, (ranged - ranged.mean()) / ranged.std(), rtol=0, atol=1e-9)


def test_fixed_bugs_black_image_and_soft_edge():
    black = ToTensorLab()(sample(np.zeros((4, 4, 3)), np.zeros((4, 4), np.uint8)))
    np.testing.assert_allclose(black["image"][:, 0, 0], [-m / s for m, s in zip(MEAN, STD, strict=True)])
    assert float(black["label"].max()) == 0
    for flag in (1, 2):
        assert torch.isfinite(ToTensorLab(flag)(sample(np.full((4, 4, 3), 0.5), np.zeros((4, 4))))["image"]).all()
    rim = ToTensorLab()(sample(np.ones((4, 4, 3)), np.full((4, 4), 51, np.uint8)))
    np.testing.assert_allclose(rim["label"], 0.2)


def test_sal_obj_dataset(tmp_path):
    images, masks = make_folders(tmp_path, 2)
    names = sorted(images.iterdir()), sorted(masks.iterdir())
    got = SalObjDataset(*names)[1]
    assert got["imidx"].tolist() == [1]
    np.testing.assert_array_equal(got["image"], photo(60, 80, 1))
    np.testing.assert_array_equal(got["label"], disc(60, 80)[..., None])
    bare = SalObjDataset(names[0], [], transform=ToTensorLab())[0]
    assert bare["label"].shape == (1, 60, 80)
    assert float(bare["label"].max()) == 0


SIZES = [(1, 1), (1, 50), (37, 1), (2, 3), (64, 64), (64, 100), (47, 90), (300, 65), (411, 233), (1100, 40)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_rescaling_is_rescale_t(height, width):
    rng = np.random.default_rng(height)
    for image in (rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.full((height, width, 3), 90, np.uint8)):
        label = rng.integers(0, 256, (height, width), dtype=np.uint8)
        expected = RescaleT(64)(sample(image, label))
        assert np.abs(rescale_image(image, 64) / 255.0 - expected["image"]).max() <= ROUNDING + 1e-6
        np.testing.assert_array_equal(rescale_mask(label, 64), expected["label"][..., 0])


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flip", [0, VFLIP, HFLIP, VFLIP | HFLIP])
def test_augment_is_the_reference_on_the_original_image(flip, channels_last):
    image, label = photo(300, 401, seed=5), disc(300, 401)
    images, masks = (torch.from_numpy(a)[None] for a in (rescale_image(image, 320), rescale_mask(label, 320)))
    x, y = augment(images, masks, torch.tensor([[0, 32, 5, flip]]), channels_last=channels_last)
    got = RescaleT(320)(sample(image, label))
    for key in ("image", "label"):
        array = got[key][::-1] if flip & VFLIP else got[key]
        array = array[:, ::-1] if flip & HFLIP else array
        got[key] = array[32 : 32 + 288, 5 : 5 + 288]
    expected = ToTensorLab(0)(got)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1, 3, 288, 288), torch.float32, (1, 1, 288, 288), torch.float32)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for c in range(3):  # 1/255 before the division by the deviation
        assert float((x[0, c] - expected["image"][c]).abs().max()) * STD[c] <= 1 / 255
    assert torch.equal(y[0], expected["label"].float())
