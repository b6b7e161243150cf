"""make_demo: layout, binary masks, the same seed gives the same bytes, no network, files of others are kept."""

import errno
import hashlib
import socket
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.forked import context
from u2mamba.dataset import demo as module
from u2mamba.dataset.demo import COUNT, FOLDER, make_demo
from u2mamba.runtime.errors import UserError

ROOT = Path(module.__file__).parents[2]
N = 20


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("make_demo opened a socket")

    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(socket, "create_connection", refuse)


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> Path:
    return make_demo(tmp_path_factory.mktemp("data") / "demo", N, 0)


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def test_layout_images_and_masks(demo):
    """They are the ones that the documented scores belong to; versions of Pillow may differ by a gray level."""
    assert [p.name for p in demo.iterdir()] == ["DUTS-TR"]  # no temporary folder is left
    known = {  # mean of the image, of its object, and the object's part
        0: (121.54, 162.45, 0.1849), 7: (117.17, 116.04, 0.1617), 19: (175.6, 117.31, 0.2082),
    }  # fmt: skip
    for i in range(N):
        image, mask = (
            Image.open(demo / FOLDER / f"{n}_{i:04d}.{k}") for n, k in (("im_aug/demo", "jpg"), ("gt_aug/demo", "png"))
        )
        assert (image.mode, mask.mode, image.size) == ("RGB", "L", mask.size)
        assert all(200 <= side <= 304 for side in image.size)
        pixels, truth = np.asarray(image, np.float32), np.asarray(mask)
        assert set(np.unique(truth)) == {0, 255}
        assert 0.02 <= truth.mean() / 255 <= 0.8
        inside, outside = pixels[truth == 255], pixels[truth == 0]
        if i in known:
            assert (pixels.mean(), inside.mean()) == pytest.approx(known[i][:2], abs=0.5)
            assert truth.mean() / 255 == pytest.approx(known[i][2], abs=1e-3)
        # The objects differ from their background (drawn again below a Lab distance of 30); neither is uniform.
        assert np.abs(inside.mean(0) - outside.mean(0)).max() > 20
        assert inside.std(0).max() > 3 and outside.std(0).max() > 2


def test_same_seed_same_bytes(demo, tmp_path):
    whole = digest(demo)
    for seed, same in ((0, 6), (1, 0)):  # pair i does not depend on how many are generated
        pairs = digest(make_demo(tmp_path / str(seed), 6, seed))
        assert len(pairs) == 13 and len(pairs.items() & whole.items()) == 2 * same


def test_enough_pairs_are_for_validation():
    assert sum(zlib.crc32(f"demo_{i:04d}".encode()) % 20 == 0 for i in range(COUNT)) == 24


def test_what_is_there_is_not_touched(tmp_path):
    make_demo(tmp_path, 2)
    folder = tmp_path / FOLDER
    for name in ("im_aug/mine.jpg", "gt_aug/mine.png", "notes.txt"):
        (folder / name).write_bytes(b"mine")
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert make_demo(str(tmp_path), 2) == tmp_path
    for number, seed in ((3, 0), (2, 1)):
        with pytest.raises(UserError, match=r"DUTS-TR holds other files than this .*: move it away, or set data_dir"):
            make_demo(tmp_path, number, seed)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before


def test_processes_that_start_together_make_one_set(tmp_path, monkeypatch):
    monkeypatch.undo()  # the pool uses sockets of its own
    with context().Pool(3) as pool:
        pool.starmap(make_demo, [(tmp_path, 3)] * 3, chunksize=1)
    assert [p.name for p in tmp_path.iterdir()] == ["DUTS-TR"]
    assert len(digest(tmp_path)) == 7


def test_a_full_disk_leaves_nothing_incomplete(tmp_path, monkeypatch):
    save, left = Image.Image.save, iter(range(3))

    def full(self, *args, **kwargs):
        if next(left, None) is None:
            raise OSError(errno.ENOSPC, "No space left on device")
        save(self, *args, **kwargs)

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"^.*No space left on device.*20 MB free$"):  # one line
        make_demo(tmp_path / "demo", 4)
    assert not digest(tmp_path)
