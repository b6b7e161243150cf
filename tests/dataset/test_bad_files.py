"""Damaged and odd files: each is read right or set aside by name, within 5 s and bounded memory; nothing hangs.

Files are read in a process of its own, so that one on which a decoder hung or crashed would fail its test by name.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from data_loader import batches, epoch_plan, open_data
from tests.dataset.bad_files import (
    WHOLE,
    Case,
    all_cases,
    encode,
    many_scans,
    measured,
    odd_entries,
    photographs,
    png,
    shape_of,
    whole_file,
)
from u2mamba.dataset import cache as cache_module
from u2mamba.dataset import decode as decode_module
from u2mamba.dataset import pairs as pairs_module
from u2mamba.dataset.cache import cache_path, rescale_image
from u2mamba.dataset.decode import MAX_PIXELS, scale_mask
from u2mamba.dataset.pairs import IMAGE_TYPES, BadFile, Pair, check_pairs, find_pairs, read_image, read_mask, read_pair

SECONDS = 5  # of the processor, a file at most
GIVE_UP = 120  # seconds of the clock after which a file counts as hanging; other tests run at the same time


@pytest.fixture(scope="module")
def reader():
    """measured(read, path) in another process; `reader.worst` is the longest time, `reader.memory` the growth."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:

        def run(read, path: Path) -> np.ndarray | str:
            got, seconds, memory = pool.apply_async(measured, (read, path)).get(GIVE_UP)
            for _ in range(2 if seconds >= SECONDS else 0):  # a core that is shared counts others' waits as its own
                again = pool.apply_async(measured, (read, path)).get(GIVE_UP)[1]
                seconds = min(seconds, again)
            run.worst, run.memory = max(run.worst, (seconds, path.name)), run.memory + memory
            assert seconds < SECONDS, path.name
            return got

        run.worst, run.memory = (0.0, ""), 0
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
        return f"set aside: {got}" if case.outcome == "read" else ""
    if case.outcome == "aside":
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
    assert len(all_cases()) >= 350
    wrong = {case.name: verdict(case, reader(read_image, folder / case.name)) for case in all_cases()}
    assert {name: what for name, what in wrong.items() if what} == {}
    assert reader.memory < 150e6  # pictures of 35 kB; each bomb holds 100 to 200 MB
    seconds, name = reader.worst
    print(f"\n{len(all_cases())} files, longest {seconds:.2f} s ({name}), memory +{reader.memory / 1e6:.0f} MB")


def test_every_file_as_a_mask(reader, folder):
    wrong = []
    for case in all_cases():
        got = reader(read_mask, folder / case.name)
        if isinstance(got, str):
            assert case.outcome != "read", case.name
            continue
        assert (got.ndim, got.dtype) == (2, np.uint8), case.name
        see_through = any(word in case.name for word in ("RGBA", "LA.", "_key", "alphas"))  # black then, not white
        if case.outcome in ("read", "whole") and not case.step and not see_through:
            expected, _ = scale_mask(np.asarray(Image.fromarray(case.pixels).convert("L")))
            if np.abs(got.astype(int) - expected).max() > 1:
                wrong.append(case.name)
    assert wrong == []


def test_a_data_set_of_them(folder, tmp_path):
    """The check, the cache and streaming agree, and name what they set aside."""
    images, masks = tmp_path / "images", tmp_path / "masks"
    images.mkdir()
    masks.mkdir()
    expected = {}
    for number, case in enumerate(all_cases()):
        assert case.name.endswith(IMAGE_TYPES), case.name
        name = f"{number:03d}_{case.name}"
        expected[name] = case
        shutil.copy(folder / case.name, images / name)
        height, width = (96, 120) if case.pixels is None else case.pixels.shape[:2]
        mask = np.zeros((height, width), np.uint8)
        mask[: height // 2] = 255
        Image.fromarray(mask).save(masks / f"{Path(name).stem}.png")
    said: list[str] = []
    cached = open_data(images, masks, size=32, say=said.append)
    bad = dict(cached.report.bad)
    assert {name for name, case in expected.items() if case.outcome == "aside"} <= bad.keys()
    assert not {name for name, case in expected.items() if case.outcome == "read"} & bad.keys()
    assert cached.report.pairs + len(bad) == len(all_cases())
    for k, pair in enumerate(cached.train.pairs):
        case = expected[pair.image.name]
        if case.outcome in ("read", "whole") and not case.step:
            np.testing.assert_array_equal(cached.train.cache.images[k], rescale_image(case.pixels, 32), case.name)
    streamed = open_data(images, masks, size=32, cache=False, workers=2, say=lambda _: None)
    again = open_data(images, masks, size=32, say=said.append)
    assert streamed.report == cached.report == again.report
    assert "cache: read from" in "".join(said)
    plan = epoch_plan(len(cached.train), 0, 0, rescale=32, crop=24)
    for one, other in zip(
        batches(cached.train, plan, 16, crop=24), batches(streamed.train, plan, 16, crop=24), strict=True
    ):
        assert torch.equal(one.x, other.x)
        assert torch.equal(one.y, other.y)


# ------------------------------------------------------------------------------------------------- any damage at all

whole = functools.lru_cache(maxsize=None)(lambda photo, kind: whole_file(photographs()[photo], kind))
place = st.floats(0, 1, exclude_max=True)
damage = st.one_of(
    st.tuples(st.just("cut"), place, place),
    st.tuples(st.just("flip"), place, st.integers(1, 255)),
    st.tuples(st.just("zeros"), place, place),
    st.tuples(st.just("drop"), place, place),
    st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=50)),
    st.tuples(st.just("repeat"), place, place),
)


def damaged(content: bytes, kind: str, where: float, what) -> bytes:
    at = int(where * len(content))
    end = min(len(content), at + 1 + int(what * 500)) if isinstance(what, float) else at + 1
    return {
        "cut": lambda: content[:at],
        "flip": lambda: content[:at] + bytes([content[at] ^ what]) + content[end:],
        "zeros": lambda: content[:at] + bytes(end - at) + content[end:],
        "drop": lambda: content[:at] + content[end:],
        "insert": lambda: content[:at] + what + content[at:],
        "repeat": lambda: content[:end] + content[at:],
    }[kind]()


@settings(max_examples=300, derandomize=True, database=None, deadline=None)
@given(photo=st.integers(0, 3), kind=st.sampled_from(WHOLE), damages=st.lists(damage, max_size=4))
def test_any_damage(reader, folder, photo, kind, damages):
    case = whole(photo, kind)
    content = case.content
    for one in damages:
        content = damaged(content, *one) if content else content
    path = folder / f"damaged.{kind}"
    path.write_bytes(content)
    sound = content == case.content
    outcome = "read" if sound else "whole" if kind == "png" else "either"
    got = reader(read_image, path)
    assert verdict(case._replace(outcome=outcome), got) == ""
    if not isinstance(got, str):
        assert got.size <= 3 * MAX_PIXELS


# ------------------------------------------------------------------------------------------------------------- large


@pytest.mark.parametrize("kind", ["rgba", "grey16"])
def test_the_largest_picture_that_is_read(reader, tmp_path, kind):
    """200 kB that decode to 67 megapixels: what one file can cost."""
    side = int(MAX_PIXELS**0.5)
    depth, colour, row = (8, 6, 4 * side) if kind == "rgba" else (16, 0, 2 * side)
    (tmp_path / "bomb.png").write_bytes(png(side, side, depth, colour, bytes((row + 1) * side)))
    assert reader(shape_of, tmp_path / "bomb.png").tolist() == [side, side, 3]
    print(f"\n{kind}: longest {reader.worst[0]:.2f} s, memory +{reader.memory / 1e6:.0f} MB")
    assert reader.memory < 24 * MAX_PIXELS  # bytes a pixel, with Pillow's own


def test_long_work_for_small_files(reader, tmp_path):
    (tmp_path / "scans.jpg").write_bytes(many_scans(6000, 200))  # 150 kB; took 11 s
    assert reader(read_image, tmp_path / "scans.jpg") == "a JPEG of 205 scans; of this size 55 are read"
    (tmp_path / "few.jpg").write_bytes(many_scans(600, 200))
    assert reader(read_image, tmp_path / "few.jpg").shape == (600, 600, 3)
    jpeg = encode(Image.fromarray(photographs()[0]), "jpeg")
    with open(tmp_path / "junk.jpg", "wb") as file:  # a header, then a hole: Pillow looks for a marker byte by byte
        file.write(jpeg[:20])
        file.truncate(1 << 26)
    assert reader(read_image, tmp_path / "junk.jpg") == "its header cannot be made sense of"


@pytest.mark.parametrize("shape", [(65_535, 3), (3, 65_535), (1, 1)])
def test_shapes_at_the_limit_are_rescaled(shape):
    started = time.process_time()
    rows = np.arange(shape[0] * shape[1], dtype=np.uint32).reshape(shape)
    got = rescale_image(np.dstack([rows * 255 // max(1, rows.max())] * 3).astype(np.uint8), 320)
    assert got.shape == (320, 320, 3)
    assert time.process_time() - started < SECONDS  # an operator of 65,535 x 320 took minutes and 1 GB


def test_decoding_waits_for_room():
    room, inside, most = decode_module._Room(10), 0, []
    lock = threading.Lock()

    def work(pixels: int) -> None:
        nonlocal inside
        with room.take(pixels):
            with lock:
                inside += pixels
                most.append(inside)
            time.sleep(0.002)
            with lock:
                inside -= pixels

    threads = [threading.Thread(target=work, args=(1 + k % 10,)) for k in range(40)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) <= 10
    assert len(most) == 40
    with pytest.raises(KeyError), room.take(10):
        raise KeyError
    assert room._free == 10
    assert 2 * MAX_PIXELS <= decode_module.DECODED_AT_ONCE  # or the largest pair would wait for ever


# ---------------------------------------------------------------------------------------------- entries of no file


def make_pairs(root: Path, count: int = 4) -> tuple[Path, Path]:
    photo = Image.fromarray(photographs()[0])
    for name in ("images", "masks"):
        (root / name).mkdir()
        for k in range(count):
            photo.convert("RGB" if name == "images" else "L").save(root / name / f"p{k}.png")
    return root / "images", root / "masks"


def test_odd_entries_are_named_and_nothing_waits(tmp_path, reader):
    images, masks = make_pairs(tmp_path)
    names = odd_entries(images)
    for name in names:
        Image.fromarray(photographs()[0]).convert("L").save((masks / name).with_suffix(".png"))
        if name != "nowhere.jpg" and name != "loop.jpg":
            assert reader(read_image, images / name) == "not a regular file"
    for name in ("scene.gif", "photo.HEIC", "notes.txt", ".hidden.gif"):
        (images / name).write_bytes(b"x")
    pairs, unpaired = find_pairs(images, masks)
    assert [pair.stem for pair in pairs] == ["p0", "p1", "p2", "p3"]
    odd = [f"{name} ({'a folder' if name == 'folder.jpg' else 'not a regular file'})" for name in names]
    assert unpaired.others == ["notes.txt", "photo.HEIC", "scene.gif", *odd]
    assert unpaired.masks == [f"{Path(name).stem}.png" for name in names]
    said: list[str] = []
    data = open_data(images, masks, size=32, say=said.append)
    assert f"data: {3 + len(odd)} of another type, not read: notes.txt, photo.HEIC, scene.gif, {odd[0]}" in "\n".join(
        said
    )
    assert data.report.set_aside == len(names)  # the masks; a read-me beside the images does not change an exit code
    assert len(data.train) + len(data.val) == 4
    again = open_data(images, masks, size=32, say=said.append)
    assert again.report == data.report


@pytest.mark.skipif(sys.platform == "win32", reason="Windows forbids such names")
def test_names_of_any_kind(tmp_path):
    images, masks = make_pairs(tmp_path)
    names = ["two\nlines", "\x1b[31mred", "tab\there", "für 'x' \"y\"", "日本", "-rf", "%s{0}"]
    if sys.platform == "linux":
        names.append(os.fsdecode(b"latin\xfc"))
    for name in names:
        Image.fromarray(photographs()[1]).convert("L").save(masks / f"{name}.png")
        (images / f"{name}.jpg").write_bytes(b"")
    (images / "lonely\r.jpg").write_bytes(b"")
    said: list[str] = []
    data = open_data(images, masks, size=32, say=said.append)
    assert {name for name, _ in data.report.bad} == {f"{name}.jpg" for name in names}
    assert all(line.isprintable() for line in said)
    assert "lonely\\r.jpg" in "".join(said)
    again = open_data(images, masks, size=32, say=said.append)
    assert again.report == data.report
    assert "cache: read from" in "".join(said)
    with pytest.raises(BadFile) as caught:
        read_image(images / "two\nlines.jpg")
    assert str(caught.value).endswith("two\\nlines.jpg: empty file")


def test_a_pair_blames_the_file_that_is_bad(tmp_path):
    images, masks = make_pairs(tmp_path, 1)
    pair = Pair("p0", images / "p0.png", masks / "p0.png")
    content = pair.image.read_bytes()
    for path in pair[1:]:
        for damage in (content[: len(content) // 2], b""):
            kept = path.read_bytes()
            path.write_bytes(damage)
            with pytest.raises(BadFile) as caught:
                read_pair(pair)
            assert caught.value.path == path
            path.write_bytes(kept)
    read_pair(pair)


def test_too_little_memory_sets_the_pair_aside(tmp_path):
    def keep(index: int, image: np.ndarray, mask: np.ndarray) -> None:
        if index == 1:
            raise MemoryError

    good, report = check_pairs(find_pairs(*make_pairs(tmp_path))[0], keep=keep)
    assert good == [0, 2, 3]
    assert report.bad == [("p1.png", "does not fit into memory")]


# ------------------------------------------------------------------------------------------------------------- cache


def test_cache_notices_every_change(tmp_path):
    images, masks = make_pairs(tmp_path)
    seen = set()

    def key() -> str:
        return cache_path(tmp_path, find_pairs(images, masks)[0], 32).name

    def changed() -> bool:
        new = key() not in seen
        seen.add(key())
        return new

    assert changed()
    assert not changed()
    content = (images / "p1.png").read_bytes()
    old = (images / "p1.png").stat()
    (images / "p1.png").write_bytes(content[:-20] + bytes(20))  # the same size
    os.utime(images / "p1.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert changed()
    (images / "p1.png").write_bytes(content + b"\0")  # the same time
    os.utime(images / "p1.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert changed()
    (masks / "p2.png").rename(masks / "p2.bmp")
    assert changed()
    (images / "p3.png").unlink()
    assert changed()
    pairs, _ = find_pairs(images, masks)
    before = cache_path(tmp_path, pairs, 32)
    pairs[0].image.unlink()  # between finding and the check
    assert cache_path(tmp_path, pairs, 32) != before


def test_a_mended_permission_is_noticed(tmp_path, monkeypatch):
    """It changes neither size nor time of a file, so the stored cache still says that it cannot be read."""
    images, masks = make_pairs(tmp_path)
    said: list[str] = []
    opened = pairs_module.opened

    def refused(path: Path):
        if path.name == "p1.png":
            raise BadFile(path, "Permission denied")
        return opened(path)

    with monkeypatch.context() as patch:
        patch.setattr(pairs_module, "opened", refused)
        assert open_data(images, masks, size=32, say=said.append).report.bad == [("p1.png", "Permission denied")]
        assert "cache: read from" not in "".join(said)
        assert open_data(images, masks, size=32, say=said.append).report.pairs == 3
        stored = [line.startswith("cache: stored") for line in said].index(True)
        assert any(line.startswith("cache: read from") for line in said[stored:])
    said.clear()
    assert open_data(images, masks, size=32, say=said.append).report.pairs == 4
    assert "cache: 1 pairs that were set aside can be read now; made again" in said
    said.clear()
    assert open_data(images, masks, size=32, say=said.append).report.pairs == 4
    assert any(line.startswith("cache: read from") for line in said)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no Unix permissions")
def test_a_file_without_permission(tmp_path):
    Image.fromarray(photographs()[0]).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    is_root = os.geteuid() == 0  # who may read everything
    if is_root:
        os.seteuid(65534)
    try:
        with pytest.raises(BadFile, match="Permission denied"):
            read_image(tmp_path / "a.png")
    finally:
        if is_root:
            os.seteuid(0)


def test_a_full_disk_is_told_with_what_is_to_stay_free(tmp_path, monkeypatch):
    images, masks = make_pairs(tmp_path)
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_050_000_000))
    said: list[str] = []
    open_data(images, masks, size=320, say=said.append)
    assert f"cache: not stored on disk, 1.1 GB free in {tmp_path}, 2 MB needed and 1.1 GB to stay free" in said
