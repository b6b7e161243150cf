"""What people bring: kinds of masks, one rule for a set, odd photographs. Each row is of a kind that was reported."""

import itertools
import json
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps, PngImagePlugin

from tests.dataset.bad_files import png, tiff
from tests.dataset.samples import disc, make_folders, make_set, open_folders, photo
from u2mamba.dataset import batches
from u2mamba.dataset.check import check_pairs
from u2mamba.dataset.decode import Pair, read_image, read_mask, read_pair
from u2mamba.dataset.image_file import DECODE_LIMIT, BadFile, DataError, decode_budget
from u2mamba.dataset.pairs import is_validation, pair_folders
from u2mamba.dataset.rescale import rescale_mask
from u2mamba_eval import Config as EvalConfig
from u2mamba_eval import main as evaluate
from u2mamba_predict import Config as PredictConfig
from u2mamba_predict import Source, find_images, write

SHAPE = 60, 80
OBJECT = disc(*SHAPE) > 0
LEFT = np.arange(SHAPE[1])[None] < 55  # of the object, which reaches from 40 to 66
RING = OBJECT ^ np.roll(OBJECT, 4, axis=1)
VOC = [0, 0, 0, 128, 0, 0, 0, 128, 0, 128, 128, 0] + [64, 0, 128] * 252


def palette(indices: np.ndarray, colors: list[int]) -> Image.Image:
    image = Image.fromarray(indices.astype(np.uint8)).convert("L")
    image = Image.frombytes("P", image.size, image.tobytes())
    image.putpalette(colors)
    return image


def gray(values: np.ndarray) -> Image.Image:
    return Image.fromarray(np.asarray(values).astype(np.uint8))


def cutout(color: np.ndarray | int, alpha: np.ndarray = OBJECT * 255, bands: int = 3) -> Image.Image:
    pixels = np.broadcast_to(color, (*SHAPE, bands)).astype(np.uint8)
    return Image.fromarray(np.dstack((pixels, alpha.astype(np.uint8))))


def colored(first: tuple[int, int, int], second: tuple[int, int, int]) -> Image.Image:
    pixels = np.zeros((*SHAPE, 3), np.uint8)
    pixels[OBJECT], pixels[OBJECT & LEFT] = first, second
    return Image.fromarray(pixels)


NOISE = np.random.default_rng(0).integers(0, 6, SHAPE)
BINARY, ONES = gray(OBJECT * 255), gray(OBJECT)
LABELS, CUTOUT = gray(OBJECT * 1 + (OBJECT & LEFT)), cutout(photo(*SHAPE))
RED = OBJECT * (photo(*SHAPE)[..., 0] | 32)
GRADED = gray(np.where(OBJECT & LEFT, 106, OBJECT * 191))  # 5 and 9 of 12 people
CASES = {  # mask file -> how it is read by itself, or why it is not
    "0 and 255": (BINARY, OBJECT * 255),
    "0 and 1": (ONES, OBJECT * 255),
    "0 and another dark value": (gray(OBJECT * 38), OBJECT * 255),
    "bits": (BINARY.convert("1"), OBJECT * 255),
    "graded": (GRADED, np.asarray(GRADED)),
    "trimap": (gray(np.where(RING, 128, OBJECT * 255)), np.where(RING, 128, OBJECT * 255)),
    "noise on an empty mask": (gray(NOISE), NOISE),
    "white": (gray(np.full(SHAPE, 255)), np.full(SHAPE, 255)),
    "16 bits": (Image.fromarray(OBJECT.astype(np.uint16) * 65535), OBJECT * 255),
    "12 bits in 16": (Image.fromarray(OBJECT.astype(np.uint16) * 4095), OBJECT * 255),
    "floats": (Image.fromarray(OBJECT.astype(np.float32)), OBJECT * 255),
    "labels": (LABELS, "is a label map (0, 1, 2)"),
    "labels without 0": (gray(1 + OBJECT + (OBJECT & LEFT)), "is a label map (1, 2, 3)"),
    "labels and a border of 255": (gray(np.where(RING & ~OBJECT, 255, OBJECT * 15)), "is a label map (0, 15, 255)"),
    "labels and as much of 255": (gray(np.where(OBJECT & LEFT, 2, OBJECT * 255)), "is a label map (0, 2, 255)"),
    "labels by palette": (palette(OBJECT * 1 + (OBJECT & LEFT), VOC), "is a label map (0, 1, 2)"),
    "VOC by palette": (palette(np.where(RING, 255, OBJECT * 15), VOC), "is a label map (0, 15, 255)"),
    "one label by palette": (palette(OBJECT * 15, VOC), OBJECT * 255),
    "gray palette, white first": (palette(~OBJECT, [255, 255, 255, 0, 0, 0]), OBJECT * 255),
    "labels by flat colors": (colored((128, 0, 0), (0, 128, 0)), "is a label map (0, 1, 2)"),
    "one color with soft edges": (Image.merge("RGB", (gray(RED), *[gray(RED * 0)] * 2)), RED),
    "one flat color": (colored((200, 0, 0), (200, 0, 0)), OBJECT * 255),
    "photograph cut out": (CUTOUT, OBJECT * 255),
    "black object cut out": (cutout(0), OBJECT * 255),
    "white object cut out": (cutout(255), OBJECT * 255),
    "gray object cut out": (cutout(90, bands=1), OBJECT * 255),
    "black and white object cut out": (cutout(LEFT[..., None] * 255), OBJECT * 255),
    "overlay of one opacity": (cutout((200, 0, 0), OBJECT * 100), OBJECT * 255),
    "soft alpha": (cutout(photo(*SHAPE), np.asarray(GRADED)), np.asarray(GRADED)),
    "transparent color of a palette": (palette(OBJECT, [9, 9, 9, 200, 0, 0]), OBJECT * 255),
    "opaque": (Image.merge("LA", (BINARY, gray(np.full(SHAPE, 255)))), OBJECT * 255),
    "transparent": (cutout(photo(*SHAPE), np.zeros(SHAPE)), np.zeros(SHAPE)),
}


def save(image: Image.Image, path: Path, name: str = "") -> Path:
    path = path.with_suffix(".tif" if image.mode == "F" else ".png")
    image.save(path, **({"transparency": 0} if name.startswith("transparent color") else {}))
    return path


@pytest.mark.parametrize("name", CASES)
def test_a_mask_by_itself(name, tmp_path):
    image, expected = CASES[name]
    path = save(image, tmp_path / "mask.png", name)
    if isinstance(expected, str):
        with pytest.raises(BadFile, match=f"mask.png: {expected}".replace("(", r"\(").replace(")", r"\)")):
            read_mask(path)
    else:
        np.testing.assert_array_equal(read_mask(path), expected)


SETS = {  # most masks, another one -> the line, what becomes of the other (None: skipped)
    "gray": (BINARY, gray(NOISE), "gray levels, 0 to 255, 12 of 12", NOISE),
    "gray and a cut-out": (GRADED, CUTOUT, "gray levels, 0 to 255, 11 of 12", OBJECT * 255),
    "gray and 0 and 1": (BINARY, ONES, "gray levels, 0 to 255, 11 of 12", None),
    "gray and labels": (BINARY, LABELS, "gray levels, 0 to 255, 11 of 12", None),
    "gray and few votes": (GRADED, gray(OBJECT * 42), "gray levels, 0 to 255, 12 of 12", OBJECT * 42),
    "0 and 1": (ONES, gray(OBJECT * 0), "values 0 and 1, scaled to 0 and 255, 12 of 12", OBJECT * 0),
    "0 and 1, and 0 and 255": (ONES, BINARY, "values 0 and 1, scaled to 0 and 255, 11 of 12", OBJECT * 255),
    "0 and 1, and graded": (ONES, GRADED, "values 0 and 1, scaled to 0 and 255, 11 of 12", None),
    "cut-outs": (CUTOUT, cutout(20), "alpha channel of RGBA cut-outs, 12 of 12", OBJECT * 255),
    "cut-outs and 0 and 255": (CUTOUT, BINARY, "alpha channel of RGBA cut-outs, 11 of 12", OBJECT * 255),
    "cut-outs, one opaque": (CUTOUT, cutout(20, OBJECT * 0 + 255), "alpha channel", OBJECT * 0 + 255),
    "cut-outs and a photograph": (CUTOUT, Image.fromarray(photo(*SHAPE)), "alpha channel", None),
    "16 bits": (
        Image.fromarray(OBJECT.astype(np.uint16) * 65535), Image.fromarray(OBJECT.astype(np.uint16) * 700),
        "gray levels, 0 to 255, 12 of 12", OBJECT * 3,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SETS)
def test_one_rule_for_a_set(name, tmp_path, monkeypatch):
    """The cache, the stored cache and streaming agree; the evaluation of the same masks too."""
    most, other, line, expected = SETS[name]
    images, masks = make_folders(tmp_path, 12)
    for k in range(12):
        save(other if k == 5 else most, masks / f"p{k:03d}.png")
    data, log, _ = open_folders(images, masks)
    assert f"masks: {line}" in log
    skipped = [entry.split()[0] for entry in data.report.unusable]
    assert skipped == ([] if expected is not None else ["p005.png"])
    _, again, _ = open_folders(images, masks)
    assert "cache: read from" in again and f"masks: {line}" in again
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    streamed = open_folders(images, masks).data
    for one, other in zip(*(batches.validation_batches(d.train, batch_size=1) for d in (data, streamed)), strict=True):
        assert (one.y == other.y).all()
    report = check_pairs(pair_folders(images, masks), 32)
    if expected is not None:
        np.testing.assert_array_equal(read_mask(masks / "p005.png", report.rule), expected)
    else:
        with pytest.raises(BadFile):
            read_mask(masks / "p005.png", report.rule)


@pytest.mark.parametrize("name", ["labels", "labels by palette", "VOC by palette", "labels and a border of 255"])
def test_a_set_of_label_maps_is_refused(name, tmp_path):
    images, masks = make_folders(tmp_path, 4)
    for k in range(4):
        save(CASES[name][0], masks / f"p{k:03d}.png")
    with pytest.raises(DataError, match=r"masks: 4 of 4 are label maps \(0, 1?[15], (2|255)\)"):
        open_folders(images, masks)


ODD = {  # masks of a set -> what the report warns of
    "white": (gray(np.full(SHAPE, 255)), "4 masks are all object, without background: p000.png"),
    "inverted": (gray(~OBJECT * 255), "4 masks are object along most of the border: object and background seem"),
    "trimaps": (CASES["trimap"][0], "4 masks are trimaps (0, 128, 255)"),
    "few pixels": (gray(np.arange(4800).reshape(SHAPE) == 81) , "4 masks are empty at training size"),
}  # fmt: skip


@pytest.mark.parametrize("name", ODD)
def test_odd_masks_are_counted_and_named(name, tmp_path):
    images, masks = make_folders(tmp_path, 4)
    for k in range(4):
        save(ODD[name][0], masks / f"p{k:03d}.png")
    assert f"warning: {ODD[name][1]}" in open_folders(images, masks).log


@pytest.mark.parametrize("proof", [False, True])
def test_masks_drawn_on_the_image_as_stored(proof, tmp_path, monkeypatch):
    """Turned by 180 degrees no shape tells; another pair of the set, turned by 90, does."""
    images, masks = make_folders(tmp_path, 4)
    for k, orientation in enumerate((3, 3, 1, 6 if proof else 3)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.open(images / f"p{k:03d}.png").save(images / f"p{k:03d}.png", exif=exif)
    data, log, _ = open_folders(images, masks)
    assert "warning: 3 images have an EXIF orientation, but their masks do not" in log
    assert ("as stored, as other pairs show" in log) == proof
    expected = disc(*SHAPE)[::-1, ::-1] if proof else disc(*SHAPE)
    np.testing.assert_array_equal(data.train.cache.masks[0], rescale_mask(expected, 32))
    monkeypatch.setattr(batches, "available_memory", lambda: 0)
    streamed = open_folders(images, masks).data
    for one, other in zip(*(batches.validation_batches(d.train, batch_size=1) for d in (data, streamed)), strict=True):
        assert (one.y == other.y).all()


def test_the_one_pair_is_for_validation(tmp_path):
    images, masks = make_folders(tmp_path, 1)
    stem = next(f"x{k}" for k in range(999) if is_validation(pair_folders(images, masks)[0]._replace(stem=f"x{k}")))
    for folder in (images, masks):
        (folder / "p000.png").rename(folder / f"{stem}.png")
    with pytest.raises(DataError, match=r"0 usable training pairs, .*; 1 are for validation, by a hash of their names"):
        open_folders(images, masks)


# ------------------------------------------------------------------------------------------------------ evaluation


def scores(pred: Path, gt: Path, tmp_path: Path) -> dict:
    assert evaluate(EvalConfig(pred=(str(pred),), gt=(str(gt),), json=str(tmp_path / "s.json"))) == 0
    return json.loads((tmp_path / "s.json").read_text())[0]


@pytest.mark.parametrize("kind", ["graded", "jpeg", "16 bits", "0 and 1"])
def test_masks_are_object_above_128(kind, tmp_path, capsys):
    """Whatever the kind of file, the scores are those of the binary masks."""
    pred, gt = make_set(tmp_path, 5, (60, 80), seed=1)
    expected = scores(pred, gt, tmp_path)
    for path in gt.iterdir():
        mask = np.asarray(Image.open(path))
        if kind == "graded":
            gray(np.where(mask, 191, 106 * LEFT)).save(path)
        elif kind == "jpeg":
            gray(mask).save(path, "JPEG", quality=90)
        else:
            Image.fromarray(mask.astype(np.uint16) * 257 if kind == "16 bits" else mask // 255).save(path)
    assert scores(pred, gt, tmp_path) == expected
    assert ("values 0 and 1, scaled to 0 and 255, 5 of 5" in capsys.readouterr().out) == (kind == "0 and 1")


def test_scores_of_any_size_are_in_0_1(tmp_path):
    pred, gt = (tmp_path / name for name in ("maps", "masks"))
    for folder in (pred, gt):
        folder.mkdir()
    for height, width in ((1, 1), (1, 2), (2, 1), (3, 3), (1, 9)):
        gray(np.full((height, width), 200)).save(pred / f"{height}x{width}.png")
        gray(np.arange(height * width).reshape(height, width) % 2 * 255).save(gt / f"{height}x{width}.png")
    got = scores(pred, gt, tmp_path)
    assert all(0 <= value <= 1 for key, value in got.items() if key not in ("name", "n", "by_size")), got


def test_other_entries_are_named_and_maps_of_0_and_1_get_a_hint(tmp_path, capsys):
    pred, gt = make_set(tmp_path, 3, SHAPE)
    (gt / "Thumbs.db").write_bytes(b"x")
    (pred / "old").mkdir()
    scores(pred, gt, tmp_path)
    out = capsys.readouterr().out
    assert "2 entries of other types, ignored: Thumbs.db, old (a folder)" in out and "no map value exceeds" not in out
    for path in pred.glob("*.png"):
        gray(np.asarray(Image.open(path)) > 128).save(path)
    scores(pred, gt, tmp_path)
    assert "no map value exceeds 1 of 255" in capsys.readouterr().out


# ----------------------------------------------------------------------------------------------------- photographs


@pytest.mark.parametrize("bits", [10, 12, 14, 16])
def test_bits_in_16_bit_files_are_read_at_full_range(bits, tmp_path):
    pixels, scale = photo(*SHAPE), (2**bits - 1) / 255
    wide = np.rint(pixels * scale).astype(np.uint16)
    wide[0, 0] = 2**bits - 1
    rows = np.pad(wide.astype(">u2").view(np.uint8).reshape(SHAPE[0], -1), ((0, 0), (1, 0))).tobytes()
    (tmp_path / "rgb.png").write_bytes(png(SHAPE[::-1], 16, 2, rows))
    (tmp_path / "little.tif").write_bytes(tiff(wide, photometric="rgb"))
    (tmp_path / "big.tif").write_bytes(tiff(wide, photometric="rgb", byteorder=">"))
    Image.fromarray(wide[..., 1]).save(tmp_path / "gray.png")
    for name in ("rgb.png", "little.tif", "big.tif", "gray.png"):
        got = read_image(tmp_path / name).astype(int)
        expected = pixels if name != "gray.png" else pixels[..., 1:2]
        assert np.abs(got - expected)[1:].max() <= 1, name


def test_a_large_profile_and_xmp_are_read_and_not_passed_on(tmp_path, monkeypatch):
    small = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    profile = small + np.random.default_rng(0).bytes(1_500_000)
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<x/>" * 500_000, zip=True)
    Image.fromarray(photo(*SHAPE)).save(tmp_path / "a.png", icc_profile=profile, pnginfo=text)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), photo(*SHAPE))
    source = Source(tmp_path / "a.png", Path("a"))
    outputs = {source: {"cutout": tmp_path / "cut.png"}}
    assert write((source, np.ones(SHAPE, np.float32), SHAPE), outputs, PredictConfig()) is None
    monkeypatch.setattr(PngImagePlugin, "MAX_TEXT_CHUNK", 1 << 20)  # Pillow's own, in the programs of others
    assert np.asarray(Image.open(tmp_path / "cut.png")).shape == (*SHAPE, 4)


def test_linked_folders_brackets_and_jfif_are_found(tmp_path):
    for folder in ("trip[1]", "away"):
        (tmp_path / folder).mkdir()
        Image.fromarray(photo(*SHAPE)).save(tmp_path / folder / "a.jfif", "JPEG")
    (tmp_path / "trip[1]" / "day2").symlink_to(tmp_path / "away", target_is_directory=True)
    (tmp_path / "away" / "circle").symlink_to(tmp_path / "trip[1]", target_is_directory=True)
    found, others, _ = find_images([str(tmp_path / "trip[1]")])
    assert sorted(str(source.name) for source in found) == ["a", "day2/a"] and others == []
    found, *_ = find_images([str(tmp_path / "trip[1]" / "*.jfif")])
    assert [str(source.name) for source in found] == ["a"]
    images, masks = make_folders(tmp_path / "set", 1)
    Image.fromarray(photo(*SHAPE)).save(images / "b.jpe", "JPEG")
    BINARY.save(masks / "b.png")
    assert [pair.image.name for pair in pair_folders(images, masks)] == ["b.jpe", "p000.png"]


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
    inside, most = [], []

    def work(megapixels: int) -> None:
        with decode_budget((megapixels << 20) - 1):
            inside.append(megapixels)
            most.append(sum(inside))
            time.sleep(0.002)
            inside.remove(megapixels)

    with ThreadPoolExecutor(40) as pool:
        list(pool.map(work, [1 + 13 * k % DECODE_LIMIT for k in range(40)]))
    assert len(most) == 40 and DECODE_LIMIT / 2 < max(most) <= DECODE_LIMIT
    with pytest.raises(KeyError), decode_budget(10 << 20):
        raise KeyError
    with decode_budget(999 << 20):  # above the limit, but alone
        pass
