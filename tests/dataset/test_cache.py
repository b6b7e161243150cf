"""The stored cache: read where nothing has changed, else rebuilt; never in the way of the run."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dataset.samples import disc, make_folders, open_folders, photo
from u2mamba.dataset import cache as cache_module
from u2mamba.dataset import decode, rescale
from u2mamba.dataset.cache import cache_path
from u2mamba.dataset.decode import read_image, read_mask
from u2mamba.dataset.image_file import BadFile
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
    assert again.report.unusable == [("p005.png", "empty file")]
    assert torch.equal(again.train.cache.images, first.train.cache.images)
    assert torch.equal(again.train.cache.masks, first.train.cache.masks)

    Image.fromarray(photo(60, 80, seed=99)).save(images / "p005.png")  # a changed file: the old cache is replaced
    changed, log, _ = open_folders(images, masks)
    assert "filled" in log
    assert len(changed.train) + len(changed.val) == 40
    assert stored(tmp_path) == ["json", "u8"]


@pytest.mark.parametrize("kind", ["u8", "json"])
def test_a_damaged_cache_is_rebuilt(tmp_path, kind):
    images, masks = make_folders(tmp_path)
    first, *_ = open_folders(images, masks)
    (path,) = tmp_path.glob(f".cache_*.{kind}")
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (content[:-1], content[:9], b"", bytes(flipped), content + b"0"):
        path.write_bytes(damaged)
        rebuilt, log, _ = open_folders(images, masks)
        assert "is damaged" in log and len(log.splitlines()) < 9
        assert torch.equal(rebuilt.train.cache.images, first.train.cache.images)
        assert path.read_bytes() == content
    path.unlink()  # as after a kill between the two files
    assert "filled" in open_folders(images, masks).log
    assert path.read_bytes() == content


def test_the_key_notices_every_change(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 4)
    seen = set()

    def changed() -> bool:
        key = cache_path(tmp_path, pair_folders(images, masks, lambda line: None), 32).name
        new = key not in seen
        seen.add(key)
        return new

    assert changed()
    assert not changed()
    content = (images / "p001.png").read_bytes()
    old = (images / "p001.png").stat()
    (images / "p001.png").write_bytes(content[:-20] + bytes(20))  # the same size
    os.utime(images / "p001.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert changed()
    (images / "p001.png").write_bytes(content + b"\0")  # the same time
    os.utime(images / "p001.png", ns=(old.st_atime_ns, old.st_mtime_ns + 1))
    assert changed()
    (masks / "p002.png").rename(masks / "p002.bmp")
    assert changed()
    (images / "p003.png").unlink()
    assert changed()
    for module in (decode, rescale):  # an edited file that decodes or rescales
        edited = tmp_path / "edited.py"
        edited.write_text(Path(module.__file__).read_text().replace("np.uint8", "np.int8"))
        with monkeypatch.context() as patch:
            patch.setattr(module, "__file__", str(edited))
            assert changed()
        assert not changed()
    pairs = pair_folders(images, masks)
    before = cache_path(tmp_path, pairs, 32)
    pairs[0].image.unlink()  # between finding and the check
    assert cache_path(tmp_path, pairs, 32) != before


def test_a_permission_that_is_given_is_noticed(tmp_path, monkeypatch):
    """It changes neither size nor time of a file, so the stored cache still says that it cannot be read."""
    images, masks = make_folders(tmp_path, 4)
    open_image = decode.open_image

    def refused(path: Path):
        if path.name == "p001.png":
            raise BadFile(path, "Permission denied")
        return open_image(path)

    with monkeypatch.context() as patch:
        patch.setattr(decode, "open_image", refused)
        for message in ("stored", "read from"):
            data, log, _ = open_folders(images, masks)
            assert data.report.unusable == [("p001.png", "Permission denied")]
            assert f"cache: {message}" in log
    data, log, _ = open_folders(images, masks)
    assert len(data.report.usable) == 4
    assert "cache: 1 pairs that were skipped are readable now; rebuilding" in log
    assert "cache: read from" in open_folders(images, masks).log


def test_a_cache_that_cannot_be_stored_costs_one_line(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 3)
    (tmp_path / "file").write_text("")
    data, log, _ = open_folders(images, masks, cache_dir=tmp_path / "file" / "below")
    assert log.count("cache: not stored on disk: ") == 1
    assert data.train.cache is not None
    monkeypatch.setattr(cache_module.shutil, "disk_usage", lambda _: SimpleNamespace(free=1_050_000_000))
    log = open_folders(images, masks, size=320).log
    needed = "1 MB plus 1.1 GB that stay free"
    assert f"cache: not stored on disk: {tmp_path} has 1.1 GB free, needed are {needed}" in log
    monkeypatch.undo()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert f"cache: not stored on disk: No space left on device ({tmp_path})" in open_folders(images, masks).log
    assert not stored(tmp_path)


START = """
import sys
from tests.dataset.samples import open_folders
data, log, _ = open_folders(*sys.argv[1:3])
print(data.fingerprint, data.train.cache.images.sum().item(), "damaged" in log)
"""


def start(images: Path, masks: Path) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", START, images, masks], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE, text=True
    )


def test_processes_that_start_together_agree(tmp_path):
    images, masks = make_folders(tmp_path, 30)
    outputs = {process.communicate(timeout=120)[0] for process in [start(images, masks) for _ in range(4)]}
    assert len(outputs) == 1 and "False" in outputs.pop()
    assert stored(tmp_path) == ["json", "u8"]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_leaves_nothing_that_is_believed(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 30)
    expected = open_folders(images, masks, cache_dir=tmp_path / "other").data.train.cache.images
    process = start(images, masks)
    killer = threading.Thread(target=lambda: kill_when_there(process, tmp_path))
    killer.start()
    process.wait(timeout=120)
    killer.join()
    data, log, _ = open_folders(images, masks)
    assert torch.equal(data.train.cache.images, expected)
    assert "damaged" not in log
    for left in tmp_path.glob(".cache*.tmp"):
        os.utime(left, (time.time() - 7200,) * 2)  # of a process that has gone for long
    open_folders(images, masks)
    assert not list(tmp_path.glob(".cache*.tmp"))


def kill_when_there(process: subprocess.Popen, folder: Path) -> None:
    while process.poll() is None:
        if list(folder.glob(".cache*")):
            process.send_signal(signal.SIGKILL)
            return


def test_a_mask_that_is_corrected_while_the_pairs_are_decoded_is_read_at_the_next_start(tmp_path, monkeypatch):
    images, masks = make_folders(tmp_path, 3)
    check = cache_module.check_pairs

    def check_then_edit(*args):
        report = check(*args)
        Image.fromarray(255 - disc(60, 80)).save(masks / "p001.png")
        return report

    with monkeypatch.context() as patch:
        patch.setattr(cache_module, "check_pairs", check_then_edit)
        open_folders(images, masks)
    data, log, _ = open_folders(images, masks)
    assert "filled" in log
    np.testing.assert_array_equal(data.train.cache.masks[1], rescale_mask(255 - disc(60, 80), 32))
