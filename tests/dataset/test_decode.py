"""Reading image, mask and map files of every mode, measured by Pillow and NumPy."""

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.dataset.samples import disc, make_folders, photo
from u2mamba.dataset import image_file
from u2mamba.dataset.decode import Pair, read_image, read_pair, to_rgb
from u2mamba.dataset.image_file import BadFile, PixelSemaphore


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
    np.testing.assert_allclose(to_rgb(Image.new("RGB", (2, 2), red).convert("HSV"))[0, 0], red, atol=2)


@pytest.mark.parametrize("kind", ["jpg", "png", "tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_of_image_and_mask(tmp_path, orientation, kind):
    stored = Image.fromarray(photo(16, 24))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / f"a.{kind}", exif=exif, **({"quality": 95, "subsampling": 0} if kind == "jpg" else {}))
    if kind == "jpg":  # the loss is not the question here
        stored = Image.open(tmp_path / "a.jpg")
    stored.getexif()[0x0112] = orientation
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{kind}"), np.asarray(ImageOps.exif_transpose(stored)))
    # the mask has no tag: drawn on the image as stored, or as seen
    label = Image.fromarray(disc(16, 24))
    label.getexif()[0x0112] = orientation
    seen = np.asarray(ImageOps.exif_transpose(label))
    Image.fromarray(seen).save(tmp_path / "seen.png")
    np.testing.assert_array_equal(read_pair(Pair("a", tmp_path / f"a.{kind}", tmp_path / "seen.png"))[1], seen)
    if orientation >= 5:
        Image.fromarray(disc(16, 24)).save(tmp_path / "stored.png")
        mask = read_pair(Pair("a", tmp_path / f"a.{kind}", tmp_path / "stored.png"))[1]
        np.testing.assert_array_equal(mask, seen)


def test_own_pixel_limit_holds_where_pillows_is_off(tmp_path, monkeypatch):
    Image.new("L", (20, 20)).save(tmp_path / "a.png")
    monkeypatch.setattr(image_file, "MAX_PIXELS", 399)
    with pytest.raises(BadFile, match="declares 20x20 pixels; MAX_PIXELS = 399"):
        read_image(tmp_path / "a.png")


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no Unix permissions")
def test_a_file_without_permission(tmp_path):
    Image.fromarray(photo(9, 9)).save(tmp_path / "a.png")
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


def test_a_pair_blames_the_file_that_is_bad(tmp_path):
    images, masks = make_folders(tmp_path, 1)
    pair = Pair("p000", images / "p000.png", masks / "p000.png")
    content = pair.image.read_bytes()
    for path in (pair.image, pair.mask):
        for damage in (content[: len(content) // 2], b""):
            kept = path.read_bytes()
            path.write_bytes(damage)
            with pytest.raises(BadFile) as caught:
                read_pair(pair)
            assert caught.value.path == path
            path.write_bytes(kept)
    read_pair(pair)


def test_decoding_waits_for_memory():
    semaphore, inside, most = PixelSemaphore(10), 0, []
    lock = threading.Lock()

    def work(pixels: int) -> None:
        nonlocal inside
        with semaphore.hold(pixels):
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
    with pytest.raises(KeyError), semaphore.hold(10):
        raise KeyError
    with semaphore.hold(99):  # above the limit, but alone
        pass
