"""Official DUTS-TR -> the layout that the trainer reads: OUT/DUTS-TR/DUTS-TR/{im_aug,gt_aug}/.

    python train_data/prepare_duts.py DUTS-TR.zip
    python train_data/prepare_duts.py path/to/DUTS-TR --mirror

SOURCE is DUTS-TR.zip as downloaded, or the folder it unpacks to (DUTS-TR-Image and DUTS-TR-Mask, or the folder around
them). Every new pair is decoded; one that cannot be read is skipped and named. After an interruption, run it again:
files that are in place are kept.

Exit codes: 0 done, 1 done but files were skipped, 2 SOURCE cannot be used, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import shutil
import stat
import sys
import tempfile
import zipfile
from contextlib import suppress
from pathlib import Path, PurePosixPath

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a script, the packages are one folder up
import u2mamba.runtime.start  # noqa: F401  # isort: skip
from PIL import Image

from u2mamba.dataset.decode import Pair, read_pair
from u2mamba.dataset.image_file import BadFile, DataError
from u2mamba.dataset.pairs import MIRROR_SUFFIX, Unpaired, pair_names, truncate_list

FOLDERS = ("DUTS-TR-Image", "DUTS-TR-Mask")
MAX_TOTAL = 20 << 30  # bytes that a zip may declare; DUTS-TR unpacks to 0.3 GB
MAX_FILE = 1 << 28  # bytes of one file in it
MARGIN = 1 << 28  # bytes that stay free on the disk
MIRROR_QUALITY = 95  # of the flipped JPEGs


def zip_entries(archive: zipfile.ZipFile) -> list[dict[str, zipfile.ZipInfo]]:
    """File name -> entry, of each of FOLDERS. Raises DataError if a name in it leaves the folder or is a bomb."""
    found, total = {folder: {} for folder in FOLDERS}, 0
    for entry in archive.infolist():
        name = entry.orig_filename  # on Windows, `filename` has been cleaned up
        parts, total = PurePosixPath(name).parts, total + entry.file_size
        problem = ""
        if name.startswith("/") or "\\" in name or ":" in name or "\0" in name or ".." in parts:
            problem = "leaves the folder"
        elif stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            problem = "is a link or a device"
        elif entry.flag_bits & 1:
            problem = "is encrypted"
        elif total > MAX_TOTAL or entry.file_size > MAX_FILE:
            problem = "exceeds MAX_FILE or MAX_TOTAL"
        if problem:
            raise DataError(f"{archive.filename}: refused, {name!r} in it {problem}; nothing was written")
        if not entry.is_dir() and len(parts) > 1 and parts[-2] in found and "__MACOSX" not in parts:
            found[parts[-2]][parts[-1]] = entry
    return list(found.values())


def unzip(archive: zipfile.ZipFile, entry: zipfile.ZipInfo, to: Path) -> None:
    """Writes an entry of at most its declared size and checks its checksum. Raises BadFile for a damaged one."""
    try:
        with archive.open(entry) as source, open(to, "wb") as target:
            shutil.copyfileobj(source, target)
    except OSError:
        raise
    except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, ...
        raise BadFile(entry.filename, f"damaged in the zip ({error})") from None


def save_flipped(pair: Pair, done: list[Path], work: Path) -> None:
    """The horizontally flipped copies of a pair, at the two paths of `done`."""
    decoded = read_pair(pair)
    Image.fromarray(decoded.image[:, ::-1]).save(work / "i", "JPEG", quality=MIRROR_QUALITY, subsampling=0)
    Image.fromarray(decoded.mask[:, ::-1]).save(work / "m", "PNG")
    for temporary, path in zip((work / "i", work / "m"), done, strict=True):
        os.replace(temporary, path)


def prepare(source: Path, out: Path, mirror: bool = False) -> tuple[int, list[BadFile], Unpaired]:
    """Puts the pairs of `source` below `out` -> (pairs in place, files that cannot be used, names without a partner).

    Raises DataError if the source cannot be used, OSError if the disk is full or not writable.
    """
    if not source.exists():
        raise DataError(f"{source}: not found; DUTS-TR.zip is at http://saliencydetection.net/duts/")
    archive = None
    if source.is_dir():
        homes = [home for home in (source, source / "DUTS-TR") if all((home / name).is_dir() for name in FOLDERS)]
        entries = [{p.name: p for p in (homes[0] / name).iterdir() if p.is_file()} if homes else {} for name in FOLDERS]
        sizes = [{name: path.stat().st_size for name, path in files.items()} for files in entries]
    else:
        try:
            archive = zipfile.ZipFile(source)
        except (zipfile.BadZipFile, NotImplementedError) as error:
            raise DataError(f"{source}: not a complete zip file ({error}); download it again") from None
        entries = zip_entries(archive)
        sizes = [{name: entry.file_size for name, entry in files.items()} for files in entries]
    if not all(entries):
        raise DataError(f"{source}: no files in folders {' and '.join(FOLDERS)} in it")
    paired, unpaired = pair_names(*sizes)
    if not paired:
        raise DataError(f"{source}: no image in it has a mask of the same name")
    root = out / "DUTS-TR" / "DUTS-TR"
    folders = root / "im_aug", root / "gt_aug"
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)

    def in_place(path: Path, size: int | None = None) -> bool:
        return path.is_file() and (path.stat().st_size == size if size is not None else path.stat().st_size > 0)

    missing = {
        stem for stem, *names in paired
        if not all(in_place(f / name, of[name]) for f, name, of in zip(folders, names, sizes, strict=True))
    }  # fmt: skip
    need = sum(sizes[0][i] + sizes[1][m] for stem, i, m in paired if stem in missing) * (3 if mirror else 1)
    free = shutil.disk_usage(root).free
    if need and free < need + MARGIN:
        raise DataError(f"{root}: {free / 1e9:.1f} GB free, {(need + MARGIN) / 1e9:.1f} GB needed; free some, or --out")
    bad, written = [], 0
    with tempfile.TemporaryDirectory(dir=root, prefix=".prepare-") as work:
        for number, (stem, *names) in enumerate(paired, 1):
            pair = Pair(stem, *(folder / name for folder, name in zip(folders, names, strict=True)))
            new = Pair(stem, *(Path(work, f"{kind}{path.suffix}") for kind, path in zip("im", pair[1:3], strict=True)))
            flipped = [folders[0] / f"{stem}{MIRROR_SUFFIX}.jpg", folders[1] / f"{stem}{MIRROR_SUFFIX}.png"]
            try:
                if stem in missing:
                    for files, name, to in zip(entries, names, new[1:3], strict=True):
                        unzip(archive, files[name], to) if archive else shutil.copyfile(files[name], to)
                    read_pair(new)
                    for path, to in zip(new[1:3], pair[1:3], strict=True):
                        os.replace(path, to)
                    written += 2
                if mirror and not all(map(in_place, flipped)):
                    save_flipped(pair, flipped, Path(work))
                    written += 2
            except BadFile as error:  # named as in the source, not by its temporary name
                at_fault = int(error.path == new.mask)
                named = error.path.parent != new.image.parent
                bad.append(error if named else BadFile(f"{FOLDERS[at_fault]}/{names[at_fault]}", error.reason))
            if number % 1000 == 0 or number == len(paired):
                print(f"{number:,} of {len(paired):,} pairs, {written:,} files written")
    return len(paired) - len(bad), bad, unpaired


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="DUTS-TR.zip, or the folder it unpacks to")
    parser.add_argument("--mirror", action="store_true", help=f"add horizontally flipped copies, *{MIRROR_SUFFIX}")
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent, help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        count, bad, unpaired = prepare(args.source, args.out, args.mirror)
    except DataError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        print(f"{error.filename or args.out}: {error.strerror or error}; fix that and run it again", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; run it again to continue", file=sys.stderr)
        return 130
    for error in bad[:5]:
        print(f"warning: skipped {error.path.as_posix()}: {error.reason}")
    if len(bad) > 5:
        print(f"warning: skipped {len(bad) - 5:,} more")
    if unpaired.skipped:
        names = unpaired.images + unpaired.masks + unpaired.duplicates
        print(f"warning: skipped {len(names):,} files without a partner: {truncate_list(names)}")
    print(f"{count:,} pairs{' and their flipped copies' if args.mirror else ''} in {args.out / 'DUTS-TR' / 'DUTS-TR'}")
    if not count:
        return 2
    return 1 if bad or unpaired.skipped else 0


if __name__ == "__main__":
    with suppress(BrokenPipeError):
        sys.exit(main())
