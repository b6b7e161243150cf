"""Pairs: found by name, split by name or by folder, checked and reported."""

import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tests.dataset.samples import disc, make_folders, open_folders, photo
from u2mamba.dataset.check import check_pairs
from u2mamba.dataset.decode import Pair
from u2mamba.dataset.image_file import DataError
from u2mamba.dataset.pairs import find_pairs, is_validation, pair_folders, pair_names, train_val_split


def pair_named(stem: str) -> Pair:
    return Pair(stem, Path(), Path())


def test_find_pairs(tmp_path):
    images, masks = make_folders(tmp_path, 2, (8, 8))
    for name in ("p000.JPG", "lonely.webp", ".hidden.jpg", "settings.json", "notes.txt", "B.Tif", "a.b.bmp"):
        (images / name).write_bytes(b"x")
    for name in ("p001.jpg", "other.png", "B.bmp", "a.b.png", "Thumbs.db"):
        (masks / name).write_bytes(b"x")
    (images / "folder.png").mkdir()
    lines: list[str] = []
    pairs = pair_folders(images, str(masks), lines.append)
    assert [(p.stem, p.image.name, p.mask.name) for p in pairs] == [
        ("B", "B.Tif", "B.bmp"),
        ("a.b", "a.b.bmp", "a.b.png"),
        ("p000", "p000.JPG", "p000.png"),
        ("p001", "p001.png", "p001.png"),
    ]
    assert lines == [
        "warning: skipped 1 images without a mask: lonely.webp",
        "warning: skipped 1 masks without an image: other.png",
        "warning: skipped 2 files with a duplicate name: p000.png (p000.JPG is used), p001.jpg (p001.png is used)",
        "data: 3 entries of other types, ignored: Thumbs.db, notes.txt, folder.png (a folder)",
    ]
    assert pairs.skipped == 4


def test_stems_are_compared_composed():
    pairs = pair_names(["cafe\u0301.jpg"], ["caf\u00e9.png"], ("images", "masks"))[0]
    assert pairs == [("caf\u00e9", "cafe\u0301.jpg", "caf\u00e9.png")]


def test_unusable_folders_are_data_errors(tmp_path):
    images, masks = make_folders(tmp_path, 1, (8, 8))
    with pytest.raises(DataError, match=r"folder .*missing: No such file or directory; set tra_image_dir"):
        pair_folders(tmp_path / "missing", masks)
    with pytest.raises(DataError, match=r"folder .*p000.png: Not a directory; set tra_label_dir"):
        pair_folders(images, images / "p000.png")
    with pytest.raises(DataError, match="two folders"):
        pair_folders(images, images)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no pairs: 1 images in .*, 0 masks"):
        pair_folders(images, tmp_path / "empty")


def test_pairs_none_of_which_is_usable_are_an_error_and_five_are_named(tmp_path):
    images, masks = make_folders(tmp_path, 8, (8, 8))
    for path in images.iterdir():
        path.write_bytes(b"")
    assert check_pairs(pair_folders(images, masks)).lines()[0].endswith("p004.png (empty file) and 3 more")
    with pytest.raises(DataError, match=r"^0 usable"):
        open_folders(images, masks)


@pytest.mark.parametrize("name", ["P000.png", "p000 .png", "p 000.png"])
def test_names_that_differ_by_case_or_a_space_are_named(name, tmp_path):
    images, masks = make_folders(tmp_path, 1, (8, 8))
    (masks / "p000.png").rename(masks / name)
    with pytest.raises(DataError, match=rf"'p000\.png' and '{name}' differ only in case or spaces"):
        pair_folders(images, masks)


def test_no_pairs_says_what_there_is(tmp_path):
    images, masks = make_folders(tmp_path, 1)
    (masks / "p000.png").rename(masks / "p000_mask.png")
    (images / "more").mkdir()
    (images / "a.heic").write_bytes(b"x")
    with pytest.raises(DataError, match=r"\(p000\.png, p000_mask\.png, \.\.\.\); ignored: a\.heic, more \(a folder\)"):
        pair_folders(images, masks)


def test_the_validation_split_is_fixed_by_name():
    names = [f"ILSVRC2012_test_{k:08d}" for k in range(2000)]
    train, val = train_val_split([pair_named(name) for name in names])
    assert [p.stem for p in val[:3]] == [f"ILSVRC2012_test_{k:08d}" for k in (14, 23, 37)]
    assert 70 <= len(val) <= 130  # 5 % of 2,000
    assert len(train) + len(val) == 2000
    assert all(is_validation(pair) == (zlib.crc32(pair.stem.encode()) % 20 == 0) for pair in train + val)
    flipped = [pair_named(f"{pair.stem}_mirror") for pair in train + val]
    assert [is_validation(pair) for pair in flipped] == [False] * len(train) + [True] * len(val)


def test_the_check_reports_and_skips(tmp_path):
    images, masks = make_folders(tmp_path, 12)
    (images / "p001.png").write_bytes(b"")
    Image.fromarray(disc(30, 40)).save(masks / "p002.png")  # same shape: used
    Image.fromarray(disc(60, 60)).save(masks / "p003.png")  # another shape: skipped
    Image.fromarray(np.zeros((60, 80), np.uint8)).save(masks / "p004.png")
    Image.fromarray(np.arange(4800, dtype=np.uint8).reshape(60, 80) % 5).save(masks / "p005.png")  # noise
    Image.fromarray(photo(60, 80)).save(images / "lonely.png")
    report = check_pairs(pair_folders(images, masks), 32)
    assert report.usable == [0, 2, *range(4, 12)]
    assert report.unusable == ["p001.png (empty file)", "p003.png (mask is 60x60, its image 80x60)"]
    assert report.found == {"resized": ["p002.png"], "empty": ["p004.png", "p005.png"]}
    assert report.values == [0, 255]
    text = "\n".join(report.lines())
    assert "data: 10 pairs, mask values 0-255, 2 empty masks" in text
    assert "warning: skipped 2 pairs that are unreadable or do not match: p001.png (empty file), p003.png (mask" in text


def test_swapped_folders_and_an_empty_validation_split(tmp_path):
    images, masks = make_folders(tmp_path)
    rng = np.random.default_rng(0)
    for path in images.iterdir():  # as photos are: mostly neither black nor white
        Image.fromarray(rng.normal(120, 40, (60, 80, 3)).clip(0, 255).astype(np.uint8)).save(path)
    assert "folders swapped" not in open_folders(images, masks).log
    data, said, _ = open_folders(masks, images)
    assert "warning: 6 masks are gray-level images: are the image and mask folders swapped?" in said
    assert "warning: no validation pairs" in said and len(data.val) == 0  # p000 to p005


def test_validation_folders_of_their_own(tmp_path):
    make_folders(tmp_path / "train", 40)
    images, masks = make_folders(tmp_path / "val", 6)
    (images / "lonely.png").write_bytes(b"x")
    cfg = SimpleNamespace(data_dir=tmp_path, tra_image_dir="train/im_aug", tra_label_dir="train/gt_aug")
    cfg.val_image_dir, cfg.val_label_dir = "val/im_aug", str(masks)  # an absolute path stays
    pairs = find_pairs(cfg)
    train, val = train_val_split(pairs)
    assert (len(train), len(val), pairs.skipped) == (40, 6, 1)
    assert {pair.image.parent for pair in val} == {images}
    assert any(is_validation(pair._replace(split="")) for pair in train)  # which the names alone would have taken out
    cfg.val_label_dir = ""
    with pytest.raises(DataError, match="set both, or neither"):
        find_pairs(cfg)
    cfg.val_label_dir = "nowhere"
    with pytest.raises(DataError, match=r"nowhere: .*; set val_label_dir"):
        find_pairs(cfg)
    cfg.data_dir = tmp_path / "gone"
    with pytest.raises(DataError, match=r"there is no folder .*gone.*im_aug\n  DUTS-TR"):
        find_pairs(cfg)
