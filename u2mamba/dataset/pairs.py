"""Pairs of image and mask: find them in two folders, read them, look at every one once before training.

What cannot be used is set aside and named in the `Report`; nothing here stops at one bad file. How a single file is
read stands in u2mamba.dataset.decode.py.
"""

from __future__ import annotations

import contextlib
import os
import time
import unicodedata
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from u2mamba.dataset.decode import (
    NOISE_BELOW,
    ROOM,
    BadFile,
    DataError,
    as_mask,
    decode,
    grey,
    opened,
    printable,
    read_image,
    read_map,
    read_mask,
    rgb,
    scale_mask,
    turn,
)

__all__ = [
    "BadFile", "DataError", "Pair", "Reading", "Report", "Unpaired", "check_pairs", "find_pairs", "hold_out",
    "is_held_out", "pair_names", "read_image", "read_map", "read_mask", "read_pair", "reading", "scale_mask",
]  # fmt: skip

ASPECT_TOLERANCE = 0.01  # a mask of another size is used when its aspect ratio is within 1 % of the image's
HOLD_OUT = 20  # one pair of 20 is held out of training
MIRROR_SUFFIX = "_mirror"  # what prepare_duts.py appends to the name of a mirrored copy
IMAGE_TYPES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")  # the first one found is taken
MAP_TYPES = (".npy", ".tif", ".tiff", ".png", ".bmp", ".webp", ".jpg", ".jpeg")  # saved maps, the most exact first
MASK_TYPES = (".png", ".bmp", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")  # lossless ones first


class Pair(NamedTuple):
    """An image, its mask, and the file stem that they share."""

    stem: str
    image: Path
    mask: Path


class Unpaired(NamedTuple):
    """File names that take no part: without a partner; one of several with the same stem (the better type wins); of a
    type that is not read, or no files at all (folders, pipes and broken links)."""

    images: list[str]
    masks: list[str]
    duplicates: list[str]
    others: list[str]


# ---------------------------------------------------------------------------------------------------- reading


class Reading(NamedTuple):
    """One decoded pair: image (H, W, 3) uint8, mask (h, w) uint8, and what the report counts."""

    image: np.ndarray
    mask: np.ndarray
    low: int  # the mask file's own range of values
    high: int
    noise: bool
    resized: bool


@contextlib.contextmanager
def reading(pair: Pair) -> Iterator[Reading]:
    """`read_pair` for many threads: of large pictures, only some are in memory before the others leave the block."""
    with contextlib.ExitStack() as held:
        with opened(pair.image) as image_file, opened(pair.mask) as mask_file:
            pixels = image_file.width * image_file.height + mask_file.width * mask_file.height
            held.enter_context(ROOM.take(pixels))
            image, orientation = decode(pair.image, image_file, rgb)
            light, mask_orientation = decode(pair.mask, mask_file, grey)
        (height, width), (rows, columns) = image.shape[:2], light.shape
        if orientation >= 5 and mask_orientation == 1 and (rows, columns) == (width, height) != (height, width):
            light = np.ascontiguousarray(turn(light, orientation))
            rows, columns = light.shape
        resized = (rows, columns) != (height, width)
        if resized and abs(columns * height / (rows * width) - 1) > ASPECT_TOLERANCE:
            raise BadFile(pair.mask, f"mask is {columns}x{rows}, its image {width}x{height}")
        mask, noise = as_mask(pair.mask, light)
        yield Reading(image, mask, int(light.min()), int(light.max()), noise, resized)


def read_pair(pair: Pair) -> Reading:
    """Decode a pair; a mask without EXIF tag that was drawn on the unturned image is turned with it.

    Raises BadFile for a file that cannot be read and for a mask whose aspect ratio is not the image's.
    """
    with reading(pair) as got:
        return got


# ---------------------------------------------------------------------------------------------------- finding


def pair_names(
    images: Iterable[str], masks: Iterable[str], image_types: tuple[str, ...] = IMAGE_TYPES
) -> tuple[list[tuple[str, str, str]], Unpaired]:
    """File names -> sorted [(stem, image name, mask name)] and the names left over.

    Stems are compared in Unicode's composed form, so that a list made on macOS orders and holds out like any other.
    """

    others: list[str] = []

    def by_stem(names: Iterable[str], types: tuple[str, ...]) -> tuple[dict[str, str], list[str]]:
        found: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for name in names:
            stem, extension = os.path.splitext(name)
            if name.startswith("."):
                continue
            if extension.lower() in types:
                found[unicodedata.normalize("NFC", stem)].append((types.index(extension.lower()), name))
            else:
                others.append(name)
        ordered = {stem: sorted(several) for stem, several in found.items()}
        return (
            {stem: several[0][1] for stem, several in ordered.items()},
            [f"{name} ({several[0][1]} is taken)" for several in ordered.values() for _, name in several[1:]],
        )

    image_of, image_doubles = by_stem(images, image_types)
    mask_of, mask_doubles = by_stem(masks, MASK_TYPES)
    paired = [(stem, image_of[stem], mask_of[stem]) for stem in sorted(image_of.keys() & mask_of.keys())]
    return paired, Unpaired(
        sorted(image_of[stem] for stem in image_of.keys() - mask_of.keys()),
        sorted(mask_of[stem] for stem in mask_of.keys() - image_of.keys()),
        sorted(image_doubles + mask_doubles),
        sorted(others),
    )


def is_file(entry: os.DirEntry) -> bool:
    """Whether a folder's entry is a regular file or leads to one; a link that leads in a circle does not."""
    try:
        return entry.is_file()
    except OSError:
        return False


def find_pairs(image_dir: str | os.PathLike, mask_dir: str | os.PathLike) -> tuple[list[Pair], Unpaired]:
    """Pairs of the two folders by file stem, in an order that is the same on all systems, and what has no partner.

    Raises DataError when a folder is missing or there is no pair at all.
    """
    image_dir, mask_dir = Path(image_dir), Path(mask_dir)
    names, odd = [], []
    for folder, what, constant in ((image_dir, "image", "tra_image_dir"), (mask_dir, "mask", "tra_label_dir")):
        try:
            with os.scandir(folder) as entries:
                kinds = {entry.name: is_file(entry) for entry in entries}
        except OSError as error:
            raise DataError(f"{what} folder {folder}: {error.strerror}; set {constant}") from None
        names.append([name for name, regular in kinds.items() if regular])
        for name in (n for n, regular in kinds.items() if not regular and not n.startswith(".")):
            odd.append(f"{name} ({'a folder' if (folder / name).is_dir() else 'not a regular file'})")
    if image_dir.resolve() == mask_dir.resolve():
        raise DataError(
            f"images and masks are both looked for in {image_dir}; set tra_image_dir and tra_label_dir to two folders"
        )
    paired, unpaired = pair_names(*names)
    unpaired.others.extend(sorted(odd))
    if not paired:
        sides = ((len(unpaired.images), "images", image_dir), (len(unpaired.masks), "masks", mask_dir))
        what = ", ".join(f"{count} {kind} in {folder}" for count, kind, folder in sides)
        if unpaired.images and unpaired.masks:
            what += f", and no image has a mask of the same name ({unpaired.images[0]}, {unpaired.masks[0]}, ...)"
        if unpaired.others:
            what += f"; not read: {some_of(unpaired.others)}"
        raise DataError(f"no pairs: {what}")
    return [Pair(stem, image_dir / image, mask_dir / mask) for stem, image, mask in paired], unpaired


def is_held_out(stem: str) -> bool:
    """Whether a pair is for validation; a mirrored copy goes where its original goes, or validation would be leaked."""
    return zlib.crc32(stem.removesuffix(MIRROR_SUFFIX).encode(errors="surrogateescape")) % HOLD_OUT == 0


def hold_out(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs); by name alone, so that figures compare across runs and machines."""
    return [p for p in pairs if not is_held_out(p.stem)], [p for p in pairs if is_held_out(p.stem)]


# --------------------------------------------------------------------------------------------------- checking


def some_of(names: Sequence[str], most: int = 5) -> str:
    """The first few of many names, and how many more there are."""
    return ", ".join(map(printable, names[:most])) + (f" and {len(names) - most:,} more" if len(names) > most else "")


@dataclass
class Report:
    """What the check found. Set aside: unpaired and bad files. Used all the same: everything below them."""

    pairs: int = 0  # usable
    unpaired_images: list[str] = field(default_factory=list)
    unpaired_masks: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)  # of other types, or no files; not counted as set aside
    bad: list[tuple[str, str]] = field(default_factory=list)  # (file name, reason)
    resized: list[str] = field(default_factory=list)  # masks of another size than their image
    noise: list[str] = field(default_factory=list)  # masks taken for empty
    grey: int = 0  # masks of which a fifth or more is neither object nor ground
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
            (self.others, "of another type, not read"),
            ([f"{name} ({reason})" for name, reason in self.bad], "pairs that cannot be read or do not fit, set aside"),
            (self.resized, "masks of another size than their image, same shape, used"),
            (self.noise, f"masks never brighter than {NOISE_BELOW - 1}, taken for empty"),
        ):
            if names:
                out.append(f"data: {len(names):,} {what}: {some_of(names)}")
        if 2 * self.grey > self.pairs:
            out.append(f"data: warning: {self.grey:,} masks are grey pictures: have the two folders changed places?")
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
    report = Report(0, *map(list, unpaired or ()))
    good: list[int] = []

    def visit(index: int) -> tuple[int, int, bool, bool, bool, bool, bool] | BadFile:
        try:
            with reading(pairs[index]) as got:
                if keep:
                    keep(index, got.image, got.mask)
                grey = ((got.mask > 63) & (got.mask < 192)).mean() > 0.2
                return got.low, got.high, got.noise, got.resized, not got.mask.any(), not got.image.any(), bool(grey)
        except BadFile as error:
            return error
        except MemoryError:
            return BadFile(pairs[index].image, "does not fit into memory")

    pool = ThreadPoolExecutor(threads or min(32, os.cpu_count() or 1))
    try:
        started = spoken = time.monotonic()
        for index, result in enumerate(pool.map(visit, range(len(pairs)))):
            if isinstance(result, BadFile):
                report.bad.append((result.path.name, result.reason))
                continue
            low, high, noise, resized, empty, black, grey = result
            good.append(index)
            report.mask_low, report.mask_high = min(report.mask_low, low), max(report.mask_high, high)
            report.empty, report.black = report.empty + empty, report.black + black
            report.grey += grey
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
