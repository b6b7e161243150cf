"""Official DUTS-TR -> the layout that the trainer reads: OUT/DUTS-TR/DUTS-TR/{im_aug,gt_aug}/.

    python train_data/prepare_duts.py DUTS-TR.zip
    python train_data/prepare_duts.py path/to/DUTS-TR --mirror

SOURCE is DUTS-TR.zip as downloaded, or the folder it unpacks to (DUTS-TR-Image and DUTS-TR-Mask, or the folder around
them). Every pair is decoded; one that cannot be read is left out and named. Run it again after an interruption: what
is there is not made again.

Exit codes: 0 done, 1 done with files set aside, 2 SOURCE cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import sys
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the modules are one folder up
import u2mamba.runtime.start  # noqa: F401  # isort: skip
from PIL import Image

from u2mamba.dataset.pairs import MIRROR_SUFFIX, BadFile, DataError, Pair, Unpaired, pair_names, read_pair

IMAGE_FOLDER, MASK_FOLDER = "DUTS-TR-Image", "DUTS-TR-Mask"
MAX_TOTAL = 20 << 30  # bytes that a zip may declare; DUTS-TR unpacks to 0.3 GB
MAX_FILE = 1 << 28  # bytes of one file in it
MARGIN = 1 << 28  # bytes that stay free on the disk
MIRROR_QUALITY = 95  # of the mirrored JPEGs


class Folder:
    """SOURCE as a folder: sizes and contents of the files in the image and the mask folder."""

    def __init__(self, root: Path):
        homes = [home for home in (root, root / "DUTS-TR") if (home / IMAGE_FOLDER).is_dir()]
        if not homes or not (homes[0] / MASK_FOLDER).is_dir():
            raise DataError(f"{root}: no folders {IMAGE_FOLDER} and {MASK_FOLDER} in it")
        self.home = homes[0]

    def sizes(self, folder: str) -> dict[str, int]:
        """File name -> bytes."""
        with os.scandir(self.home / folder) as entries:
            return {entry.name: entry.stat().st_size for entry in entries if entry.is_file()}

    def copy(self, folder: str, name: str, to: Path) -> None:
        """Write one file's bytes to `to`."""
        shutil.copyfile(self.home / folder / name, to)


class Zip:
    """SOURCE as a zip file. Raises DataError before anything is written if a name in it leaves the folder."""

    def __init__(self, path: Path):
        try:
            self.file = zipfile.ZipFile(path)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{path}: not a whole zip file ({error}); download it again") from None
        self.path = path
        self.found: dict[str, dict[str, zipfile.ZipInfo]] = {IMAGE_FOLDER: {}, MASK_FOLDER: {}}
        total = 0
        for entry in self.file.infolist():
            name = entry.orig_filename  # `filename` has been tidied on Windows
            parts = PurePosixPath(name).parts
            kind = stat.S_IFMT(entry.external_attr >> 16)
            if name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in parts:
                raise DataError(f"{path}: refused, the name {name!r} in it leaves the folder; nothing was written")
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                raise DataError(f"{path}: refused, {name!r} in it is a link or a device; nothing was written")
            if entry.flag_bits & 1:
                raise DataError(f"{path}: refused, {name!r} in it is encrypted; nothing was written")
            total += entry.file_size
            if total > MAX_TOTAL or entry.file_size > MAX_FILE:
                raise DataError(f"{path}: refused, {name!r} brings it over MAX_FILE or MAX_TOTAL; nothing was written")
            if not entry.is_dir() and len(parts) > 1 and parts[-2] in self.found and "__MACOSX" not in parts:
                self.found[parts[-2]][parts[-1]] = entry
        if not all(self.found.values()):
            raise DataError(f"{path}: no files in folders {IMAGE_FOLDER} and {MASK_FOLDER} in it")

    def sizes(self, folder: str) -> dict[str, int]:
        """File name -> bytes."""
        return {name: entry.file_size for name, entry in self.found[folder].items()}

    def copy(self, folder: str, name: str, to: Path) -> None:
        """Write one file's bytes to `to`; reading stops at the declared size, and the check sum is checked."""
        try:
            with self.file.open(self.found[folder][name]) as source, open(to, "wb") as target:
                shutil.copyfileobj(source, target)
        except OSError:
            raise
        except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, ...
            raise BadFile(f"{folder}/{name}", f"damaged in the zip ({error})") from None


def _there(path: Path, size: int | None = None) -> bool:
    try:
        found = path.stat().st_size
    except OSError:
        return False
    return found == size if size is not None else found > 0


def _place(pair: Pair, source: Folder | Zip, sizes: tuple[dict, dict], mirror: bool) -> int:
    """Copy a pair and its mirrored copy to their places if they are not there -> number of files written."""
    written = 0
    temporary = Pair(pair.stem, *(path.with_name(f".{path.stem}.tmp{path.suffix}") for path in pair[1:]))
    flipped = [
        path.with_name(pair.stem + MIRROR_SUFFIX + end) for path, end in zip(pair[1:], (".jpg", ".png"), strict=True)
    ]
    try:
        if not all(_there(path, size[path.name]) for path, size in zip(pair[1:], sizes, strict=True)):
            for folder, path, to in zip((IMAGE_FOLDER, MASK_FOLDER), pair[1:], temporary[1:], strict=True):
                source.copy(folder, path.name, to)
            try:
                read_pair(temporary)
            except BadFile as error:
                at_fault = int(error.path == temporary.mask)
                folder = (IMAGE_FOLDER, MASK_FOLDER)[at_fault]
                raise BadFile(f"{folder}/{pair[1:][at_fault].name}", error.reason) from None
            for path, to in zip(temporary[1:], pair[1:], strict=True):
                os.replace(path, to)
                written += 1
        if mirror and not all(_there(path) for path in flipped):
            got = read_pair(pair)
            Image.fromarray(got.image[:, ::-1]).save(temporary.image, "JPEG", quality=MIRROR_QUALITY, subsampling=0)
            Image.fromarray(got.mask[:, ::-1]).save(temporary.mask, "PNG")
            for path, to in zip(temporary[1:], flipped, strict=True):
                os.replace(path, to)
                written += 1
    finally:
        for path in temporary[1:]:
            path.unlink(missing_ok=True)
    return written


def prepare(
    source_path: Path, out: Path, mirror: bool = False, say: Callable[[str], None] = print
) -> tuple[int, list[BadFile], Unpaired]:
    """Put the pairs of `source_path` into `out` -> (pairs in place, files set aside, names without a partner).

    Raises DataError when the source cannot be used, OSError when the disk cannot take it.
    """
    if not source_path.exists():
        raise DataError(f"{source_path}: not there; DUTS-TR.zip is at http://saliencydetection.net/duts/")
    source = Folder(source_path) if source_path.is_dir() else Zip(source_path)
    sizes = source.sizes(IMAGE_FOLDER), source.sizes(MASK_FOLDER)
    paired, unpaired = pair_names(*sizes)
    if not paired:
        raise DataError(f"{source_path}: no image in it has a mask of the same name")
    root = out / "DUTS-TR" / "DUTS-TR"
    folders = root / "im_aug", root / "gt_aug"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    pairs = [Pair(stem, folders[0] / image, folders[1] / mask) for stem, image, mask in paired]
    missing = [p for p in pairs for path, size in zip(p[1:], sizes, strict=True) if not _there(path, size[path.name])]
    need = sum(sizes[0][p.image.name] + sizes[1][p.mask.name] for p in {*missing}) * (3 if mirror else 1)
    free = shutil.disk_usage(root).free
    if need and free < need + MARGIN:
        raise DataError(f"{root}: {free / 1e9:.1f} GB free, {(need + MARGIN) / 1e9:.1f} GB needed; free some, or --out")
    bad, written = [], 0
    for number, pair in enumerate(pairs, 1):
        try:
            written += _place(pair, source, sizes, mirror)
        except BadFile as error:
            bad.append(error)
        if number % 1000 == 0 or number == len(pairs):
            say(f"{number:,} of {len(pairs):,} pairs, {written:,} files written")
    return len(pairs) - len(bad), bad, unpaired


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="DUTS-TR.zip, or the folder it unpacks to")
    parser.add_argument("--mirror", action="store_true", help=f"add mirrored copies, named *{MIRROR_SUFFIX}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        count, bad, unpaired = prepare(args.source, args.out, args.mirror)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or args.out}: {error.strerror or error}; mend that and run it again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; run it again to go on", file=sys.stderr)
        return 130
    for error in bad[:5]:
        print(f"set aside: {error.path.as_posix()}: {error.reason}")
    if len(bad) > 5:
        print(f"set aside: and {len(bad) - 5:,} more")
    lonely = unpaired.images + unpaired.masks + unpaired.duplicates
    if lonely:
        print(f"without a partner: {len(lonely):,} files, {', '.join(lonely[:5])}{', ...' if len(lonely) > 5 else ''}")
    print(f"{count:,} pairs{' and their mirrored copies' if args.mirror else ''} in {args.out / 'DUTS-TR' / 'DUTS-TR'}")
    if not count:
        return 2
    return 1 if bad or lonely else 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
