"""Official DUTS-TR -> the layout that the trainer reads: OUT/DUTS-TR/DUTS-TR/{im_aug,gt_aug}/.
OUT is train_data in the current folder, where the trainer looks too.

    python train_data/prepare_duts.py DUTS-TR.zip
    python train_data/prepare_duts.py path/to/DUTS-TR --mirror

SOURCE is DUTS-TR.zip as downloaded, or the folder it unpacks to (DUTS-TR-Image and DUTS-TR-Mask may be one level
deeper). Every new pair is decoded; one that cannot be read is skipped and named. After an interruption, run it again:
files that are in place are kept.

Exit codes: 0 done, 1 done but files were skipped, 2 SOURCE cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import functools
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import BinaryIO

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the packages are one folder up
import u2mamba.runtime.start  # noqa: F401  # isort: skip
from PIL import Image

from u2mamba.dataset.decode import Pair, read_pair
from u2mamba.dataset.image_file import BadFile, DataError
from u2mamba.dataset.pairs import MIRROR_SUFFIX, Unpaired, pair_names, truncate_list
from u2mamba.runtime.errors import one_line_errors

FOLDERS = ("DUTS-TR-Image", "DUTS-TR-Mask")
MAX_TOTAL = 4 << 30  # bytes that a zip may declare; DUTS-TR unpacks to 0.3 GB
MIRROR_QUALITY = 95  # of the flipped JPEGs


def entries_of(source: Path) -> tuple[list[dict[str, Callable[[], BinaryIO]]], list[str]]:
    """For each of FOLDERS, at any depth and in any case: file name -> function that opens the file; and all names.

    Raises DataError for a file that is not a zip, an unsafe name in it (path traversal), and a zip bomb.
    """
    entries, total = {folder.lower(): {} for folder in FOLDERS}, 0
    if source.is_dir():
        found = [source, *source.glob("*"), *source.glob("*/*")]
        for home in found:
            for path in home.glob("*") if home.name.lower() in entries else ():
                if path.is_file():
                    entries[home.name.lower()][path.name] = functools.partial(open, path, "rb")
        return list(entries.values()), list(map(str, found))
    try:
        archive = zipfile.ZipFile(source)
    except FileNotFoundError:
        raise DataError(f"{source}: not found; DUTS-TR.zip is at http://saliencydetection.net/duts/") from None
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{source}: not a complete zip file ({error}); download it again") from None
    for entry in archive.infolist():
        # old Windows tools write backslashes; `filename` is already sanitized on Windows
        name = entry.orig_filename.replace("\\", "/")
        parts, total, problem = PurePosixPath(name).parts, total + entry.file_size, ""
        if name.startswith("/") or ":" in name or "\0" in name or ".." in parts:
            problem = "leads out of the folder"
        elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        elif total > MAX_TOTAL:
            problem = f"exceeds MAX_TOTAL = {MAX_TOTAL:,} bytes"
        if problem:
            raise DataError(f"{source}: refused, {name!r} in it {problem}; nothing was written")
        if not name.endswith("/") and len(parts) > 1 and parts[-2].lower() in entries and "__MACOSX" not in parts:
            entries[parts[-2].lower()][parts[-1]] = functools.partial(archive.open, entry)
    return list(entries.values()), archive.namelist()


def copy(open_source: Callable[[], BinaryIO], to: Path) -> None:
    """Writes one file of the source. Raises BadFile for an entry that is damaged in the zip."""
    try:
        with open_source() as file, open(to, "wb") as target:
            shutil.copyfileobj(file, target)  # stops at the declared size and checks the checksum
    except OSError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, ...
        raise BadFile(to, f"damaged in the zip ({error})") from None


def prepare(source: Path, out: Path, mirror: bool = False) -> tuple[int, list[BadFile], Unpaired]:
    """Puts the pairs of `source` below `out` -> (pairs in place, files that cannot be used, names without a partner).

    Raises DataError if the source cannot be used, OSError if the disk is full or not writable.
    """
    entries, names = entries_of(source)
    if not all(entries):
        hint = ""
        if any("duts-te" in name.lower() for name in names):
            hint = ": this is the test set, DUTS-TE, for u2mamba_eval.py; training needs DUTS-TR"
        elif zips := [name for name in names if name.lower().endswith(".zip")]:
            hint = f": unpack {zips[0]} and pass the result"
        raise DataError(f"{source}: contains no folders {' and '.join(FOLDERS)} with files{hint}")
    paired, unpaired = pair_names(*entries)
    if not paired:
        raise DataError(f"{source}: no image has a mask of the same name{unpaired.near_miss}")
    root = out / "DUTS-TR" / "DUTS-TR"
    images, masks = root / "im_aug", root / "gt_aug"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(exist_ok=True)
    pairs = [Pair(stem, images / image, masks / mask) for stem, image, mask in paired]
    bad, written = [], 0
    with tempfile.TemporaryDirectory(dir=root, prefix=".prepare-") as name:
        work = Path(name)
        for number, pair in enumerate(pairs, 1):
            new = Pair(pair.stem, work / f"image{pair.image.suffix}", work / f"mask{pair.mask.suffix}")
            stem = f"{pair.stem}{MIRROR_SUFFIX}"
            flipped = Pair(stem, images / f"{stem}.jpg", masks / f"{stem}.png")
            try:
                for to in (pair, flipped) if mirror else (pair,):
                    if to.image.exists() and to.mask.exists():
                        continue
                    if to is pair:
                        copy(entries[0][pair.image.name], new.image)
                        copy(entries[1][pair.mask.name], new.mask)
                        read_pair(new)
                    else:
                        image, mask = (Image.fromarray(array[:, ::-1]) for array in read_pair(pair))
                        image.save(new.image, "JPEG", quality=MIRROR_QUALITY, subsampling=0)
                        mask.save(new.mask, "PNG")
                    os.replace(new.image, to.image)
                    os.replace(new.mask, to.mask)
                    written += 2
            except BadFile as error:  # of a temporary file: named as in the source
                names = {new.image: f"{FOLDERS[0]}/{pair.image.name}", new.mask: f"{FOLDERS[1]}/{pair.mask.name}"}
                bad.append(BadFile(names.get(error.path, error.path), error.reason))
            if number % 1000 == 0 or number == len(pairs):
                print(f"{number:,} of {len(pairs):,} pairs, {written:,} files written")
    return len(pairs) - len(bad), bad, unpaired


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises DataError."""

    def path(word: str) -> Path:
        return Path(os.path.expanduser(word)).absolute()  # for messages

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=path, metavar="SOURCE", help="DUTS-TR.zip, or the folder it unpacks to")
    parser.add_argument("--mirror", action="store_true", help=f"add horizontally flipped copies, *{MIRROR_SUFFIX}")
    parser.add_argument("--out", type=path, default="train_data", help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        count, bad, unpaired = prepare(args.source, args.out, args.mirror)
    except OSError as error:
        message = f"{error.filename or args.out}: {error.strerror or error}; fix that and run it again"
        raise DataError(message) from None
    if bad:
        names = [f"{error.path.as_posix()} ({error.reason})" for error in bad]
        print(f"warning: skipped {len(bad):,} unreadable pairs: {truncate_list(names)}")
    if unpaired.skipped:
        names = unpaired.images + unpaired.masks + unpaired.duplicates
        print(f"warning: skipped {len(names):,} files without a partner: {truncate_list(names)}")
    print(f"{count:,} pairs{' and their flipped copies' if args.mirror else ''} in {args.out / 'DUTS-TR' / 'DUTS-TR'}")
    return 2 if not count else 1 if bad or unpaired.skipped else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
