"""Damaged and odd files: each is read right or skipped by name, within 5 s and bounded memory; nothing hangs.

Files are read in a process of its own, so that one on which a decoder hung or crashed would fail its test by name.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loader import batches, epoch_plan
from tests.dataset.bad_files import (
    WHOLE,
    Case,
    all_cases,
    measured,
    odd_entries,
    photos,
    png,
    shape_of,
    whole_file,
)
from tests.dataset.samples import disc, make_folders, open_folders
from u2mamba.dataset.batches import DataSource
from u2mamba.dataset.check import check_pairs
from u2mamba.dataset.decode import read_image, read_mask
from u2mamba.dataset.image_file import MAX_PIXELS, BadFile
from u2mamba.dataset.rescale import rescale_image

SECONDS = 5  # of the processor, a file at most
GIVE_UP = 120  # seconds of the clock after which a file counts as hanging; other tests run at the same time


@pytest.fixture(scope="module")
def reader():
    """measured(read, path) in another process; `reader.memory` is its growth."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:

        def run(read, path: Path) -> np.ndarray | str:
            got, seconds, memory = pool.apply_async(measured, (read, path)).get(GIVE_UP)
            for _ in range(2 if seconds >= SECONDS else 0):  # a core that is shared counts others' waits as its own
                again = pool.apply_async(measured, (read, path)).get(GIVE_UP)[1]
                seconds = min(seconds, again)
            run.memory += memory
            assert seconds < SECONDS, path.name
            return got

        run.memory = 0
        run(read_image, Path("nowhere"))  # imports are not counted
        run.memory = 0
        yield run


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as name:
        for case in all_cases():
            Path(name, case.name).write_bytes(case.content)
        yield Path(name)


def verdict(case: Case, got: np.ndarray | str) -> str:
    """What is wrong with reading a case so, "" for nothing."""
    if isinstance(got, str):
        return f"skipped: {got}" if case.outcome == "read" else ""
    if case.outcome == "skip":
        return "read"
    if (got.ndim, got.shape[2:], got.dtype) != (3, (3,), np.uint8) or not got.size:
        return f"read as {got.shape} {got.dtype}"
    if case.outcome == "either":
        return ""
    if got.shape != case.pixels.shape:
        return f"read as {got.shape}"
    difference = np.abs(got.astype(int) - case.pixels)
    if difference.max() > case.step or difference.mean() > 3 + (case.step == 255) * 20:
        return f"differs by {difference.max()}, {difference.mean():.1f} on average"
    return ""


# ------------------------------------------------------------------------------------------------------ every case


def test_every_file_is_read_right_or_set_aside(reader, folder):
    assert len(all_cases()) >= 379
    wrong = {case.name: verdict(case, reader(read_image, folder / case.name)) for case in all_cases()}
    assert {name: what for name, what in wrong.items() if what} == {}
    assert reader.memory < 150e6  # images of 35 kB; each bomb holds 100 to 200 MB


def test_every_file_as_a_mask(reader, folder):
    for case in all_cases():
        got = reader(read_mask, folder / case.name)
        palette = any(word in case.name for word in ("mode_P.", "gif", "palette"))  # of many colors: no mask
        if isinstance(got, str):
            assert palette or case.outcome != "read", case.name
            continue
        assert (got.ndim, got.dtype) == (2, np.uint8), case.name
        see_through = any(word in case.name for word in ("RGBA", "LA.", "_key", "alphas"))  # the alpha channel
        if case.outcome in ("read", "whole") and not case.step and not see_through:
            expected = np.asarray(Image.fromarray(case.pixels).convert("L")).astype(int)
            assert np.abs(got - expected).max() <= 1, case.name


def test_a_data_set_of_them(folder, tmp_path):
    """The check, the cache and streaming agree, and name what they skipped."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    expected = {}
    for number, case in enumerate(all_cases()):
        name = f"{number:03d}_{case.name}"
        expected[name] = case
        shutil.copy(folder / case.name, images / name)
        Image.fromarray(disc(*((96, 120) if case.pixels is None else case.pixels.shape[:2]))).save(
            masks / f"{Path(name).stem}.png"
        )
    cached = open_folders(images, masks).data
    bad = {entry.split()[0] for entry in cached.report.unusable}
    assert {name for name, case in expected.items() if case.outcome == "skip"} <= bad
    assert not {name for name, case in expected.items() if case.outcome == "read"} & bad
    assert len(cached.report.usable) + len(bad) == len(all_cases())
    for pair, row in zip(cached.train.pairs, cached.train.rows, strict=True):
        case = expected[pair.image.name]
        if case.outcome in ("read", "whole") and not case.step:
            np.testing.assert_array_equal(cached.train.cache.images[row], rescale_image(case.pixels, 32), case.name)
    again, log, _ = open_folders(images, masks)
    assert not check_pairs(again.train.pairs).unusable
    assert again.report == cached.report
    assert "cache: read from" in log
    streamed = DataSource(cached.train.pairs, 32)
    plan = epoch_plan(len(cached.train), 0, 0, rescale=32, crop=24)
    for one, other in zip(batches(cached.train, plan, 16, crop=24), batches(streamed, plan, 16, crop=24), strict=True):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


# ------------------------------------------------------------------------------------------------- any damage at all

whole = functools.lru_cache(maxsize=None)(lambda photo, kind: whole_file(photos()[photo], kind))
place = st.floats(0, 1, exclude_max=True)
length = st.sampled_from((0, 1, 1, 1, 2, 20, 500, 1 << 30))  # the last one cuts the file
new = st.none() | st.binary(max_size=50) | st.builds(bytes, st.integers(0, 500))  # None: a part is repeated


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(st.integers(0, 3), st.sampled_from(tuple(WHOLE)), st.lists(st.tuples(place, length, new), max_size=4))
def test_any_damage(reader, folder, photo, kind, damages):
    case = whole(photo, kind)
    content = case.content
    for where, removed, put in damages:
        at = int(where * len(content))
        content = content[:at] + (content[at : at + 500] if put is None else put) + content[at + removed :]
    path = folder / f"damaged.{kind}"
    path.write_bytes(content)
    sound = content == case.content
    outcome = "read" if sound else "whole" if kind == "png" else "either"
    got = reader(read_image, path)
    assert verdict(case._replace(outcome=outcome), got) == ""
    if not isinstance(got, str):
        assert got.size <= 3 * MAX_PIXELS


# ------------------------------------------------------------------------------------------------------------- large


@pytest.mark.parametrize("kind", ["rgba", "gray16"])
def test_the_largest_image_that_is_read(reader, tmp_path, kind):
    """200 kB that decode to 67 megapixels: what one file can cost."""
    side = int(MAX_PIXELS**0.5)
    depth, color, row = (8, 6, 4 * side) if kind == "rgba" else (16, 0, 2 * side)
    (tmp_path / "bomb.png").write_bytes(png((side, side), depth, color, bytes((row + 1) * side)))
    assert reader(shape_of, tmp_path / "bomb.png").tolist() == [side, side, 3]
    assert reader.memory < 24 * MAX_PIXELS  # bytes a pixel, with Pillow's own


# --------------------------------------------------------------------------------------------- entries that are no file


def test_irregular_entries_are_named_and_nothing_waits(tmp_path, reader):
    images, masks = make_folders(tmp_path, 4)
    names = odd_entries(images)
    for name in names:
        Image.fromarray(disc(60, 80)).save((masks / name).with_suffix(".png"))
        if name != "nowhere.jpg" and name != "loop.jpg":
            assert reader(read_image, images / name) == "not a regular file"
    for name in ("scene.gif", "photo.HEIC", "notes.txt", ".hidden.gif"):
        (images / name).write_bytes(b"x")
    data, log, skipped = open_folders(images, masks)
    irregular = [f"{name} ({'a folder' if name == 'folder.jpg' else 'not a regular file'})" for name in names]
    listed = f"notes.txt, photo.HEIC, scene.gif, {irregular[0]}"
    assert f"data: {3 + len(names)} entries of other types, ignored: {listed}" in log
    assert f"warning: skipped {len(names)} masks without an image: device.png" in log
    assert skipped == len(names)  # the masks; a README next to the images does not change the exit code
    assert len(data.train) + len(data.val) == 4


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forbids such names")
def test_names_of_any_kind(tmp_path):
    images, masks = make_folders(tmp_path, 4)
    names = ["two\nlines", "\x1b[31mred", "tab\there", "für 'x' \"y\"", "日本", "-rf", "%s{0}"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"latin\xfc"))
    for name in names:
        Image.fromarray(disc(60, 80)).save(masks / f"{name}.png")
        (images / f"{name}.jpg").write_bytes(b"")
    (images / "lonely\r.jpg").write_bytes(b"")
    data, log, _ = open_folders(images, masks)
    assert {*data.report.unusable} == {f"{name}.jpg (empty file)" for name in names}
    assert all(line.isprintable() for line in log.split("\n"))
    assert "lonely\\r.jpg" in log
    again, log, _ = open_folders(images, masks)
    assert again.report == data.report
    assert "cache: read from" in log
    with pytest.raises(BadFile) as caught:
        read_image(images / "two\nlines.jpg")
    assert str(caught.value).endswith("two\\nlines.jpg: empty file")
