"""Images -> saliency maps, binary masks, cut-outs, overlays and contact sheets, by a trained network.

    python u2mamba_predict.py photo.jpg                                     maps/map/photo.png
    python u2mamba_predict.py photos --out out --mode map cutout sheet      a folder and its subfolders
    python u2mamba_predict.py "photos/**/*.jpg" --checkpoint saved_models/u2net/best.pth --tta
    cat photo.jpg | python u2mamba_predict.py - --out - --mode cutout > photo.png

A saliency map holds each pixel's probability of belonging to the salient object. It has the size of its image, upright,
and is written to OUT/MODE/ under the image's path below INPUT. Existing outputs are skipped, so an interrupted command
can be repeated; OUT/MODE/settings.json records what each was predicted from.

Exit codes: 0 done, 1 done but files were skipped, 2 nothing could be used, 130 and 143 stopped by Ctrl-C and SIGTERM.
"""

import os.path  # isort: skip
import sys  # isort: skip

sys.path.insert(0, os.path.dirname(__file__))  # PYTHONSAFEPATH leaves it out
import u2mamba.runtime.start  # noqa: F401  # isort: skip
import contextlib
import errno
import functools
import glob
import io
import itertools
import os
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import numpy as np
import torch
import tyro
from PIL import Image
from tqdm import tqdm

from u2mamba.dataset.decode import BadFile, read_alpha
from u2mamba.dataset.image_file import PNG_TEXT
from u2mamba.dataset.pairs import IMAGE_TYPES, truncate_list
from u2mamba.dataset.rescale import rescale_image, resize_map
from u2mamba.inference.foreground import foreground_colors
from u2mamba.inference.pipeline import THREADS, compute_maps, held_image, ordered_map
from u2mamba.inference.predictor import Predictor, input_size, load_model, weights_path
from u2mamba.inference.provenance import SETTINGS_FILE, Provenance, checksum, recorded_outputs
from u2mamba.runtime.config import Range, check_settings, read_settings
from u2mamba.runtime.environment import choose_device, choose_precision
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder

# map: 8-bit gray; mask: 0 and 255; cutout: the image with the map as alpha; overlay: the background gray and dark;
# sheet: image, map and cut-out side by side, small
MODES = {"map": ".png", "mask": ".png", "cutout": ".png", "overlay": ".jpg", "sheet": ".jpg"}
NEEDS_IMAGE = {"cutout", "overlay", "sheet"}
SHEET_TILE = 512  # pixels: longest side
PROGRESS_SECONDS = 10  # between two lines, where standard error is no terminal
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the next file would fail too


@dataclass
class Config:
    __doc__ = __doc__  # for --help
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()  # images, folders, patterns in quotes; -: standard input
    checkpoint: str = "small"  # weights file; small, large: those included in saved_models/
    out: str = "maps"  # folder; -: standard output, with one mode
    mode: tuple[Literal["map", "mask", "cutout", "overlay", "sheet"], ...] = ("map",)  # one or several
    size: Annotated[int, Range(0, 4096)] = 0  # pixels: input size of the network; 0: its training size
    batch: Annotated[int, Range(0, 4096)] = 0  # images per forward pass; 0: 4 on a CPU, 32 on a GPU
    threshold: Annotated[float, Range(0, 1)] = 0.5  # of mask
    foreground: bool = True  # cutout, sheet: the object's colors under soft edges, without the old background
    tta: bool = False  # flip test-time augmentation: twice the time
    overwrite: bool = False  # predict again what exists
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device supports it


class Source(NamedTuple):
    """An image file, and the path of its outputs under OUT/MODE, without extension."""

    image: Path
    name: Path


# ---------------------------------------------------------------------------------------------------- finding


def find_images(inputs: Iterable[str]) -> tuple[list[Source], list[str], list[str]]:
    """The files that are named, match a pattern, or have an image's extension in a folder, each once; and the names of
    other files in those folders, and of this command's outputs in folders and patterns, wherever they are.

    Raises UserError for an input without an image, and for two images that would have the same outputs.
    """
    images: dict[Path, tuple[Path, Path]] = {}  # resolved path -> path as given, path below its input
    others, outputs = [], []
    recorded = functools.cache(recorded_outputs)
    for word in inputs:
        base, matches = _matches(word)
        before = len(images)
        for match in matches:
            for path in _images_in(match, others) if match.is_dir() else [match]:
                full = path.absolute()
                if path != Path(word) and any(full.relative_to(p).as_posix() in recorded(p) for p in full.parents):
                    outputs.append(path.name)
                else:
                    images.setdefault(path.resolve(), (path, path.relative_to(base)))
        if len(images) == before and not any(m.is_file() for m in matches):
            raise UserError(f"{word}: no image in it ({' '.join(IMAGE_TYPES)})")
    # a.jpg next to a.png: their outputs keep the extension, a.jpg.png and a.png.png
    stems = Counter(below.with_suffix("") for _, below in images.values())
    sources: dict[Path, Source] = {}
    for path, below in images.values():
        name = below if stems[below.with_suffix("")] > 1 else below.with_suffix("")
        if name in sources:
            raise UserError(f"{sources[name].image} and {path} would both become {name}: give each an --out of its own")
        sources[name] = Source(path, name)
    return list(sources.values()), others, outputs


def _matches(word: str) -> tuple[Path, list[Path]]:
    """The folder that outputs are placed relative to, and the files and folders that `word` names."""
    path = Path(word)
    if os.path.exists(word):  # False, not an error, for a name that is too long
        return path if path.is_dir() else path.parent, [path]
    for pattern, magic in ((word, {*"*?["}), (word.replace("[", "[[]"), {*"*?"})):  # a folder may be called trip[1]
        if matches := [Path(m) for m in sorted(glob.glob(pattern, recursive=True))]:
            base = itertools.takewhile(magic.isdisjoint, path.parts[:-1])
            return Path(*base), matches
    raise UserError(f"{word}: there is no such file or folder, and nothing matches it")


def _images_in(folder: Path, others: list[str]) -> Iterator[Path]:
    """Images in `folder` and below, except hidden files; the names of other files go to `others`."""

    def refuse(error: OSError) -> None:
        raise UserError(f"{error.filename}: {error.strerror}")

    seen: set[Path] = set()  # linked folders are followed, each once, so that a circle ends
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        seen.add(Path(root).resolve())
        folders[:] = sorted(f for f in folders if not f.startswith(".") and Path(root, f).resolve() not in seen)
        for name in sorted(f for f in files if not f.startswith(".")):
            if name.lower().endswith(IMAGE_TYPES):
                yield Path(root, name)
            elif name != SETTINGS_FILE:
                others.append(name)


# ----------------------------------------------------------------------------------------------------- writing


def render(mode: str, saliency: np.ndarray, image: np.ndarray | None, cfg: Config) -> Image.Image:
    """The output of a mode; saliency: (H, W) in [0, 1]; image: (H, W, 3) uint8, for the modes in NEEDS_IMAGE."""
    if mode == "mask":
        return Image.fromarray((saliency > cfg.threshold).astype(np.uint8) * 255)
    alpha = Image.fromarray(np.rint(saliency * 255).astype(np.uint8))
    if mode == "map":
        return alpha
    photo = Image.fromarray(image[..., :3])

    def colors(photo: Image.Image) -> Image.Image:
        return Image.fromarray(foreground_colors(np.asarray(photo), np.asarray(alpha))) if cfg.foreground else photo

    if mode == "overlay":
        ground = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, (20, 30, 60)), 0.6)
        return Image.composite(photo, ground, alpha)
    if mode == "sheet":
        for part in (photo, alpha):
            part.thumbnail((SHEET_TILE, SHEET_TILE))
        cutout = Image.composite(colors(photo), Image.new("RGB", photo.size, "white"), alpha)
        sheet = Image.new("RGB", (3 * photo.width + 16, photo.height), "white")
        for column, part in enumerate((photo, alpha, cutout)):
            sheet.paste(part, (column * (photo.width + 8), 0))
        return sheet
    cutout = colors(photo)
    cutout.putalpha(alpha)
    return cutout


def color_profile(path: Path) -> bytes | None:
    """The ICC profile of the image's RGB values; without it the colors of a cut-out would change. None for one that
    Pillow would refuse to read from a PNG."""
    with Image.open(path) as file:
        profile = file.info.get("icc_profile") if file.mode in ("RGB", "RGBA", "P") else None
        return profile if profile and len(profile) <= PNG_TEXT else None


def encode(result: tuple, modes: Iterable[str], cfg: Config) -> Iterator[tuple[str, memoryview]]:
    """(mode, PNG or JPEG file) of one result of `compute_maps`, one after the other. Raises BadFile."""
    source, saliency, shape = result
    if isinstance(saliency, BadFile):
        raise saliency
    try:
        # the image is decoded again: between network and writing only maps wait, however large the images are
        with held_image(source.image) if NEEDS_IMAGE & set(modes) else contextlib.nullcontext() as image:
            saliency = resize_map(saliency, shape)
            for mode in modes:
                shown, clear = saliency, read_alpha(source.image) if mode == "cutout" else None
                if clear is not None:  # never less transparent than the image
                    shown = np.minimum(saliency, clear / np.float32(255))
                profile = color_profile(source.image) if mode in NEEDS_IMAGE else None
                kind = {"format": "PNG", "compress_level": 1} if MODES[mode] == ".png" else {"format": "JPEG"}
                encoded = io.BytesIO()
                render(mode, shown, image, cfg).save(encoded, **kind, quality=90, icc_profile=profile)
                yield mode, encoded.getbuffer()
    except BadFile:
        raise
    except (MemoryError, OSError, ValueError) as error:  # Pillow: a side that is too long for JPEG
        raise BadFile(source.image, str(error) or "does not fit into memory") from None


def write(result: tuple, outputs: dict[Source, dict[str, Path]], cfg: Config) -> BadFile | None:
    """Writes the outputs of one result of `compute_maps`, or returns why not. Raises UserError for a full disk."""
    paths = outputs[result[0]]
    try:
        for mode, content in encode(result, paths, cfg):
            atomic_write(paths[mode], content, flush=False)
    except BadFile as error:
        return error
    except UserError as error:
        if error.__cause__.errno in DISK_ERRORS:
            raise UserError(f"{error}; the same command continues from there") from None
        return BadFile(result[0].image, str(error))
    return None


# -------------------------------------------------------------------------------------------------- predicting


def prepare(net: torch.nn.Module, size: int, cfg: Config) -> Predictor:
    """`net`, which is changed, on the device and in the precision of `cfg`; prints them."""
    device, device_line = choose_device(cfg.device)
    precision, precision_line = choose_precision("bf16" if cfg.precision == "auto" else cfg.precision, device)
    weights = f"{weights_path(cfg.checkpoint)}, at {size} pixels"
    print(f"device: {device_line}\nprecision: {precision_line}\nweights: {weights}", flush=True)
    torch.backends.cudnn.benchmark = True
    predict = Predictor(net, device, precision, tta=cfg.tta, copy=False)
    if device.type == "cuda":  # for the kernel of Mamba's scan
        try:
            from u2mamba.fast import install

            print("\n".join(install(predict.net)), flush=True)
        except ImportError as error:
            print(f"selective scan: plain PyTorch ({error})", flush=True)
    return predict


def read_rescaled(source: Source, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(image resized to (size, size, 3), its own height and width). Raises BadFile."""
    with held_image(source.image) as image:
        return rescale_image(image, size), image.shape[:2]


def predict_file(path: Path, predict: Predictor, size: int, cfg: Config) -> dict[str, memoryview]:
    """{mode: PNG or JPEG file} of one image, as `main` writes them. Raises BadFile."""
    with ThreadPoolExecutor(1) as pool:
        read = functools.partial(read_rescaled, size=size)
        (result,) = compute_maps(predict, [Source(path, path)], read, pool, batch=1)
    return dict(encode(result, cfg.mode, cfg))


def predict_stream(cfg: Config) -> int:
    """An image from standard input -> its output on standard output; every line goes to standard error."""
    if cfg.inputs != ("-",) or cfg.out != "-":
        raise UserError("standard input and output go together: u2mamba_predict.py - --out -")
    if len(set(cfg.mode)) != 1:
        raise UserError(f"--out - takes exactly one mode: one of {', '.join(MODES)}")
    with contextlib.redirect_stdout(sys.stderr), contextlib.ExitStack() as stack:
        try:
            path = Path(stack.enter_context(tempfile.TemporaryDirectory()), "image")
            with path.open("wb") as file:
                shutil.copyfileobj(sys.stdin.buffer, file)
        except OSError as error:
            raise UserError(f"standard input cannot be copied to a temporary folder: {error.strerror}") from None
        net = load_model(cfg.checkpoint)
        size = input_size(net, cfg.size)
        try:
            (content,) = predict_file(path, prepare(net, size, cfg), size, cfg).values()
        except BadFile as error:
            raise UserError(f"standard input: {error.reason}") from None
    sys.stdout.buffer.write(content)
    sys.stdout.buffer.flush()
    return EXIT_OK


def progress(results: Iterable[tuple], total: int) -> Iterator[tuple]:
    """`results`, with a bar on a terminal and a line in ten seconds elsewhere, on standard error."""
    if sys.stderr.isatty():
        yield from tqdm(results, total=total, unit="img")
        return
    start = shown = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if (now := time.monotonic()) - shown >= PROGRESS_SECONDS and count < total:
            rate, shown = count / (now - start), now
            print(
                f"{count:,} of {total:,} images, {rate:.1f} images/s, {(total - count) / rate:.0f} s left",
                file=sys.stderr,
            )


# -------------------------------------------------------------------------------------------------------- main


def main(cfg: Config) -> int:
    """Runs the command; returns the exit code."""
    check_settings(cfg)
    if "-" in (*cfg.inputs, cfg.out):
        return predict_stream(cfg)
    start, out = time.monotonic(), Path(cfg.out)
    if not cfg.mode:
        raise UserError(f"no mode: give one or several of {', '.join(MODES)}")
    if not cfg.inputs:
        raise UserError("no input: name images, folders or patterns (--help shows examples)")
    sources, others, made = find_images(cfg.inputs)
    net, weights = load_model(cfg.checkpoint), weights_path(cfg.checkpoint)
    size = input_size(net, cfg.size)
    settings = {"weights": weights.name, "crc32": checksum(weights), "size": size, "tta": cfg.tta}
    own = {"mask": {"threshold": cfg.threshold}} | {m: {"foreground": cfg.foreground} for m in ("cutout", "sheet")}
    records = {mode: Provenance(out / mode, settings | own.get(mode, {})) for mode in cfg.mode}
    outputs = {s: {m: out / m / f"{s.name}{MODES[m]}" for m in records} for s in sources}
    if not cfg.overwrite:
        outputs = {
            s: {m: path for m, path in paths.items() if not records[m].is_done(path, s.image)}
            for s, paths in outputs.items()
        }
    outputs = {s: paths for s, paths in outputs.items() if paths}
    print(f"images: {len(sources):,}, of which {len(sources) - len(outputs):,} are done and skipped (--overwrite)")
    for names, what in ((others, "files of other types"), (made, "outputs of this command")):
        if names:
            print(f"skipped {len(names):,} {what}: {truncate_list(names)}")
    if not outputs:
        return EXIT_OK
    check_folder(out)

    predict = prepare(net, size, cfg)
    batch = min(cfg.batch or (4 if predict.device.type == "cpu" else 32), len(outputs))
    for mode, record in records.items():
        record.start({paths[mode]: s.image for s, paths in outputs.items() if mode in paths})
    skipped, pool = 0, ThreadPoolExecutor(THREADS)
    try:
        maps = compute_maps(predict, outputs, functools.partial(read_rescaled, size=size), pool, batch)
        task = functools.partial(write, outputs=outputs, cfg=cfg)
        results = ordered_map(pool, task, maps, 2 * batch + THREADS)
        for _, failure in progress(results, len(outputs)):
            if failure:
                skipped += 1
                tqdm.write(f"skipped: {failure}", file=sys.stderr)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)  # files that are being written are finished
    done, seconds = len(outputs) - skipped, time.monotonic() - start
    print(f"done: {done:,} images in {seconds:.1f} s, {skipped:,} skipped, {', '.join(records)} in {out}")
    if skipped == len(sources):
        return EXIT_USAGE  # each is named above
    return EXIT_SKIPPED if skipped else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(read_settings(Config())))
