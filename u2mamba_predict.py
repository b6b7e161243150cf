"""Images -> saliency maps, binary masks, cut-outs, overlays and sheets, by a trained network.

    python u2mamba_predict.py photo.jpg                                   maps/soft/photo.png
    python u2mamba_predict.py photos --out out --mode soft rgba sheet     a folder and the folders in it
    python u2mamba_predict.py "photos/**/*.jpg" --checkpoint saved_models/u2net/best.pth --tta

A map has its image's size, and its orientation as seen; it lies at OUT/MODE/ where the image lies under INPUT. What is
there already is skipped. Exit codes: 0 done, 1 done with files set aside, 2 nothing could be used, 130 and 143 stopped
by Ctrl-C and SIGTERM; what is written is whole then too, and the same command goes on.
"""

import u2mamba.runtime.start  # noqa: F401  # isort: skip
import errno
import functools
import glob
import io
import itertools
import json
import os
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from zlib import crc32

import numpy as np
import torch
import tyro
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tqdm import tqdm

from u2mamba.dataset.pairs import IMAGE_TYPES, BadFile, read_image, some_of
from u2mamba.inference.pipeline import THREADS, Map, Source, at_size, budget, compute_maps
from u2mamba.inference.predictor import Predictor, trained_network, weights_path
from u2mamba.runtime.config import check_input_size, check_settings, input_size
from u2mamba.runtime.environment import choose_device, choose_precision, choose_scan
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder
from u2mamba.runtime.workers import in_order

# soft: 8-bit grey; binary: 0 and 255; rgba: the image with the map as alpha; overlay: what is not the object goes grey
# and dark; sheet: image, map and cut-out side by side, small
MODES = {"soft": ".png", "binary": ".png", "rgba": ".png", "overlay": ".jpg", "sheet": ".jpg"}
WITH_IMAGE = {"rgba", "overlay", "sheet"}
SHEET_TILE = 512  # pixels: longest side
DISK_REFUSES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the next file too


@dataclass
class Options:
    inputs: tyro.conf.Positional[tuple[str, ...]]  # images, folders, patterns in quotes
    checkpoint: str = ""  # weights; default: the small network's that ship in saved_models/
    out: str = "maps"  # folder
    mode: tuple[Literal["soft", "binary", "rgba", "overlay", "sheet"], ...] = ("soft",)  # one or several
    size: int = 0  # pixels: the image is squashed to this square; 0: as the weights were trained, 320 if unknown
    batch: int = 0  # images through the network at a time; 0: 4 on a CPU, 32 on a GPU
    threshold: float = 0.5  # of "binary"
    tta: bool = False  # the mean with the mirrored image's map: twice the time
    overwrite: bool = False  # make again what is there
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the machine is made for it


LIMITS = {"size": (0, 4096), "batch": (0, 4096), "threshold": (0, 1)}


# ---------------------------------------------------------------------------------------------------- finding


def find_images(inputs: Iterable[str], out: Path) -> tuple[list[Source], list[str]]:
    """The files named, those that match, and those in folders that have an image's extension, each once; and the names
    of the others in those folders.

    Raises UserError where an input is not there or holds no image, and where two images would have the same outputs.
    """
    found: dict[Path, tuple[Path, Path]] = {}  # the file itself -> its path as given, and under its input
    others: list[str] = []
    for word in inputs:
        base, matches = _matches(word)
        before = len(found)
        for match in matches:
            for path in _images_in(match, out, others) if match.is_dir() else [match]:
                found.setdefault(path.resolve(), (path, path.relative_to(base)))
        if len(found) == before and not any(m.is_file() for m in matches):
            raise UserError(f"{word}: no image in it ({' '.join(IMAGE_TYPES)})")
    # a.jpg and a.png: their outputs keep the extension, a.jpg.png and a.png.png
    stems = Counter(under.with_suffix("") for _, under in found.values())
    sources = {}
    for path, under in found.values():
        name = under if stems[under.with_suffix("")] > 1 else under.with_suffix("")
        if name in sources:
            raise UserError(f"{sources[name].path} and {path} would both become {name}: give each an --out of its own")
        sources[name] = Source(path, name)
    return list(sources.values()), others


def _matches(word: str) -> tuple[Path, list[Path]]:
    """The folder that outputs are placed relative to, and the files and folders that `word` stands for."""
    path = Path(word)
    if os.path.exists(word):  # False, not an error, for a name longer than the system takes
        return path if path.is_dir() else path.parent, [path]
    matches = [Path(m) for m in sorted(glob.glob(word, recursive=True))]
    if not matches:
        raise UserError(f"{word}: there is no such file or folder, and nothing matches it")
    return Path(*itertools.takewhile(lambda part: not glob.has_magic(part), path.parts[:-1])), matches


def _images_in(folder: Path, out: Path, others: list[str]) -> Iterator[Path]:
    """Images in `folder` and below, but not what an earlier call wrote, nor hidden ones; others go into `others`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    made = {(out / mode).resolve() for mode in MODES}
    for root, folders, files in os.walk(folder, onerror=refuse):
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() not in made)
        for name in sorted(files):
            if name.lower().endswith(IMAGE_TYPES) and not name.startswith("."):
                yield Path(root, name)
            elif not name.startswith("."):
                others.append(name)


# ----------------------------------------------------------------------------------------------------- writing


def render(mode: str, found: Map, image: np.ndarray | None, threshold: float) -> Image.Image:
    """The picture of a mode; image: (H, W, 3) uint8, for the modes in WITH_IMAGE."""
    alpha = Image.fromarray(at_size(found.d0, found.width, found.height, threshold if mode == "binary" else None))
    if mode not in WITH_IMAGE:
        return alpha
    picture = Image.fromarray(image)
    if mode == "overlay":
        ground = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, (20, 30, 60)), 0.6)
        return Image.composite(picture, ground, alpha)
    if mode == "sheet":
        for part in (picture, alpha):
            part.thumbnail((SHEET_TILE, SHEET_TILE))
        cut = Image.composite(picture, Image.new("RGB", picture.size, "white"), alpha)
        sheet = Image.new("RGB", (3 * picture.width + 16, picture.height), "white")
        for column, part in enumerate((picture, alpha, cut)):
            sheet.paste(part, (column * (picture.width + 8), 0))
        return sheet
    picture.putalpha(alpha)
    return picture


def colour_profile(path: Path) -> bytes | None:
    """The ICC profile that the image's RGB values are meant in, without which a cut-out's colours change."""
    with Image.open(path) as file:
        return file.info.get("icc_profile") if file.mode in ("RGB", "RGBA", "P") else None


def write(
    found: Map | BadFile, targets: dict[Source, dict[str, Path]], threshold: float, how: dict[str, dict]
) -> BadFile | None:
    """Writes the outputs of one map that are asked for; returns why not. Raises UserError when the disk refuses."""
    if isinstance(found, BadFile):
        return found
    wanted, path = targets[found.source], found.source.path
    try:
        with budget.hold(found.width * found.height):
            # read again and not kept since before the network: what waits are maps, however large the images
            image = read_image(path) if WITH_IMAGE & wanted.keys() else None
            checksum = file_crc32(path)
            for mode, target in wanted.items():
                profile = colour_profile(path) if mode in WITH_IMAGE else None
                encoded = io.BytesIO()
                about = json.dumps(how[mode] | {"image": checksum})
                if target.suffix == ".png":
                    kind = {"format": "PNG", "compress_level": 1, "pnginfo": PngInfo()}
                    kind["pnginfo"].add_text("Comment", about)
                else:
                    kind = {"format": "JPEG", "quality": 90, "comment": about}
                render(mode, found, image, threshold).save(encoded, **kind, icc_profile=profile)
                atomic_write(target, encoded.getbuffer(), flush=False)
    except BadFile as error:
        return error
    except UserError as error:
        if error.__cause__.errno in DISK_REFUSES:
            raise UserError(f"{error}; the same command goes on from there") from None
        return BadFile(path, str(error))
    except (MemoryError, OSError, ValueError) as error:  # Pillow: a side too long for JPEG
        return BadFile(path, str(error) or "does not fit into memory")
    return None


# --------------------------------------------------------------------------------------------- what is there already


def file_crc32(path: Path) -> int:
    if not path.is_file():  # a pipe would block
        raise OSError(f"{path}: not a regular file")
    with path.open("rb") as file:
        return functools.reduce(lambda crc, block: crc32(block, crc), iter(lambda: file.read(1 << 20), b""), 0)


def _how(options: Options) -> dict[str, dict]:
    """mode -> what makes its maps what they are; each output holds it as its comment, with its image's checksum."""
    weights = weights_path(options.checkpoint)
    if not weights.is_file():
        raise UserError(f"{weights}: there is no such checkpoint")
    size, checksum = input_size(options.size, weights), crc32(weights.read_bytes())
    how = {"weights": weights.name, "crc32": checksum, "size": size, "tta": options.tta}
    return {m: how | ({"threshold": options.threshold} if m == "binary" else {}) for m in options.mode}


def made_by(target: Path) -> dict | None:
    """What the comment of an output says of it; {} of something else; None where nothing is, or a part of a file."""
    if not target.exists():
        return None
    if not target.is_file():
        return {}
    try:
        with target.open("rb") as file:
            head = file.read(8)
            file.seek(-min(target.stat().st_size, 4), os.SEEK_END)
            ended = file.read().endswith((b"\xaeB`\x82", b"\xff\xd9"))  # of PNG, of JPEG
    except OSError:
        return {}
    if not ended and (head.startswith((b"\x89PNG", b"\xff\xd8")) or not head.strip(b"\0")):  # a power cut leaves such
        return None
    try:
        with Image.open(target, formats=("PNG", "JPEG")) as file:
            made = json.loads(file.info.get("Comment") or file.info["comment"])
    except (OSError, ValueError, KeyError, TypeError, Image.DecompressionBombError):
        return {}
    return made if isinstance(made, dict) else {}


def not_done(source: Source, targets: dict[str, Path], how: dict[str, dict]) -> dict[str, Path]:
    """mode -> output, of the `targets` that are still to be made.

    Raises UserError where there is something else than this image's, made so: it would pass for done, or be lost.
    """
    left, checksum = {}, functools.cache(file_crc32)
    for mode, target in targets.items():
        made = made_by(target)
        if made is None:
            left[mode] = target
            continue
        if made.keys() != how[mode].keys() | {"image"}:
            was = "not made by this script, or by an earlier version"
        elif differs := [key for key, value in how[mode].items() if key != "weights" and made[key] != value]:
            was = f"made by {made['weights']}, {', '.join(f'{key} {made[key]}' for key in differs)}"
        else:
            try:
                same = made["image"] == checksum(source.path)
            except OSError:  # it is set aside when it is its turn
                left[mode] = target
                continue
            if same:
                continue
            was = "made of another image, or of an earlier state of this one"
        raise UserError(f"{target} is there, {was}: give another --out, or --overwrite")
    return left


def run(options: Options) -> int:
    """The whole of it; returns the exit code."""
    check_settings(options, LIMITS)
    check_input_size(options.size)
    begun, out = time.monotonic(), Path(options.out)
    if not options.mode:
        raise UserError(f"no mode: give one or several of {', '.join(MODES)}")
    if not options.inputs:
        raise UserError("no input: name images, folders or patterns (--help shows examples)")
    (sources, others), how = find_images(options.inputs, out), _how(options)
    targets = {s: {m: out / m / f"{s.name}{MODES[m]}" for m in options.mode} for s in sources}
    if not options.overwrite:
        with ThreadPoolExecutor(THREADS) as pool:
            left = pool.map(not_done, targets, targets.values(), itertools.repeat(how))
            targets = dict(zip(sources, left, strict=True))
    targets = {s: t for s, t in targets.items() if t}
    print(f"images: {len(sources):,}, of which {len(sources) - len(targets):,} are done and skipped (--overwrite)")
    if others:
        print(f"passed by, of another type: {len(others):,} ({some_of(others)})")
    if not targets:
        return EXIT_OK
    check_folder(out)

    device, device_line = choose_device(options.device)
    precision, precision_line = choose_precision("bf16" if options.precision == "auto" else options.precision, device)
    net, weights = trained_network(options.checkpoint, choose_scan(device, "auto")[0])
    size = input_size(options.size, weights)
    print(f"device: {device_line}\nprecision: {precision_line}\nweights: {weights}, at {size} pixels", flush=True)
    torch.backends.cudnn.benchmark = True
    predict = Predictor(net, device, precision, tta=options.tta)
    batch = min(options.batch or (4 if device.type == "cpu" else 32), len(targets))

    aside, pool = 0, ThreadPoolExecutor(THREADS)
    try:
        maps = compute_maps(predict, targets, pool, size, batch)
        written = in_order(pool, lambda found: write(found, targets, options.threshold, how), maps, 2 * batch + THREADS)
        for _, failure in tqdm(written, total=len(targets), unit="img", disable=None):
            if failure:
                aside += 1
                tqdm.write(f"set aside: {failure}", file=sys.stderr)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # after Ctrl-C too: what is being written is finished
    done, seconds = len(targets) - aside, time.monotonic() - begun
    print(f"done: {done:,} images in {seconds:.1f} s, {aside:,} set aside, {', '.join(options.mode)} in {out}")
    if aside == len(sources):
        return EXIT_USAGE  # each is named above
    return EXIT_SKIPPED if aside else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(run(tyro.cli(Options, description=__doc__, use_underscores=True)))
