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
import shutil
import tempfile
import time
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm import tqdm

from u2mamba.dataset.decode import BadFile
from u2mamba.dataset.pairs import truncate_list
from u2mamba.inference.inputs import Source, find_images
from u2mamba.inference.pipeline import compute_maps
from u2mamba.inference.predictor import Predictor, input_size, load_model, weights_path
from u2mamba.inference.provenance import Provenance
from u2mamba.inference.render import MODES, encode, predict_file, read_rescaled
from u2mamba.runtime.config import Range, check_settings, read_settings
from u2mamba.runtime.environment import choose_device, choose_precision
from u2mamba.runtime.errors import EXIT_OK, EXIT_SKIPPED, EXIT_USAGE, UserError, one_line_errors
from u2mamba.runtime.files import atomic_write, check_folder
from u2mamba.runtime.workers import THREADS, ordered_map

PROGRESS_SECONDS = 10  # between two lines, where standard error is not a terminal
DISK_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # the next file would fail too


@dataclass
class Config:
    __doc__ = __doc__  # for --help
    inputs: tyro.conf.Positional[tuple[str, ...]] = ()  # images, folders, patterns in quotes; -: standard input
    checkpoint: str = "small"  # weights file, or small or large (included)
    out: str = "maps"  # folder; -: standard output, with one mode
    mode: tuple[Literal["map", "mask", "cutout", "overlay", "sheet"], ...] = ("map",)  # one or more
    size: Annotated[int, Range(0, 4096)] = 0  # pixels: input size of the network; 0: its training size
    batch: Annotated[int, Range(0, 4096)] = 0  # images per forward pass; 0: 4 on a CPU, 32 on a GPU
    threshold: Annotated[float, Range(0, 1)] = 0.5  # for mode mask
    foreground: bool = True  # cutout, sheet: estimate the object's own colors at soft edges
    tta: bool = False  # flip test-time augmentation: takes twice as long
    overwrite: bool = False  # replace existing outputs
    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 where the device supports it


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
            raise UserError(f"{error}; repeat the command to continue") from None
        return BadFile(result[0].image, str(error))
    return None


def prepare(net: torch.nn.Module, size: int, cfg: Any) -> Predictor:
    """A predictor for `net`, which it modifies, on the device and in the precision of `cfg`; prints all three.

    cfg: of this script or of u2mamba_eval.py.
    """
    device, device_line = choose_device(cfg.device)
    precision, precision_line = choose_precision("bf16" if cfg.precision == "auto" else cfg.precision, device)
    parameters = sum(p.numel() for p in net.parameters())
    print(
        f"weights: {weights_path(cfg.checkpoint)}: {type(net).__name__}, {parameters:,} parameters, at {size}x{size}"
        f"{', flip test-time augmentation' * cfg.tta}\ndevice: {device_line}\nprecision: {precision_line}",
        flush=True,
    )
    predict = Predictor(net, device, precision, tta=cfg.tta, copy=False)
    if device.type == "cuda":  # for the kernel of Mamba's scan
        try:
            from u2mamba.fast import install

            print("\n".join(install(predict.net)), flush=True)
        except ImportError as error:
            print(f"selective scan: plain PyTorch ({error})", flush=True)
    return predict


def predict_stream(cfg: Config) -> int:
    """An image from standard input -> its output on standard output; messages go to standard error."""
    if cfg.inputs != ("-",) or cfg.out != "-":
        raise UserError("standard input and output go together: u2mamba_predict.py - --out -")
    if len(set(cfg.mode)) != 1:
        raise UserError(f"--out - requires exactly one mode: {', '.join(MODES)}")
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
    """`results`, with progress on standard error: a bar on a terminal, else a line every ten seconds."""
    if sys.stderr.isatty():
        yield from tqdm(results, total=total, unit="img")
        return
    start = shown = time.monotonic()
    for count, result in enumerate(results, 1):
        yield result
        if (now := time.monotonic()) - shown >= PROGRESS_SECONDS and count < total:
            rate, shown = count / (now - start), now
            left = (total - count) / rate
            print(f"{count:,} of {total:,} images, {rate:.1f} images/s, {left:.0f} s left", file=sys.stderr)


def main(cfg: Config) -> int:
    """Runs the command; returns the exit code."""
    cfg = check_settings(cfg)
    if "-" in (*cfg.inputs, cfg.out):
        return predict_stream(cfg)
    start, out = time.monotonic(), Path(cfg.out)
    if not cfg.mode:
        raise UserError(f"no mode: give one or more of {', '.join(MODES)}")
    if not cfg.inputs:
        raise UserError("no input: give images, folders or patterns (--help shows examples)")
    sources, others, made = find_images(cfg.inputs)
    net, weights = load_model(cfg.checkpoint), weights_path(cfg.checkpoint)
    size = input_size(net, cfg.size)
    settings = {
        "weights": weights.name,
        "crc32": f"{zlib.crc32(weights.read_bytes()):08x}",
        "size": size,
        "tta": cfg.tta,
    }
    own = {"mask": {"threshold": cfg.threshold}} | {m: {"foreground": cfg.foreground} for m in ("cutout", "sheet")}
    records = {mode: Provenance(out / mode, settings | own.get(mode, {})) for mode in cfg.mode}
    outputs = {}
    for source in sources:
        paths = {m: out / m / f"{source.name}{MODES[m]}" for m in records}
        if left := {m: p for m, p in paths.items() if cfg.overwrite or not records[m].is_done(p, source.image)}:
            outputs[source] = left
    print(f"images: {len(sources):,}, of which {len(sources) - len(outputs):,} are already done (see --overwrite)")
    for names, what in ((others, "files of other types"), (made, "outputs of this command")):
        if names:
            print(f"skipped {len(names):,} {what}: {truncate_list(names)}")
    if not outputs:
        return EXIT_OK
    check_folder(out)

    torch.backends.cudnn.benchmark = True
    predict = prepare(net, size, cfg)
    batch = min(cfg.batch or (4 if predict.device.type == "cpu" else 32), len(outputs))
    for mode, record in records.items():
        record.start({paths[mode]: s.image for s, paths in outputs.items() if mode in paths})
    maps = compute_maps(predict, outputs, functools.partial(read_rescaled, size=size), batch)
    results = ordered_map(functools.partial(write, outputs=outputs, cfg=cfg), maps, ahead=2 * batch + THREADS)
    skipped = 0
    with contextlib.closing(results):  # waits for files that are being written
        for _, failure in progress(results, len(outputs)):
            if failure:
                skipped += 1
                tqdm.write(f"skipped: {failure}", file=sys.stderr)
    done, seconds = len(outputs) - skipped, time.monotonic() - start
    print(f"done: {done:,} images in {seconds:.1f} s, {skipped:,} skipped, {', '.join(records)} in {out}")
    if skipped == len(sources):
        return EXIT_USAGE  # each is named above
    return EXIT_SKIPPED if skipped else EXIT_OK


if __name__ == "__main__":
    with one_line_errors():
        sys.exit(main(read_settings(Config())))
