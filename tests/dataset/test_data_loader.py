"""Reading, pairs, check, rescaling, cache, plan, augmentation. scikit-image, Pillow and NumPy are the measure."""

from __future__ import annotations

import itertools
import os
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from skimage import color
from skimage import transform as sk

import data_loader
from data_loader import (
    MEAN,
    STD,
    RandomCrop,
    Rescale,
    RescaleT,
    SalObjDataset,
    ToTensor,
    ToTensorLab,
    augment,
    batches,
    epoch_plan,
    open_data,
    validation_batches,
)
from u2mamba.dataset import augment as augment_module
from u2mamba.dataset import batches as batches_module
from u2mamba.dataset import cache as cache_module
from u2mamba.dataset import decode as decode_module
from u2mamba.dataset import pairs as pairs_module
from u2mamba.dataset.augment import FLIP, INDEX, LEFT, MIRROR, TOP, UPSIDE_DOWN
from u2mamba.dataset.cache import PairCache, axis_operator, rescale_image, rescale_mask
from u2mamba.dataset.decode import read_map
from u2mamba.dataset.pairs import (
    BadFile,
    DataError,
    Pair,
    check_pairs,
    find_pairs,
    hold_out,
    is_held_out,
    read_image,
    read_mask,
    read_pair,
    scale_mask,
)

ROUNDING = 0.5 / 255  # of a picture in 0-1 that was stored as bytes


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A smooth picture with some grain, (height, width, 3) uint8, that reaches 255."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(y / 9 + k) + np.cos(x / (7 + k) + seed) for k in range(3)], axis=2)
    out = np.clip(127 + 50 * waves + rng.normal(0, 8, (height, width, 3)), 0, 255).astype(np.uint8)
    out[height // 2, width // 2] = 255
    return out


def disc(height: int, width: int) -> np.ndarray:
    """A mask with an off-centre disc, uint8 0 and 255."""
    y, x = np.mgrid[0:height, 0:width]
    return np.where((y / height - 0.4) ** 2 + (x / width - 0.6) ** 2 < 0.05, 255, 0).astype(np.uint8)


def sample(image: np.ndarray, label: np.ndarray) -> dict:
    return {"imidx": np.array([3]), "image": image, "label": label[..., None]}


def make_folders(root: Path, count: int = 6, size: tuple[int, int] = (60, 80)) -> tuple[Path, Path]:
    images, masks = root / "im_aug", root / "gt_aug"
    images.mkdir(parents=True)
    masks.mkdir()
    for k in range(count):
        Image.fromarray(picture(*size, seed=k)).save(images / f"p{k:03d}.png")
        Image.fromarray(disc(*size)).save(masks / f"p{k:03d}.png")
    return images, masks


# -------------------------------------------------------------------------------------- the published classes


def test_rescale_t_is_skimage_squash():
    image, label = picture(90, 70), disc(90, 70)
    got = RescaleT(32)(sample(image, label))
    np.testing.assert_array_equal(got["image"], sk.resize(image, (32, 32), mode="constant"))
    expected = sk.resize(label[..., None], (32, 32), mode="constant", order=0, preserve_range=True)
    np.testing.assert_array_equal(got["label"], expected)
    assert RescaleT((20, 30))(sample(image, label))["image"].shape == (20, 30, 3)


@pytest.mark.parametrize(("height", "width", "expected"), [(90, 60, (48, 32)), (60, 90, (32, 48)), (50, 50, (32, 32))])
def test_rescale_keeps_the_shape_and_flips(height, width, expected):
    image = picture(height, width)
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
    assert len(seen) == 3 * 2 * 2  # tops, lefts, upside down or not
    upside_down = sum(count for (first, second), count in seen.items() if first > second)
    assert abs(upside_down - 300) < 50  # four deviations of 12.2
    same = RandomCrop(5)(sample(image[:5], image[:5, :, 0]))  # the published one fails here
    assert same["image"].shape == (5, 5, 3)
    with pytest.raises(ValueError, match="only 6x5"):
        RandomCrop(7)(sample(image, image[..., 0]))


def test_to_tensor_lab_flag_0_and_to_tensor():
    image, label = picture(20, 24) / 300.0, disc(20, 24)
    for make in (ToTensorLab(), ToTensor()):
        got = make(sample(image, label))
        expected = (image / image.max() - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
        np.testing.assert_allclose(got["image"].numpy(), expected.transpose(2, 0, 1), rtol=0, atol=1e-12)
        np.testing.assert_array_equal(got["label"].numpy(), (label / 255)[None])
        assert got["imidx"].tolist() == [3]
    grey = ToTensorLab()(sample(image[..., :1], label))["image"].numpy()
    np.testing.assert_allclose(grey[2], (image[..., 0] / image[..., 0].max() - 0.406) / 0.225)


@pytest.mark.parametrize("flag", [1, 2])
def test_to_tensor_lab_flags_1_and_2(flag):
    image = picture(20, 24) / 255.0
    got = ToTensorLab(flag)(sample(image, disc(20, 24)))["image"].numpy()
    planes = list(color.rgb2lab(image).transpose(2, 0, 1))
    if flag == 2:
        planes = list(image.transpose(2, 0, 1)) + planes
    for plane, channel in zip(planes, got, strict=True):
        ranged = (plane - plane.min()) / (plane.max() - plane.min())
        np.testing.assert_allclose(channel, (ranged - ranged.mean()) / ranged.std(), rtol=0, atol=1e-9)


def test_mended_slips_black_image_and_soft_rim():
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
    np.testing.assert_array_equal(got["image"], picture(60, 80, 1))
    np.testing.assert_array_equal(got["label"], disc(60, 80)[..., None])
    bare = SalObjDataset(names[0], [], transform=ToTensorLab())[0]
    assert bare["label"].shape == (1, 60, 80)
    assert float(bare["label"].max()) == 0


# ------------------------------------------------------------------------------------------------ reading files

GREY = picture(12, 16)[..., 0]


@pytest.mark.parametrize(
    ("mode", "name", "expected", "tolerance"),
    [
        ("1", "a.png", np.where(GREY[..., None] > 127, 255, 0).repeat(3, 2), 0),
        ("L", "a.png", GREY[..., None].repeat(3, 2), 0),
        ("RGB", "a.bmp", picture(12, 16), 0),
        ("RGB", "a.webp", picture(12, 16), 0),
        ("RGB", "a.TIFF", picture(12, 16), 0),
        ("CMYK", "a.tif", picture(12, 16), 0),
        ("YCbCr", "a.tif", picture(12, 16), 4),
        ("CMYK", "a.jpg", picture(12, 16), 40),
        ("I;16", "a.png", GREY[..., None].repeat(3, 2), 0),
        ("I;16", "a.tif", GREY[..., None].repeat(3, 2), 0),
        ("I", "a.tif", GREY[..., None].repeat(3, 2), 0),
        ("F", "a.tif", GREY[..., None].repeat(3, 2), 0),
        ("unit F", "a.tif", GREY[..., None].repeat(3, 2), 0),
    ],
)
def test_image_modes(tmp_path, mode, name, expected, tolerance):
    path = tmp_path / name
    if mode in ("1", "L"):
        file = Image.fromarray(GREY).convert(mode, dither=Image.Dither.NONE)
    elif mode == "I;16":
        file = Image.fromarray(GREY.astype(np.uint16) * 257)
    elif mode == "I":
        file = Image.fromarray(GREY.astype(np.int32) * 257)
    elif mode == "F":
        file = Image.fromarray(GREY.astype(np.float32))
    elif mode == "unit F":
        file = Image.fromarray((GREY / np.float32(255)).astype(np.float32))
    else:
        file = Image.fromarray(picture(12, 16)).convert(mode)
    file.save(path, **({"lossless": True} if name.endswith("webp") else {}))
    got = read_image(path)
    assert got.dtype == np.uint8
    assert np.abs(got.astype(int) - expected).max() <= tolerance
    grey = read_mask(path)
    assert (grey.shape, grey.dtype, grey.max()) == ((12, 16), np.uint8, 255)


def test_palette_alpha_and_hsv(tmp_path):
    red, half = (200, 0, 0), 128
    palette = Image.new("P", (4, 2), 1)
    palette.putpalette([0, 0, 0, *red, 0, 9, 0])
    palette.putpixel((0, 0), 2)
    palette.save(tmp_path / "p.png", transparency=2)
    got = read_image(tmp_path / "p.png")
    assert got[1, 1].tolist() == list(red)
    assert got[0, 0].tolist() == [255, 255, 255]  # transparent parts lie on white
    Image.new("RGBA", (3, 3), (*red, half)).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(read_image(tmp_path / "rgba.png")[0, 0], [227, 127, 127], atol=1)
    Image.new("LA", (3, 3), (50, 255)).save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png")[1, 1].tolist() == [50, 50, 50]
    np.testing.assert_allclose(decode_module.rgb(Image.new("RGB", (2, 2), red).convert("HSV"))[0, 0], red, atol=2)
    # masks drawn in their alpha alone, and masks with an opaque alpha
    alpha = Image.fromarray(disc(20, 20))
    black = Image.new("RGBA", (20, 20), (0, 0, 0, 0))
    black.putalpha(alpha)
    black.save(tmp_path / "cut.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "cut.png"), disc(20, 20))
    Image.merge("LA", (alpha, Image.new("L", (20, 20), 255))).save(tmp_path / "opaque.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "opaque.png"), disc(20, 20))


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_image_and_mask(tmp_path, orientation, kind):
    stored = Image.fromarray(picture(16, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif, **({"quality": 95, "subsampling": 0} if kind == "jpg" else {}))
    if kind == "jpg":  # the loss is not the question here
        stored = Image.open(tmp_path / "a.jpg")
    stored.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{kind}"), np.asarray(ImageOps.exif_transpose(stored)))
    # the mask has no tag: drawn on the picture as stored, or on the picture as seen
    label = Image.fromarray(disc(16, 24))
    label.getexif()[0x0112] = orientation
    seen = np.asarray(ImageOps.exif_transpose(label))
    Image.fromarray(seen).save(tmp_path / "seen.png")
    np.testing.assert_array_equal(read_pair(Pair("a", tmp_path / f"a.{kind}", tmp_path / "seen.png")).mask, seen)
    if orientation >= 5:
        Image.fromarray(disc(16, 24)).save(tmp_path / "stored.png")
        reading = read_pair(Pair("a", tmp_path / f"a.{kind}", tmp_path / "stored.png"))
        np.testing.assert_array_equal(reading.mask, seen)
        assert not reading.resized


def test_animation_gives_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), shade) for shade in ((250, 0, 0), (0, 250, 0))]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True)
    assert read_image(tmp_path / "a.webp")[0, 0].tolist() == [250, 0, 0]


def test_damaged_files_are_bad_files_with_a_reason(tmp_path):
    def reason(name: str, content: bytes) -> str:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadFile) as caught:
            read_image(tmp_path / name)
        assert caught.value.path == tmp_path / name
        assert "\n" not in str(caught.value)
        return caught.value.reason

    Image.fromarray(picture(64, 64)).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    assert "truncated" in reason("cut.jpg", whole[: len(whole) // 2])
    assert reason("empty.jpg", b"") == "empty file"
    assert "not an image" in reason("text.jpg", b"hello")
    header = b"IHDR" + struct.pack(">IIBBBBB", 30_000, 30_000, 8, 2, 0, 0, 0)
    bomb = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    assert "pixels" in reason("bomb.png", bomb + struct.pack(">I", 9) + b"IDAT" + bytes(13))
    with pytest.raises(BadFile, match="No such file"):
        read_image(tmp_path / "nowhere.jpg")


def test_own_pixel_limit_holds_where_pillows_is_off(tmp_path, monkeypatch):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(decode_module, "MAX_PIXELS", 399)
    with pytest.raises(BadFile, match="declares 20x20 pixels; MAX_PIXELS = 399"):
        read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("values", "expected", "noise"),
    [
        ([0, 0, 0], [0, 0, 0], False),
        ([0, 1, 1], [0, 255, 255], False),
        ([1, 1, 1], [255, 255, 255], False),
        ([0, 255, 128], [0, 255, 128], False),
        ([0, 3, 3], [0, 255, 255], False),
        ([0, 76, 76], [0, 255, 255], False),
        ([0, 2, 5], [0, 0, 0], True),
        ([0, 1, 63], [0, 0, 0], True),
        ([0, 1, 64], [0, 4, 255], False),
        ([0, 100, 200], [0, 128, 255], False),
        ([200, 200, 200], [255, 255, 255], False),
    ],
)
def test_mask_rules(values, expected, noise):
    mask, was_noise = scale_mask(np.array([values], np.uint8))
    assert (mask.tolist(), mask.dtype, was_noise) == ([expected], np.uint8, noise)


def pieces(*values: int) -> np.ndarray:
    """Stripes of these values, (60, 80)."""
    return np.repeat(np.array(values, np.uint8), 80 // len(values))[None].repeat(60, 0)


@pytest.mark.parametrize(
    ("light", "labels"),
    [
        (pieces(0, 1, 2, 2), "0, 1, 2"),
        (pieces(1, 2), "1, 2"),  # and trimaps, of which nobody can know what 3 is
        (pieces(1, 2, 3, 2), "1, 2, 3"),
        (np.where(disc(60, 80) > 128, 255, pieces(0, 15, 15, 15)), "0, 15, 255"),  # 255: the border
        (pieces(0, 1, 1, 255), "0, 1, 255"),
        (pieces(0, 255), None),
        (pieces(0, 128, 128, 255), None),  # a trimap
        (pieces(0, 42, 42, 255), None),  # graded by how many people chose it
        (pieces(0, 50, 100, 255), None),
        (pieces(0, 16, 16, 235), None),
        (pieces(0, 253, 254, 255), None),
        (pieces(3, 255), None),
        (pieces(0, 1), None),
        (pieces(0, 38), None),
        (np.random.default_rng(0).normal(0, 0.5, (60, 80)).clip(0), None),  # noise on an empty mask
        (np.arange(4800, dtype=np.uint8).reshape(60, 80) % 5, None),  # noise
        (np.arange(4800, dtype=np.uint8).reshape(60, 80), None),
    ],
)
def test_labels_are_no_mask(light, labels, tmp_path):
    light = np.asarray(light, np.uint8)
    assert decode_module.labels_in(light, np.bincount(light.ravel(), minlength=256)) == labels
    Image.fromarray(light).save(tmp_path / "mask.png")
    if labels:
        with pytest.raises(BadFile, match=rf"mask\.png: holds labels \({labels}\)"):
            read_mask(tmp_path / "mask.png")
    else:
        read_mask(tmp_path / "mask.png")


@pytest.mark.parametrize("under", ["kept", "black", "white", "noise"])
def test_the_alpha_of_a_cut_out_is_its_mask(under, tmp_path):
    """As `u2mamba_predict.py --mode rgba` and picture editors write it, whatever lies under the transparent part."""
    alpha = disc(60, 80)
    pixels = picture(60, 80, 3).copy()
    hidden = {"kept": pixels, "black": 0, "white": 255, "noise": picture(60, 80, 4)}[under]
    pixels = np.where(alpha[..., None] > 0, pixels, hidden).astype(np.uint8)
    Image.fromarray(np.dstack((pixels, alpha))).save(tmp_path / "cut.png")
    assert (read_mask(tmp_path / "cut.png") == alpha).all()
    assert (read_map(tmp_path / "cut.png") == alpha / 255).all()


@pytest.mark.parametrize("value", [255, 150, 60])
def test_a_soft_mask_with_transparent_corners_is_no_cut_out(value, tmp_path):
    y, x = np.mgrid[:60, :80]
    light = (value * np.exp(-((y - 30) ** 2 + (x - 40) ** 2) / 300)).astype(np.uint8)
    alpha = np.full_like(light, 255)
    alpha[:8, :8] = 0
    Image.fromarray(np.dstack((light, light, light, alpha))).save(tmp_path / "mask.png")
    expected = np.where(alpha > 0, light, 0)
    assert (read_mask(tmp_path / "mask.png") == decode_module.scale_mask(expected)[0]).all()


def test_a_mask_in_black_and_white_with_some_alpha_is_both(tmp_path):
    light, alpha = disc(60, 80), pieces(255, 255, 255, 0)
    Image.fromarray(np.dstack((light, light, light, alpha))).save(tmp_path / "mask.png")
    assert (read_mask(tmp_path / "mask.png") == np.where(alpha > 0, light, 0)).all()


def test_masks_without_any_object_are_refused(tmp_path):
    images, masks = make_folders(tmp_path, 3)
    for path in masks.iterdir():
        Image.fromarray(np.zeros((60, 80), np.uint8)).save(path)
    with pytest.raises(DataError, match=r"no mask in .* holds an object"):
        open_data(images, masks, cache=False, say=lambda _: None)


def test_no_pairs_says_what_there_is(tmp_path):
    images, masks = make_folders(tmp_path, 1)
    (masks / "p000.png").rename(masks / "p000_mask.png")
    (images / "more").mkdir()
    (images / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\(p000\.png, p000_mask\.png, \.\.\.\); not read: a\.heic, more \(a folder\)"):
        find_pairs(images, masks)


# -------------------------------------------------------------------------------------------- pairs and the check


def test_find_pairs(tmp_path):
    images, masks = make_folders(tmp_path, 2, (8, 8))
    for name in ("p000.JPG", "lonely.webp", ".hidden.jpg", "notes.txt", "B.Tif", "a.b.bmp"):
        (images / name).write_bytes(b"x")
    for name in ("p001.jpg", "other.png", "B.bmp", "a.b.png", "Thumbs.db"):
        (masks / name).write_bytes(b"x")
    (images / "folder.png").mkdir()
    pairs, unpaired = find_pairs(images, str(masks))
    assert [(p.stem, p.image.name, p.mask.name) for p in pairs] == [
        ("B", "B.Tif", "B.bmp"),
        ("a.b", "a.b.bmp", "a.b.png"),
        ("p000", "p000.JPG", "p000.png"),
        ("p001", "p001.png", "p001.png"),
    ]
    assert unpaired.images == ["lonely.webp"]
    assert unpaired.masks == ["other.png"]
    assert unpaired.duplicates == ["p000.png (p000.JPG is taken)", "p001.jpg (p001.png is taken)"]


def test_stems_are_compared_composed():
    paired, _ = pairs_module.pair_names(["cafe\u0301.jpg"], ["caf\u00e9.png"])
    assert paired == [("caf\u00e9", "cafe\u0301.jpg", "caf\u00e9.png")]


def test_unusable_folders_are_data_errors(tmp_path):
    images, masks = make_folders(tmp_path, 1, (8, 8))
    with pytest.raises(DataError, match=r"image folder .*missing"):
        find_pairs(tmp_path / "missing", masks)
    with pytest.raises(DataError, match=r"mask folder .*p000"):
        find_pairs(images, images / "p000.png")
    with pytest.raises(DataError, match="two folders"):
        find_pairs(images, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pairs: 1 images in .*, 0 masks"):
        find_pairs(images, tmp_path / "empty")
    with pytest.raises(DataError, match="at least 12 are needed"):
        open_data(images, masks, need=12, say=lambda _: None)
    (images / "p000.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"^0 usable"):
        open_data(images, masks, cache=False, say=lambda _: None)


def test_hold_out_is_fixed_by_name():
    names = [f"ILSVRC2012_test_{k:08d}" for k in range(2000)]
    held = [name for name in names if is_held_out(name)]
    assert held[:3] == ["ILSVRC2012_test_00000014", "ILSVRC2012_test_00000023", "ILSVRC2012_test_00000037"]
    assert 70 <= len(held) <= 130  # 5 % of 2,000
    assert all(is_held_out(name) == (zlib.crc32(name.encode()) % 20 == 0) for name in names)
    assert [is_held_out(f"{name}_mirror") for name in names] == [is_held_out(name) for name in names]
    train, val = hold_out([Pair(name, Path(), Path()) for name in names])
    assert [p.stem for p in val] == held
    assert len(train) + len(val) == 2000


def test_check_reports_and_sets_aside(tmp_path):
    images, masks = make_folders(tmp_path, 12)
    (images / "p001.png").write_bytes(b"")
    Image.fromarray(disc(30, 40)).save(masks / "p002.png")  # same shape: used
    Image.fromarray(disc(60, 60)).save(masks / "p003.png")  # another shape: set aside
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(masks / "p004.png")
    Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(60, 80) % 5).save(masks / "p005.png")  # noise
    Image.fromarray(np.zeros((60, 80, 3), np.uint8)).save(images / "p006.png")
    Image.fromarray(picture(60, 80)).save(images / "lonely.png")
    pairs, unpaired = find_pairs(images, masks)
    kept = {}
    good, report = check_pairs(pairs, unpaired, keep=lambda k, image, mask: kept.update({k: (image, mask)}), threads=2)
    assert good == [0, 2, *range(4, 12)]
    assert sorted(kept) == good
    np.testing.assert_array_equal(kept[7][0], picture(60, 80, 7))
    assert report.pairs == 10
    assert report.bad == [("p001.png", "empty file"), ("p003.png", "mask is 60x60, its image 80x60")]
    assert (report.resized, report.noise, report.empty, report.black) == (["p002.png"], ["p005.png"], 2, 1)
    assert (report.mask_low, report.mask_high, report.set_aside) == (0, 255, 3)
    text = "\n".join(report.lines())
    assert "data: 10 pairs, mask values 0-255, 2 empty masks" in text
    assert "1 images without a mask, set aside: lonely.png" in text
    assert "2 pairs that cannot be read or do not fit, set aside: p001.png (empty file), p003.png (mask" in text


def test_report_names_five_and_counts_the_rest(tmp_path):
    images, masks = make_folders(tmp_path, 8, (8, 8))
    for k in range(8):
        (images / f"p{k:03d}.png").write_bytes(b"")
    _, report = check_pairs(find_pairs(images, masks)[0])
    line = report.lines()[1]
    assert "p004.png (empty file) and 3 more" in line
    assert "p005" not in line


# ------------------------------------------------------------------------------------------------------ rescaling


@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 100, 129, 640, 1500])
def test_axis_operator_is_skimages(length):
    # a zero keeps skimage from clipping to the input's range, which is not linear
    eye = np.hstack([np.eye(length), np.zeros((length, 1))])
    expected = sk.resize(eye, (64, length + 1), mode="constant")[:, :length]
    np.testing.assert_allclose(axis_operator(length, 64).toarray(), expected, rtol=0, atol=1e-7)


SIZES = [(1, 1), (1, 50), (37, 1), (2, 3), (64, 64), (64, 100), (47, 90), (300, 65), (411, 233), (1100, 40)]


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_rescaling_is_rescale_t(height, width):
    rng = np.random.default_rng(height)
    for image in (rng.integers(0, 256, (height, width, 3), dtype=np.uint8), np.full((height, width, 3), 90, np.uint8)):
        label = rng.integers(0, 256, (height, width), dtype=np.uint8)
        expected = RescaleT(64)(sample(image, label))
        assert np.abs(rescale_image(image, 64) / 255.0 - expected["image"]).max() <= ROUNDING + 1e-6
        np.testing.assert_array_equal(rescale_mask(label, 64), expected["label"][..., 0])


def test_a_very_long_image_in_blocks():
    image = picture(9000, 50)
    expected = sk.resize(image, (320, 320), mode="constant")
    assert np.abs(rescale_image(image, 320) / 255.0 - expected).max() <= ROUNDING + 1e-6


# ------------------------------------------------------------------------------------------- plan and augmentation


def test_plan_is_a_function_of_its_arguments():
    plan = epoch_plan(500, epoch=3, seed=7)
    assert torch.equal(plan, epoch_plan(500, epoch=3, seed=7))
    assert not torch.equal(plan, epoch_plan(500, epoch=4, seed=7))
    assert not torch.equal(plan, epoch_plan(500, epoch=3, seed=7 + 2**32))  # more than 32 bits of the seed count
    assert plan.dtype == torch.int64
    assert sorted(plan[:, INDEX].tolist()) == list(range(500))
    for column in (TOP, LEFT):
        assert (int(plan[:, column].min()), int(plan[:, column].max())) == (0, 32)  # the last offset too
    assert abs(int((plan[:, FLIP] == UPSIDE_DOWN).sum()) - 250) < 45  # four deviations of 11.2
    assert int(plan[:, FLIP].max()) == UPSIDE_DOWN
    assert set(epoch_plan(500, 0, 0, p_mirror=0.5)[:, FLIP].tolist()) == {0, 1, 2, 3}
    assert int(epoch_plan(9, 0, 0, rescale=288)[:, [TOP, LEFT]].max()) == 0
    with pytest.raises(ValueError, match="crop = 288 must be"):
        epoch_plan(9, 0, 0, rescale=256)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("flip", [0, UPSIDE_DOWN, MIRROR, UPSIDE_DOWN | MIRROR])
def test_augment_is_the_reference_on_the_original_image(flip, channels_last):
    image, label = picture(300, 401, seed=5), disc(300, 401)
    cache = PairCache.empty(2, 320)
    cache.put(1, image, label)
    x, y = augment(cache.images, cache.masks, torch.tensor([[1, 32, 5, flip]]), channels_last=channels_last)
    got = RescaleT(320)(sample(image, label))
    for key in ("image", "label"):
        array = got[key][::-1] if flip & UPSIDE_DOWN else got[key]
        array = array[:, ::-1] if flip & MIRROR else array
        got[key] = array[32 : 32 + 288, 5 : 5 + 288]
    expected = ToTensorLab(0)(got)
    assert (x.shape, x.dtype, y.shape, y.dtype) == ((1, 3, 288, 288), torch.float32, (1, 1, 288, 288), torch.float32)
    assert x.is_contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    for c in range(3):  # 1/255 before the division by the deviation
        assert float((x[0, c] - expected["image"][c]).abs().max()) * STD[c] <= 1 / 255
    assert torch.equal(y[0], expected["label"].float())


def test_augment_of_black_and_both_ways_to_cut():
    torch.manual_seed(0)
    images, masks = torch.randint(0, 256, (5, 40, 40, 3), dtype=torch.uint8), torch.zeros(5, 40, 40, dtype=torch.uint8)
    images[2], masks[3] = 0, torch.arange(40, dtype=torch.uint8) * 6
    rows = torch.tensor(list(itertools.product(range(5), (0, 3, 8), (0, 8), range(4))))
    offsets = torch.arange(32)
    for one, other in zip(
        augment_module._cut_by_slice(images, masks, rows, offsets),
        augment_module._cut_by_index(images, masks, rows, offsets),
        strict=True,
    ):
        assert torch.equal(one, other)
    x, y = augment(images, masks, torch.tensor([[2, 0, 0, 0], [3, 0, 0, 0]]), crop=32)
    torch.testing.assert_close(x[0, :, 0, 0], torch.tensor([-m / s for m, s in zip(MEAN, STD, strict=True)]))
    torch.testing.assert_close(y[1, 0, 0], torch.arange(32) * 6 / 255)


# ---------------------------------------------------------------------------------------------- cache and batches


def quiet_open(images: Path, masks: Path, **options) -> tuple[data_loader.Data, str]:
    said: list[str] = []
    return open_data(images, masks, size=32, say=said.append, **options), "\n".join(said)


def test_cache_is_filled_stored_read_and_made_again(tmp_path):
    images, masks = make_folders(tmp_path, 40)
    (images / "p005.png").write_bytes(b"")
    first, said = quiet_open(images, masks)
    assert "cache: 40 pairs, 0 MB in memory" in said
    assert "stored as" in said
    (stored,) = tmp_path.glob(".cache_32_*.u8")
    assert len(first.train) + len(first.val) == 39
    for source in (first.train, first.val):
        for k, pair in enumerate(source.pairs):
            assert pair.stem != "p005"
            np.testing.assert_array_equal(source.cache.images[k], rescale_image(read_image(pair.image), 32))
            np.testing.assert_array_equal(source.cache.masks[k], rescale_mask(read_mask(pair.mask), 32))
    assert [p.stem for p in first.val.pairs] == [f"p{k:03d}" for k in range(40) if is_held_out(f"p{k:03d}")]

    again, said = quiet_open(images, masks)
    assert "read from" in said
    assert "filled in" not in said
    assert again.report == first.report
    assert again.report.bad == [("p005.png", "empty file")]
    assert torch.equal(again.train.cache.images, first.train.cache.images)
    assert torch.equal(again.val.cache.masks, first.val.cache.masks)

    content = stored.read_bytes()
    flipped = bytearray(content)
    flipped[-100] ^= 1
    header = bytearray(content)
    header[40] ^= 1
    for damaged in (content[:-1], content[:9], b"", bytes(flipped), bytes(header)):
        stored.write_bytes(damaged)
        mended, said = quiet_open(images, masks)
        assert "is damaged" in said
        assert torch.equal(mended.train.cache.images, first.train.cache.images)
        assert stored.read_bytes()[: len(content)] == content

    Image.fromarray(picture(60, 80, seed=99)).save(images / "p005.png")  # a changed file: another key, old cache gone
    changed, said = quiet_open(images, masks)
    assert "filled" in said
    assert len(changed.train) + len(changed.val) == 40
    assert list(tmp_path.glob(".cache_32_*")) != [stored]
    assert len(list(tmp_path.glob(".cache_32_*"))) == 1


def test_folders_that_changed_places_and_pairs_of_which_none_is_held_out(tmp_path):
    images, masks = make_folders(tmp_path)
    rng = np.random.default_rng(0)
    for path in images.iterdir():  # as photographs are: mostly neither black nor white
        Image.fromarray(rng.normal(120, 40, (60, 80, 3)).clip(0, 255).astype(np.uint8)).save(path)
    assert "changed places" not in quiet_open(images, masks)[1]
    data, said = quiet_open(masks, images)
    assert "data: warning: 6 masks are grey pictures: have the two folders changed places?" in said
    assert "warning: the names of these pairs hold none out" in said and len(data.val) == 0  # p000 to p005
    held_out = next(f"x{i}" for i in range(1000) if is_held_out(f"x{i}"))
    for path in (*images.iterdir(), *masks.iterdir()):
        path.rename(path.with_stem(path.stem if path.stem != "p000" else held_out))
    data, said = quiet_open(images, masks)
    assert len(data.val) == 1 and "hold none out" not in said


def test_cache_that_cannot_be_stored_or_does_not_fit(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 3)
    (tmp_path / "file").write_text("")
    data, said = quiet_open(images, masks, cache_dir=tmp_path / "file" / "below")
    assert "cache: not stored on disk: " in said
    assert data.train.cache is not None
    monkeypatch.setattr(cache_module, "DISK_MARGIN", 1 << 62)
    _, said = quiet_open(images, masks)
    assert "cache: not stored on disk, " in said
    monkeypatch.setattr(batches_module, "available_memory", lambda: 3 * 32 * 32 * 4)  # all of it, not four fifths
    data, said = quiet_open(images, masks)
    assert "do not fit into" in said
    assert data.train.cache is None
    assert not list(tmp_path.glob(".cache*"))


def test_available_memory_is_below_what_is_built_in():
    free = cache_module.available_memory()
    assert free > 1 << 26
    if hasattr(os, "sysconf"):
        assert free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_batches_follow_the_plan(tmp_path):
    images, masks = make_folders(tmp_path, 20)
    data, _ = quiet_open(images, masks)
    n = len(data.train)
    plan = epoch_plan(n, 0, 0, rescale=32, crop=24)
    whole = list(batches(data.train, plan, 6, crop=24))
    assert [len(b.x) for b in whole] == [6] * (n // 6) + [n % 6] * (n % 6 > 0)
    assert torch.equal(torch.cat([b.rows for b in whole]), plan)
    x, y = augment(data.train.cache.images, data.train.cache.masks, plan, crop=24)
    assert torch.equal(torch.cat([b.x for b in whole]), x)
    assert torch.equal(torch.cat([b.y for b in whole]), y)
    late = list(batches(data.train, plan[12:], 6, crop=24))  # what is left after a stop
    assert torch.equal(torch.cat([b.x for b in late]), x[12:])
    assert all(b.wait >= 0 for b in whole)


def test_validation_batches_are_whole_pictures(tmp_path):
    images, masks = make_folders(tmp_path, 5)
    data, _ = quiet_open(images, masks)
    got = list(validation_batches(data.train, batch_size=2))
    image = rescale_image(picture(60, 80, seed=0), 32)
    expected = ToTensorLab()(sample(image / 255.0, disc(32, 32)))["image"].float()
    torch.testing.assert_close(got[0].x[0], expected)
    assert sum(len(b.x) for b in got) == len(data.train)
    (one,) = validation_batches(data.train, indices=[3, 1])
    assert torch.equal(one.x, torch.cat([got[1].x[1:], got[0].x[1:]]))


def test_streaming_gives_what_the_cache_gives(tmp_path, monkeypatch):
    monkeypatch.setattr(batches_module, "STREAM_WORKERS", 1)
    images, masks = make_folders(tmp_path, 8)
    cached, _ = quiet_open(images, masks)
    streamed, _ = quiet_open(images, masks, cache=False)
    assert streamed.report == cached.report
    for epoch in range(2):
        plan = epoch_plan(len(cached.train), epoch, 0, rescale=32, crop=24)
        abandoned = batches(streamed.train, plan, 2, crop=24)
        next(abandoned)  # stopped in the middle of an epoch
        for one, other in zip(
            batches(cached.train, plan, 3, crop=24),
            batches(streamed.train, plan, 3, crop=24),
            strict=True,
        ):
            assert torch.equal(one.x, other.x)
            assert torch.equal(one.y, other.y)
            assert torch.equal(one.rows, other.rows)
    gone = cached.train.pairs[0].image
    gone.unlink()
    with pytest.raises(DataError, match=f"{gone.name}.*readable at the start"):
        list(batches(streamed.train, plan, 3, crop=24))


def test_pairs_of_the_right_size_stream_without_a_warning(tmp_path):
    """They are not rescaled, and Pillow's arrays are read-only, of which PyTorch warns."""
    images, masks = make_folders(tmp_path, 3)
    for path in (*images.iterdir(), *masks.iterdir()):
        Image.open(path).resize((32, 32)).save(path)
    data, _ = quiet_open(images, masks, cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(list(batches(data.train, epoch_plan(len(data.train), 0, 0, 32, 24), 2, crop=24))) > 0


def test_open_data_in_a_plain_process(tmp_path):
    """Nothing but the two lines of the docstring, in a fresh interpreter: no warning, no line on stderr."""
    images, masks = make_folders(tmp_path, 3)
    code = (
        f"from data_loader import *\ndata = open_data({str(images)!r}, {str(masks)!r}, size=32)\n"
        "print(len(list(batches(data.train, epoch_plan(len(data.train), 0, 0, 32, 24), 2, crop=24))))"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(data_loader.__file__).parent,
        check=False,
        timeout=120,
    )
    assert done.stderr == ""
    assert done.stdout.splitlines()[-1] == "2"


# --------------------------------------------------------------------------------------------------- real pictures


@pytest.mark.skipif(not os.environ.get("DUTS_DIR"), reason="DUTS_DIR is not set to a folder with im_aug and gt_aug")
def test_real_pictures_against_the_reference():
    root = Path(os.environ["DUTS_DIR"])
    pairs, _ = find_pairs(root / "im_aug", root / "gt_aug")
    for pair in random.Random(0).sample(pairs, 10):
        got = SalObjDataset([pair.image], [pair.mask], RescaleT(320))[0]
        reading = read_pair(pair)
        assert np.abs(rescale_image(reading.image, 320) / 255.0 - got["image"]).max() <= ROUNDING + 1e-6
        np.testing.assert_array_equal(rescale_mask(reading.mask, 320), got["label"][..., 0])
