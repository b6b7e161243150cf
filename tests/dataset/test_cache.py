"""The stored cache: read where nothing has changed, else rebuilt; never in the way of the run."""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image

from tests.dataset.samples import disc, make_folders, open_folders, photo
from tests.forked import context
from u2mamba.dataset import cache as cache_module
from u2mamba.dataset import decode, image_file, rescale
from u2mamba.dataset.cache import cache_path
from u2mamba.dataset.check import check_pairs
from u2mamba.dataset.decode import read_image, read_mask
from u2mamba.dataset.pairs import is_validation, pair_folders
from u2mamba.dataset.rescale import rescale_image, rescale_mask


def stored(folder: Path) -> list[str]:
    return sorted(path.name.split(".")[-1] for path in folder.glob(".cache*"))


def test_the_cache_is_filled_stored_read_and_rebuilt(tmp_path):
    images, masks = make_folders(tmp_path, 40)
    (images / "p005.png").write_bytes(b"")
    first, log, _ = open_folders(images, masks)
    assert "cache: 40 pairs, 0 MB in memory" in log
    assert "stored as" in log
    assert len(first.train) + len(first.val) == 39
    for source in (first.train, first.val):
        for pair, row in zip(source.pairs, source.rows, strict=True):
            assert pair.stem != "p005"
            np.testing.assert_array_equal(source.cache.images[row], rescale_image(read_image(pair.image), 32))
            np.testing.assert_array_equal(source.cache.masks[row], rescale_mask(read_mask(pair.mask), 32))
    assert [p.stem for p in first.val.pairs] == [p.stem for p in pair_folders(images, masks) if is_validation(p)]

    again, log, _ = open_folders(images, masks)
    assert "read from" in log and "filled in" not in log
    assert (again.report, again.fingerprint) == (first.report, first.fingerprint)
    assert again.report.unusable == ["p005.png (empty file)"]
    assert torch.equal(again.train.cache.images, first.train.cache.images)
    assert torch.equal(again.train.cache.masks, first.train.cache.masks)

    (path,) = tmp_path.glob(".cache_*")
    path.rename(path.with_suffix(".u8"))  # as version 0.1.0 named it
    Image.fromarray(photo(60, 80, seed=99)).save(images / "p005.png")  # a changed file: the old cache is replaced
    changed, log, _ = open_folders(images, masks)
    assert "filled" in log
    assert len(changed.train) + len(changed.val) == 40
    assert stored(tmp_path) == ["npy"]


def test_a_damaged_cache_is_rebuilt(tmp_path):
    images, masks = make_folders(tmp_path)
    first, *_ = open_folders(images, masks)
    (path,) = tmp_path.glob(".cache_*.npy")
    content = path.read_bytes()
    report, middle = content.index(b"usable"), len(content) // 2
    flipped = [content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :] for at in (1, 60, 130, report, middle)]
    for damaged in (content[:-1], content[:9], b"", b"null", *flipped):
        path.write_bytes(damaged)
        rebuilt, log, _ = open_folders(images, masks)
        assert "is damaged" in log and len(log.splitlines()) < 9
        assert torch.equal(rebuilt.train.cache.images, first.train.cache.images)
        assert path.read_bytes() == content


def test_the_key_notices_every_change(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 4)
    first, seen = images / "p001.png", set()

    def changed() -> bool:
        known = len(seen)
        seen.add(cache_path(tmp_path, pair_folders(images, masks, lambda line: None), 32).name)
        return len(seen) > known

    def write(content: bytes, time: int) -> None:
        first.write_bytes(content)
        os.utime(first, ns=(time, time))

    content, time = first.read_bytes(), first.stat().st_mtime_ns
    assert changed() and not changed()
    for change in (
        lambda: write(content[:-20] + bytes(20), time + 1),  # the same size
        lambda: write(content + b"0", time + 1),  # the same time
        lambda: (masks / "p002.png").rename(masks / "p002.bmp"),
        (images / "p003.png").unlink,
    ):
        change()
        assert changed()
    for module in (decode, rescale):  # an edited file that decodes or rescales
        edited = tmp_path / "edited.py"
        edited.write_text(Path(module.__file__).read_text().replace("np.uint8", "np.int8"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(edited))
            assert changed()
        assert not changed()


def test_a_file_that_becomes_readable_is_noticed(tmp_path, monkeypatch):
    """A permission or a disk error changes neither size nor time of a file."""
    images, masks = make_folders(tmp_path, 4)

    def refused(path: Path, mode: str):  # chmod does not stop root
        if path.name == "p001.png":
            raise PermissionError(13, "Permission denied")
        return open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(image_file, "open", refused, raising=False)
        data, log, _ = open_folders(images, masks)
    assert data.report.unusable == ["p001.png (Permission denied)"]
    assert "cache: not stored on disk, because" in log
    data, log, _ = open_folders(images, masks)
    assert len(data.report.usable) == 4
    assert "cache: stored" in log


def test_a_cache_that_cannot_be_stored_costs_one_line(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 3)
    (tmp_path / "file").write_text("")
    data, log, _ = open_folders(images, masks, cache_dir=tmp_path / "file" / "below")
    assert log.count("cache: not stored on disk: ") == 1
    assert data.train.cache is not None
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_050_000_000))
    log = open_folders(images, masks, size=320).log
    needed = "1 MB plus a margin of 1.1 GB"
    assert f"cache: not stored on disk: 1.1 GB free, but it requires {needed} ({tmp_path})" in log
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert f"cache: not stored on disk: No space left on device ({tmp_path})" in open_folders(images, masks).log
    assert not stored(tmp_path)


def opened(folders: tuple[Path, Path]) -> tuple[int, int, bool]:
    data, log, _ = open_folders(*folders)
    return data.fingerprint, data.train.cache.images.sum().item(), "damaged" in log


def test_processes_that_start_together_agree(tmp_path):
    folders = make_folders(tmp_path, 30)
    with context().Pool(3) as pool:
        results = set(pool.map(opened, [folders] * 3, chunksize=1))
    assert len(results) == 1 and not results.pop()[2]
    assert stored(tmp_path) == ["npy"]


def test_a_killed_process_leaves_nothing_that_is_believed(tmp_path):
    folders = make_folders(tmp_path, 30)
    expected = open_folders(*folders, cache_dir=tmp_path / "other").data.train.cache.images
    process = context().Process(target=opened, args=(folders,))
    process.start()
    while process.is_alive() and not list(tmp_path.glob(".cache*")):
        time.sleep(0.001)
    process.kill()
    process.join()
    data, log, _ = open_folders(*folders)
    assert torch.equal(data.train.cache.images, expected)
    assert "damaged" not in log
    for left in tmp_path.glob(".cache*.tmp"):
        os.utime(left, (time.time() - 7200,) * 2)  # of a process that has gone for long
    open_folders(*folders)
    assert not list(tmp_path.glob(".cache*.tmp"))


def test_a_mask_that_is_corrected_while_the_pairs_are_decoded_is_read_at_the_next_start(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 3)

    def check_then_edit(*args):
        report = check_pairs(*args)
        Image.fromarray(255 - disc(60, 80)).save(masks / "p001.png")
        return report

    monkeypatch.setattr(cache_module, "check_pairs", check_then_edit)
    open_folders(images, masks)
    monkeypatch.undo()
    data, log, _ = open_folders(images, masks)
    assert "filled" in log
    np.testing.assert_array_equal(data.train.cache.masks[1], rescale_mask(255 - disc(60, 80), 32))
