"""Reading image, mask and map files of every mode, measured by Pillow and NumPy."""

import itertools
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from PIL import Image, ImageOps

from tests.dataset.samples import disc, photo
from u2mamba.dataset.decode import Pair, read_image, read_pair
from u2mamba.dataset.image_file import BadFile, PixelSemaphore


def test_transparent_parts_lie_on_white(tmp_path):
    Image.new("RGBA", (3, 3), (200, 0, 0, 128)).save(tmp_path / "rgba.png")
    np.testing.assert_allclose(read_image(tmp_path / "rgba.png")[0, 0], [227, 127, 127], atol=1)


@pytest.mark.parametrize("orientation", range(2, 9))
def test_a_mask_without_the_exif_orientation_of_its_image(tmp_path, orientation):
    """It was drawn on the image as seen, or as stored, where its shape shows that."""
    label = Image.fromarray(disc(16, 24))
    label.getexif()[0x0112] = orientation
    seen = ImageOps.exif_transpose(label)
    seen.save(tmp_path / "seen.png")
    Image.fromarray(disc(16, 24)).save(tmp_path / "stored.png")
    for kind, mask in itertools.product(("jpg", "png", "tif"), ("seen", "stored") if orientation >= 5 else ("seen",)):
        Image.fromarray(photo(16, 24)).save(tmp_path / f"a.{kind}", exif=label.getexif())
        pair = Pair("a", tmp_path / f"a.{kind}", tmp_path / f"{mask}.png")
        np.testing.assert_array_equal(read_pair(pair)[1], seen)


def test_a_bmp_that_pillow_reads_as_black_is_refused(tmp_path):
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 255, 255, 255])
    image.save(tmp_path / "a.bmp")
    with pytest.raises(BadFile, match="an 8-bit BMP of two colors"):
        read_image(tmp_path / "a.bmp")


def test_what_the_system_says_is_the_reason(tmp_path):
    for name, reason in (("gone.png", "No such file or directory"), ("a" * 300, "File name too long")):
        with pytest.raises(BadFile, match=f"{name}: {reason}"):
            read_image(tmp_path / name)


def test_decoding_waits_for_memory():
    semaphore, inside, most = PixelSemaphore(10), [], []

    def work(pixels: int) -> None:
        with semaphore.hold(pixels):
            inside.append(pixels)
            most.append(sum(inside))
            time.sleep(0.002)
            inside.remove(pixels)

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(work, [1 + k % 10 for k in range(40)]))
    assert len(most) == 40 and max(most) <= 10
    with pytest.raises(KeyError), semaphore.hold(10):
        raise KeyError
    with semaphore.hold(99):  # above the limit, but alone
        pass
