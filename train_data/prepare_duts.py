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
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the packages are one folder up
import u2mamba.runtime.start  # noqa: F401  # isort: skip
from PIL import Image

from u2mamba.dataset.decode import Pair, read_pair
from u2mamba.dataset.image_file import BadFile, DataError, errors_as_bad_file
from u2mamba.dataset.pairs import MIRROR_SUFFIX, pair_names, truncate_list
from u2mamba.runtime.errors import one_line_errors

FOLDERS = ("DUTS-TR-Image", "DUTS-TR-Mask")
MIRROR_QUALITY = 95  # of the flipped JPEGs


def files_of(source: Path) -> dict[PurePosixPath, Callable[[], bytes]]:
    """Each file of a folder or zip -> function that reads it. Raises DataError, also for unsafe names in the zip."""
    if source.is_dir():
        # not rglob, which enters no linked folders
        paths = [path for pattern in ("*", "*/*", "*/*/*") for path in source.glob(pattern) if path.is_file()]
        return {PurePosixPath(*p.relative_to(source).parts): p.read_bytes for p in paths}
    try:
        archive = zipfile.ZipFile(source)
    except FileNotFoundError:
        raise DataError(f"{source}: not found; DUTS-TR.zip is at http://saliencydetection.net/duts/") from None
    except (zipfile.BadZipFile, NotImplementedError) as error:
        raise DataError(f"{source}: not a complete zip file ({error}); download it again") from None
    entries = [entry for entry in archive.infolist() if not entry.is_dir()]
    # old Windows tools write backslashes
    files = {PurePosixPath(e.filename.replace("\\", "/")): functools.partial(archive.read, e) for e in entries}
    for path in files:
        if path.is_absolute() or ".." in path.parts or ":" in str(path):
            raise DataError(f"{source}: refused, '{path}' in it leads out of the folder; nothing was written")
    return files


def prepare(source: Path, out: Path, mirror: bool = False) -> tuple[int, list[BadFile], int]:
    """Puts the pairs of `source` below `out` -> (pairs in place, unusable files, number of files without a partner).

    Raises DataError if the source cannot be used, OSError if the disk is full or not writable.
    """
    files = files_of(source)
    sources = []
    for folder in FOLDERS:  # in upper or lower case
        names = [p for p in files if p.parent.name.lower() == folder.lower() and not p.name.startswith(".")]
        sources.append({path.name: files[path] for path in names})
    if not all(sources):
        hint = ""
        if any("duts-te" in str(path).lower() for path in files):
            hint = ": this is the test set, DUTS-TE, for u2mamba_eval.py; training needs DUTS-TR"
        elif zips := [path for path in files if path.suffix.lower() == ".zip"]:
            hint = f": unpack {zips[0]} and pass the result"
        raise DataError(f"{source}: contains no folders {' and '.join(FOLDERS)} with files{hint}")
    paired, skipped = pair_names(*sources, FOLDERS)
    root = out / "DUTS-TR" / "DUTS-TR"
    images, masks = root / "im_aug", root / "gt_aug"
    images.mkdir(parents=True, exist_ok=True)
    masks.mkdir(exist_ok=True)
    bad, written = [], 0
    with tempfile.TemporaryDirectory(dir=root, prefix=".prepare-") as name:
        new_images, new_masks = (Path(name, folder) for folder in FOLDERS)  # which messages name
        new_images.mkdir()
        new_masks.mkdir()
        for number, (stem, image_name, mask_name) in enumerate(paired, 1):
            pair = Pair(stem, images / image_name, masks / mask_name)
            flipped = Pair(stem, images / f"{stem}{MIRROR_SUFFIX}.jpg", masks / f"{stem}{MIRROR_SUFFIX}.png")
            try:
                for to in (pair, flipped) if mirror else (pair,):
                    if to.image.exists() and to.mask.exists():
                        continue
                    new = Pair(stem, new_images / to.image.name, new_masks / to.mask.name)
                    if to is pair:
                        for path, read in ((new.image, sources[0][image_name]), (new.mask, sources[1][mask_name])):
                            with errors_as_bad_file(path):
                                content = read()
                            path.write_bytes(content)
                        read_pair(new)
                    else:
                        image, mask = (Image.fromarray(array[:, ::-1]) for array in read_pair(pair))
                        image.save(new.image, quality=MIRROR_QUALITY, subsampling=0)
                        mask.save(new.mask)
                    os.replace(new.image, to.image)
                    os.replace(new.mask, to.mask)
                    written += 2
            except BadFile as error:
                bad.append(error)
            if number % 1000 == 0 or number == len(paired):
                print(f"{number:,} of {len(paired):,} pairs, {written:,} files written")
    return len(paired) - len(bad), bad, skipped


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code. Raises DataError."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="DUTS-TR.zip, or the folder it unpacks to")
    parser.add_argument("--mirror", action="store_true", help=f"add horizontally flipped copies, *{MIRROR_SUFFIX}")
    parser.add_argument("--out", type=Path, default="train_data", help="default: %(default)s")
    args = parser.parse_args(arguments)
    source, out = (Path(os.path.expanduser(path)).absolute() for path in (args.source, args.out))
    try:
        count, bad, skipped = prepare(source, out, args.mirror)
    except OSError as error:
        message = f"{error.filename or out}: {error.strerror or error}; fix that and run it again"
        raise DataError(message) from None
    if bad:
        names = [f"{error.path.parent.name}/{error.path.name} ({error.reason})" for error in bad]
        print(f"warning: skipped {len(bad):,} unreadable pairs: {truncate_list(names)}")
    print(f"{count:,} pairs{' and their flipped copies' if args.mirror else ''} in {out / 'DUTS-TR' / 'DUTS-TR'}")
    return 2 if not count else 1 if bad or skipped else 0


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main())
