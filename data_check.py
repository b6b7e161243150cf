"""Image and mask files: find the pairs, read any kind of file right, look at every pair once before training.

A mask comes out as bytes, 0 background to 255 object, whatever the file holds; an image as RGB bytes, turned the way
its EXIF tag says. What cannot be used is set aside and named in the `Report`; nothing here stops at one bad file.
"""

from __future__ import annotations

import os
import time
import unicodedata
import warnings
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError
from skimage.color import lab2rgb

from engine.run import UserError

MAX_PIXELS = 178_956_970  # an image that declares more is refused unread; 0.5 GB of RGB, Pillow's own limit
NOISE_BELOW = 64  # a mask of many values that never gets this bright is compression noise on an empty mask
ASPECT_TOLERANCE = 0.01  # a mask of another size is used when its aspect ratio is within 1 % of the image's
HOLD_OUT = 20  # one pair of 20 is held out of training
MIRROR_SUFFIX = "_mirror"  # what prepare_duts.py appends to the name of a mirrored copy
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # the first one found is taken
MASK_TYPES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")  # lossless ones first

# Pillow's remarks on odd metadata and on images of 90-179 million pixels, which we read: nothing a user can act on.
warnings.filterwarnings("ignore", module=r"PIL\.")


class DataError(UserError):
    """The data cannot be trained on; the message is the one line to print (exit code 2)."""


class BadFile(DataError):
    """One file that cannot be used. `path`: the file, `reason`: why, in words."""

    def __init__(self, path: str | os.PathLike, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = Path(path), reason

    def __reduce__(self):  # a worker process hands it over; the default would call BadFile(message)
        return BadFile, (self.path, self.reason)


class Pair(NamedTuple):
    """An image, its mask, and the file stem that they share."""

    stem: str
    image: Path
    mask: Path


class Unpaired(NamedTuple):
    """File names that take no part: without a partner, or one of several with the same stem (the better type wins)."""

    images: list[str]
    masks: list[str]
    duplicates: list[str]
    other_types: list[str]  # files that are no image of a type that is read


# ---------------------------------------------------------------------------------------------------- reading


def turn(array: np.ndarray, orientation: int) -> np.ndarray:
    """(H, W, ...) as stored -> as seen, for the values 1-8 of EXIF tag 0x0112; others leave it as it is."""
    if orientation >= 5:  # stored with rows and columns exchanged
        array = array.swapaxes(0, 1)
    if orientation in (3, 4, 7, 8):
        array = array[::-1]
    if orientation in (2, 3, 6, 7):
        array = array[:, ::-1]
    return array


def _orientation(file: Image.Image) -> int:
    try:
        return int(file.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def _to_bytes(file: Image.Image) -> np.ndarray:
    """Modes I, I;16* and F -> uint8, by the smallest of 1 (floats only), 255, 65535 and the maximum that holds all."""
    values = np.nan_to_num(np.asarray(file, np.float64), posinf=0, neginf=0).clip(min=0)
    largest = values.max()
    scales = (1, 255, 65535) if file.mode == "F" else (255, 65535)
    return np.rint(values * (255 / next((s for s in scales if largest <= s), largest))).astype(np.uint8)


def _has_alpha(file: Image.Image) -> bool:
    return file.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in file.info


def _rgb(file: Image.Image) -> np.ndarray:
    if file.mode == "F" or file.mode.startswith("I"):
        return np.repeat(_to_bytes(file)[..., None], 3, axis=2)
    if file.mode == "LAB":  # Pillow has no conversion; it stores L as 0-255 and a, b with 128 added
        lab = np.asarray(file, np.float64)
        return np.rint(lab2rgb(np.dstack([lab[..., 0] / 2.55, lab[..., 1:] - 128])) * 255).astype(np.uint8)
    if _has_alpha(file):  # on white, as a page shows it: what lies under transparent pixels is often arbitrary
        rgba = file.convert("RGBA")
        return np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB"))
    return np.asarray(file.convert("RGB"))


def _grey(file: Image.Image) -> np.ndarray:
    if file.mode == "F" or file.mode.startswith("I"):
        return _to_bytes(file)
    if file.mode == "LAB":
        return np.asarray(file)[..., 0]
    if _has_alpha(file):  # on black; a mask of one colour, drawn in its alpha alone, is its alpha
        light, alpha = (np.asarray(band) for band in file.convert("RGBA").convert("LA").split())
        drawn_in_alpha = light.min() == light.max() and alpha.min() < alpha.max()
        return alpha if drawn_in_alpha else np.rint(light * (alpha / 255.0)).astype(np.uint8)
    return np.asarray(file.convert("L" if file.mode in ("1", "L", "P", "RGB") else "RGB").convert("L"))


def _read(path: str | os.PathLike, convert: Callable[[Image.Image], np.ndarray]) -> tuple[np.ndarray, int]:
    """First frame of a file as an upright array, and the orientation that the file was stored in."""
    try:
        with Image.open(path) as file:
            width, height = file.size
            if width * height > MAX_PIXELS:
                raise BadFile(path, f"declares {width}x{height} pixels, more than MAX_PIXELS = {MAX_PIXELS:,}")
            orientation = _orientation(file)
            file.load()
            # Pillow turns TIFFs itself while loading, and takes the tag out
            turned = orientation != 1 and _orientation(file) == 1
            array = convert(file)
            return np.ascontiguousarray(array if turned else turn(array, orientation)), orientation
    except BadFile:
        raise
    except UnidentifiedImageError:
        size = os.path.getsize(path)
        raise BadFile(path, f"not an image that Pillow knows ({size:,} bytes)" if size else "empty file") from None
    except Image.DecompressionBombError:
        raise BadFile(path, f"declares more than {MAX_PIXELS:,} pixels") from None
    except MemoryError:
        raise BadFile(path, "does not fit into memory") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error, ...
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
        raise BadFile(path, reason.splitlines()[0]) from None


def scale_mask(grey: np.ndarray) -> tuple[np.ndarray, bool]:
    """Luminance (H, W) uint8 -> (mask uint8 with the object at 255, whether it was taken for noise on an empty mask).

    Values 0 and 1, or 0 and any one value, become 0 and 255; other masks are divided by their maximum. The published
    code does that to every mask and so turns the compression noise of an empty one (values of 1 to 5) into foreground.
    """
    levels = np.flatnonzero(np.bincount(grey.ravel(), minlength=256))
    top = int(levels[-1])
    if top in (0, 255):
        return grey, False
    if top == 1 or (len(levels) == 2 and levels[0] == 0):
        return np.where(grey == top, np.uint8(255), np.uint8(0)), False
    if top < NOISE_BELOW:
        return np.zeros_like(grey), True
    return np.rint(np.arange(256) * 255 / top).clip(max=255).astype(np.uint8)[grey], False


def read_image(path: str | os.PathLike) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright: transparency on white, 16-bit and float as bytes, of an animation the first frame.

    Raises BadFile.
    """
    return _read(path, _rgb)[0]


def read_mask(path: str | os.PathLike) -> np.ndarray:
    """(H, W) uint8, 0 background to 255 object (`scale_mask` of the luminance), upright. Raises BadFile."""
    return scale_mask(_read(path, _grey)[0])[0]


class Reading(NamedTuple):
    """One decoded pair: image (H, W, 3) uint8, mask (h, w) uint8, and what the report counts."""

    image: np.ndarray
    mask: np.ndarray
    low: int  # the mask file's own range of values
    high: int
    noise: bool
    resized: bool


def read_pair(pair: Pair) -> Reading:
    """Decode a pair; a mask without EXIF tag that was drawn on the unturned image is turned with it.

    Raises BadFile for a file that cannot be read and for a mask whose aspect ratio is not the image's.
    """
    image, orientation = _read(pair.image, _rgb)
    grey, mask_orientation = _read(pair.mask, _grey)
    (height, width), (rows, columns) = image.shape[:2], grey.shape
    if orientation >= 5 and mask_orientation == 1 and (rows, columns) == (width, height) != (height, width):
        grey = np.ascontiguousarray(turn(grey, orientation))
        rows, columns = grey.shape
    resized = (rows, columns) != (height, width)
    if resized and abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
        raise BadFile(pair.mask, f"mask is {columns}x{rows}, its image {width}x{height}")
    mask, noise = scale_mask(grey)
    return Reading(image, mask, int(grey.min()), int(grey.max()), noise, resized)


# ---------------------------------------------------------------------------------------------------- finding


def pair_names(images: Iterable[str], masks: Iterable[str]) -> tuple[list[tuple[str, str, str]], Unpaired]:
    """File names -> sorted [(stem, image name, mask name)] and the names left over.

    Stems are compared in Unicode's composed form, so that a list made on macOS orders and holds out like any other.
    """

    def by_stem(names: Iterable[str], types: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
        found: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in names:
            stem, extension = os.path.splitext(name)
            if not name.startswith(".") and extension.lower() in types:
                found[unicodedata.normalize("NFC", stem)].append((types.index(extension.lower()), name))
        ordered = {stem: sorted(several) for stem, several in found.items()}
        return (
            {stem: several[0][1] for stem, several in ordered.items()},
            [f"{name} ({several[0][1]} is taken)" for several in ordered.values() for _, name in several[1:]],
        )

    images, masks = list(images), list(masks)
    image_of, image_doubles = by_stem(images, IMAGE_TYPES)
    mask_of, mask_doubles = by_stem(masks, MASK_TYPES)
    paired = [(stem, image_of[stem], mask_of[stem]) for stem in sorted(image_of.keys() & mask_of.keys())]
    return paired, Unpaired(
        sorted(image_of[stem] for stem in image_of.keys() - mask_of.keys()),
        sorted(mask_of[stem] for stem in mask_of.keys() - image_of.keys()),
        sorted(image_doubles + mask_doubles),
        sorted({name for name in (*images, *masks) if not _is_read(name) and not name.startswith(".")}),
    )


def _is_read(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_TYPES


def find_pairs(image_dir: str | os.PathLike, mask_dir: str | os.PathLike) -> tuple[list[Pair], Unpaired]:
    """Pairs of the two folders by file stem, in an order that is the same on all systems, and what has no partner.

    Raises DataError when a folder is missing or there is no pair at all.
    """
    image_dir, mask_dir = Path(image_dir), Path(mask_dir)
    names = []
    for folder, what, constant in ((image_dir, "image", "tra_image_dir"), (mask_dir, "mask", "tra_label_dir")):
        try:
            with os.scandir(folder) as entries:
                names.append([entry.name for entry in entries if entry.is_file()])
        except OSError as error:
            raise DataError(f"{what} folder {folder}: {error.strerror}; set {constant}") from None
    if image_dir.resolve() == mask_dir.resolve():
        raise DataError(
            f"images and masks are both looked for in {image_dir}; set tra_image_dir and tra_label_dir to two folders"
        )
    paired, unpaired = pair_names(*names)
    if not paired:
        raise DataError(
            f"no pairs: {len(unpaired.images)} images in {image_dir}, {len(unpaired.masks)} masks in {mask_dir}, "
            "and no image has a mask of the same name"
            + (f"; not read for their type: {_some(unpaired.other_types)}" if unpaired.other_types else "")
        )
    return [Pair(stem, image_dir / image, mask_dir / mask) for stem, image, mask in paired], unpaired


def is_held_out(stem: str) -> bool:
    """Whether a pair is for validation; a mirrored copy goes where its original goes, or validation would be leaked."""
    return zlib.crc32(stem.removesuffix(MIRROR_SUFFIX).encode(errors="surrogateescape")) % HOLD_OUT == 0


def hold_out(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs); by name alone, so that figures compare across runs and machines."""
    return [p for p in pairs if not is_held_out(p.stem)], [p for p in pairs if is_held_out(p.stem)]


# --------------------------------------------------------------------------------------------------- checking


def _some(names: Sequence[str], most: int = 5) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@dataclass
class Report:
    """What the check found. Set aside: unpaired and bad files. Used all the same: everything below them."""

    pairs: int = 0  # usable
    unpaired_images: list[str] = field(default_factory=list)
    unpaired_masks: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    other_types: list[str] = field(default_factory=list)  # not counted as set aside: notes, lists, Thumbs.db
    bad: list[tuple[str, str]] = field(default_factory=list)  # (file name, reason)
    resized: list[str] = field(default_factory=list)  # masks of another size than their image
    noise: list[str] = field(default_factory=list)  # masks taken for empty
    mask_low: int = 255
    mask_high: int = 0
    empty: int = 0  # masks without an object, noise included
    black: int = 0  # images without any light

    @property
    def set_aside(self) -> int:
        """Number of files that take no part."""
        return len(self.unpaired_images) + len(self.unpaired_masks) + len(self.duplicates) + len(self.bad)

    def lines(self) -> list[str]:
        """The report as it is printed: one line a finding, none for what was not found."""
        out = [f"data: {self.pairs:,} pairs, mask values {self.mask_low}-{self.mask_high}, {self.empty:,} empty masks"]
        for names, what in (
            (self.unpaired_images, "images without a mask, set aside"),
            (self.unpaired_masks, "masks without an image, set aside"),
            (self.duplicates, "files with the name of another, set aside"),
            (self.other_types, f"files of types that are not read (read are {' '.join(IMAGE_TYPES)})"),
            ([f"{name} ({reason})" for name, reason in self.bad], "pairs that cannot be read or do not fit, set aside"),
            (self.resized, "masks of another size than their image, same shape, used"),
            (self.noise, f"masks never brighter than {NOISE_BELOW - 1}, taken for empty"),
        ):
            if names:
                out.append(f"data: {len(names):,} {what}: {_some(names)}")
        if self.pairs and self.empty == self.pairs:
            out.append("data: warning: no mask holds an object, so there is nothing to learn")
        if self.black:
            out.append(f"data: {self.black:,} images all black, used")
        return out


def check_pairs(
    pairs: Sequence[Pair],
    unpaired: Unpaired | None = None,
    keep: Callable[[int, np.ndarray, np.ndarray], None] | None = None,
    say: Callable[[str], None] | None = None,
    threads: int | None = None,
) -> tuple[list[int], Report]:
    """Decode every pair once and report -> (indices of the usable pairs, report).

    keep(index, image, mask) is called for every usable pair, from several threads: the cache fills itself there, so
    that no file is read twice. Pillow's decoders and the matrix products run outside Python's lock. `say` gets
    a line of progress every ten seconds.
    """
    unpaired = unpaired or Unpaired([], [], [], [])
    report = Report(0, *map(list, unpaired))
    good: list[int] = []

    def visit(index: int) -> tuple[int, int, bool, bool, bool, bool] | BadFile:
        try:
            got = read_pair(pairs[index])
        except BadFile as error:
            return error
        if keep:
            keep(index, got.image, got.mask)
        return got.low, got.high, got.noise, got.resized, not got.mask.any(), not got.image.any()

    pool = ThreadPoolExecutor(threads or min(32, os.cpu_count() or 1))
    try:
        started = spoken = time.monotonic()
        for index, result in enumerate(pool.map(visit, range(len(pairs)))):
            if isinstance(result, BadFile):
                report.bad.append((result.path.name, result.reason))
                continue
            low, high, noise, resized, empty, black = result
            good.append(index)
            report.mask_low, report.mask_high = min(report.mask_low, low), max(report.mask_high, high)
            report.empty, report.black = report.empty + empty, report.black + black
            if noise:
                report.noise.append(pairs[index].mask.name)
            if resized:
                report.resized.append(pairs[index].mask.name)
            now = time.monotonic()
            if say and now - spoken > 10:
                spoken, done = now, index + 1
                say(f"data: {done:,} of {len(pairs):,} pairs read, {done / (now - started):.0f} a second")
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after Ctrl-C too: the files not begun are not read
    report.pairs = len(good)
    return good, report
