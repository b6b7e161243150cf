"""Pairs of an image and its mask: found in two folders by name, split into training and validation."""

from __future__ import annotations

import os
import unicodedata
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from u2mamba.dataset.decode import Pair
from u2mamba.dataset.image_file import DataError, printable

VAL_EVERY = 20  # one pair of 20 is for validation
MIRROR_SUFFIX = "_mirror"  # appended by prepare_duts.py to the name of a flipped copy
JPEG_TYPES = (".jpg", ".jpeg", ".jpe", ".jfif")
IMAGE_TYPES = (*JPEG_TYPES, ".png", ".webp", ".bmp", ".tif", ".tiff")  # the first type found is used
MAP_TYPES = (".npy", ".tif", ".tiff", ".png", ".bmp", ".webp", *JPEG_TYPES)  # saved maps, the most precise first
MASK_TYPES = (".png", ".bmp", ".tif", ".tiff", ".webp", *JPEG_TYPES)  # lossless types first
DATA_HELP = """\
  DUTS-TR (10,553 pairs, 0.3 GB): download DUTS-TR.zip from http://saliencydetection.net/duts/, then
    python train_data/prepare_duts.py DUTS-TR.zip
  your own pairs: images and masks with the same file names in two folders, then
    python u2mamba_train.py PRESET --data_dir FOLDER --tra_image_dir images --tra_label_dir masks
  (preset finetune starts from the included weights and needs few pairs; fast and small train from scratch)
  no data yet: generate a small synthetic dataset and train on it, in minutes
    python u2mamba_train.py demo"""

SETTINGS_FILE = "settings.json"  # that prediction writes beside its maps


def truncate_list(names: Sequence[str], limit: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - limit:,} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + more


class PairList(list[Pair]):
    """A list of pairs; `skipped` counts the files without a partner."""

    skipped = 0


def pair_names(
    images: Iterable[str],
    masks: Iterable[str],
    folders: tuple[object, object],
    log: Callable[[str], None] = print,
    types: tuple[str, ...] = IMAGE_TYPES,
    irregular: Sequence[str] = (),
) -> tuple[list[tuple[str, str, str]], int]:
    """File names -> sorted [(stem, image name, mask name)] and the number of files without a partner; prints which.

    folders: of the images and the masks, for messages. types: IMAGE_TYPES or MAP_TYPES. irregular: entries that are
    not regular files. Stems are compared in Unicode NFC, so that names written by macOS sort and split like any others.
    Raises DataError if there are no pairs.
    """
    kind, a_kind = ("image", "an image") if types is IMAGE_TYPES else ("map", "a map")
    duplicates, others = [], []

    def by_stem(names: Iterable[str], types: tuple[str, ...]) -> dict[str, str]:
        ranked, best = [], {}
        for name in names:
            stem, extension = os.path.splitext(name)
            if extension.lower() in types:
                ranked.append((types.index(extension.lower()), name, unicodedata.normalize("NFC", stem)))
            else:
                others.append(name)
        for _, name, stem in sorted(ranked):
            if best.setdefault(stem, name) != name:
                duplicates.append(f"{name} ({best[stem]} is used)")
        return best

    image_of, mask_of = by_stem(images, types), by_stem(masks, MASK_TYPES)
    left_images = sorted(image_of[stem] for stem in image_of.keys() - mask_of.keys())
    left_masks = sorted(mask_of[stem] for stem in mask_of.keys() - image_of.keys())
    stems = sorted(image_of.keys() & mask_of.keys())
    others = [*sorted(others), *irregular]
    if not stems:
        message = f"no pairs: {len(left_images)} {kind}s in {folders[0]}, {len(left_masks)} masks in {folders[1]}"
        if left_images and left_masks:
            message += f", and no {kind} has a mask of the same name ({left_images[0]}, {left_masks[0]}, ...)"
        same = {"".join(os.path.splitext(name)[0].lower().split()): name for name in left_masks}
        for name in left_images:
            if mask := same.get("".join(os.path.splitext(name)[0].lower().split())):
                message += f": {name!r} and {mask!r} differ only in case or spaces"
                break
        raise DataError(message + (f"; ignored: {truncate_list(others)}" if others else ""))
    for names, what in (
        (left_images, f"{kind}s without a mask"),
        (left_masks, f"masks without {a_kind}"),
        (sorted(duplicates), "files with a duplicate name"),
    ):
        if names:
            log(f"warning: skipped {len(names):,} {what}: {truncate_list(names)}")
    if others:
        log(f"data: {len(others):,} entries of other types, ignored: {truncate_list(others)}")
    skipped = len(left_images) + len(left_masks) + len(duplicates)
    return [(stem, image_of[stem], mask_of[stem]) for stem in stems], skipped


def pair_folders(
    image_dir: str | os.PathLike,
    mask_dir: str | os.PathLike,
    log: Callable[[str], None] = print,
    options: tuple[str, str] = ("tra_image_dir", "tra_label_dir"),
    types: tuple[str, ...] = IMAGE_TYPES,
) -> PairList:
    """Pairs of two folders by file stem, in the same order on every system; see `pair_names`.

    options: names of the options that set the folders, for messages. Raises DataError if a folder is missing or there
    are no pairs.
    """
    image_dir, mask_dir = folders = Path(image_dir), Path(mask_dir)
    files, irregular = [], []
    for folder, option in zip(folders, options, strict=True):
        try:
            names = [name for name in sorted(os.listdir(folder)) if not name.startswith(".") and name != SETTINGS_FILE]
        except OSError as error:
            raise DataError(f"folder {folder.absolute()}: {error.strerror}; set {option}") from None
        files.append([name for name in names if os.path.isfile(folder / name)])
        others = [name for name in names if not os.path.isfile(folder / name)]
        irregular += [f"{name} ({'a folder' if (folder / name).is_dir() else 'not a regular file'})" for name in others]
    if image_dir.resolve() == mask_dir.resolve():
        kind = "image" if types is IMAGE_TYPES else "map"
        raise DataError(f"{image_dir} is used for {kind}s and masks; set {' and '.join(options)} to two folders")
    paired, skipped = pair_names(*files, folders, log, types, irregular)
    pairs = PairList(Pair(stem, image_dir / image, mask_dir / mask) for stem, image, mask in paired)
    pairs.skipped = skipped
    return pairs


def find_pairs(cfg, log: Callable[[str], None] = print) -> PairList:
    """The pairs of a run, in tra_image_dir and tra_label_dir. If val_image_dir and val_label_dir are set: theirs too,
    and each pair's `split`. Relative folders are below data_dir. Raises DataError."""
    images, masks = Path(cfg.data_dir, cfg.tra_image_dir), Path(cfg.data_dir, cfg.tra_label_dir)
    if not images.is_dir() and not masks.is_dir():
        raise DataError(f"data_dir and tra_image_dir: there is no folder {images.absolute()}\n{DATA_HELP}")
    pairs = pair_folders(images, masks, log)
    if bool(cfg.val_image_dir) != bool(cfg.val_label_dir):
        raise DataError("val_image_dir and val_label_dir: set both, or neither")
    if not cfg.val_image_dir:
        return pairs
    options = "val_image_dir", "val_label_dir"
    val = pair_folders(*(Path(cfg.data_dir, getattr(cfg, option)) for option in options), log, options)
    both = PairList([p._replace(split="train") for p in pairs] + [p._replace(split="val") for p in val])
    both.skipped = pairs.skipped + val.skipped
    return both


def is_validation(pair: Pair) -> bool:
    """Whether a pair is for validation: by its folder, else by a hash of its name, so that scores of several runs and
    machines are comparable. A flipped copy goes with its original; otherwise it would leak into the other split."""
    name = pair.stem.removesuffix(MIRROR_SUFFIX).encode(errors="surrogateescape")
    return pair.split == "val" if pair.split else zlib.crc32(name) % VAL_EVERY == 0


def train_val_split(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """(training pairs, validation pairs)."""
    return [p for p in pairs if not is_validation(p)], [p for p in pairs if is_validation(p)]
