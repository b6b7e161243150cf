"""Saliency maps -> the files of each mode: maps, binary masks, cut-outs, overlays and contact sheets."""

import contextlib
import functools
import io
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from u2mamba.dataset.decode import alpha_channel, decode, to_rgb
from u2mamba.dataset.image_file import PNG_TEXT, BadFile, decode_budget, errors_as_bad_file, open_image
from u2mamba.dataset.rescale import rescale_image, resize_map
from u2mamba.inference.foreground import foreground_colors
from u2mamba.inference.inputs import Source
from u2mamba.inference.pipeline import compute_maps
from u2mamba.inference.predictor import Predictor

# map: 8-bit gray; mask: 0 and 255; cutout: the image with the map as alpha; overlay: dark gray background;
# sheet: image, map and cut-out side by side, small
MODES = {"map": ".png", "mask": ".png", "cutout": ".png", "overlay": ".jpg", "sheet": ".jpg"}
NEEDS_IMAGE = {"cutout", "overlay", "sheet"}
SHEET_TILE = 512  # pixels: longest side


@contextlib.contextmanager
def open_rgb(path: Path) -> Iterator[tuple[np.ndarray, np.ndarray | None, bytes | None]]:
    """(image (H, W, 3) uint8, upright; its alpha channel (H, W) or None; its ICC profile, without which the colors of a
    cut-out would change, or None where Pillow could not read it back from a PNG). The block holds a `decode_budget`.

    Raises BadFile, also for errors inside the block.
    """
    with open_image(path) as file, decode_budget(file.width * file.height):
        profile = file.info.get("icc_profile") if file.mode in ("RGB", "RGBA", "P") else None
        (image, alpha), _ = decode(path, file, lambda upright: (to_rgb(upright), alpha_channel(upright)))
        yield image, alpha, profile if profile and len(profile) <= PNG_TEXT else None


def read_rescaled(source: Source, size: int) -> tuple[np.ndarray, tuple[int, int]]:
    """(image resized to (size, size, 3), its own height and width). Raises BadFile."""
    with open_rgb(source.image) as (image, *_):
        return rescale_image(image, size), image.shape[:2]


def render(mode: str, saliency: np.ndarray, image: np.ndarray | None, cfg: Any) -> Image.Image:
    """The output of a mode; saliency: (H, W) in [0, 1]; image: (H, W, 3) uint8, for the modes in NEEDS_IMAGE.

    cfg: settings `threshold` and `foreground` of u2mamba_predict.py.
    """
    if mode == "mask":
        return Image.fromarray((saliency > cfg.threshold).astype(np.uint8) * 255)
    alpha = Image.fromarray(np.rint(saliency * 255).astype(np.uint8))
    if mode == "map":
        return alpha
    photo = Image.fromarray(image[..., :3] if image.shape[2] > 2 else image[..., (0, 0, 0)])  # of edited code
    if mode == "overlay":
        ground = Image.blend(photo.convert("L").convert("RGB"), Image.new("RGB", photo.size, (20, 30, 60)), 0.6)
        return Image.composite(photo, ground, alpha)
    if mode == "sheet":
        for part in (photo, alpha):
            part.thumbnail((SHEET_TILE, SHEET_TILE))
    cutout = photo
    if cfg.foreground:
        cutout = Image.fromarray(foreground_colors(np.asarray(photo), np.asarray(alpha)))
    if mode == "cutout":
        cutout.putalpha(alpha)
        return cutout
    sheet = Image.new("RGB", (3 * photo.width + 16, photo.height), "white")
    on_white = Image.composite(cutout, Image.new("RGB", photo.size, "white"), alpha)
    for column, part in enumerate((photo, alpha, on_white)):
        sheet.paste(part, (column * (photo.width + 8), 0))
    return sheet


def encode(result: tuple, modes: Iterable[str], cfg: Any) -> Iterator[tuple[str, memoryview]]:
    """(mode, PNG or JPEG file) of one result of `compute_maps`, one at a time; cfg: see `render`.

    Raises BadFile.
    """
    source, saliency, shape = result
    if isinstance(saliency, BadFile):
        raise saliency
    low, high = np.rint(255 * saliency.min()), np.rint(255 * saliency.max())
    if low == high:
        tqdm.write(f"{source.image}: its map is constant ({low:.0f} of 255)", file=sys.stderr)
    # the image is decoded again: only small maps are queued between network and writing
    with (open_rgb if NEEDS_IMAGE & set(modes) else errors_as_bad_file)(source.image) as opened:
        image, opaque, profile = opened or (None, None, None)
        saliency = resize_map(saliency, shape)
        for mode in modes:
            shown = saliency
            if mode == "cutout" and opaque is not None:  # never less transparent than the image
                shown = np.minimum(saliency, opaque / np.float32(255))
            kind = {"format": "PNG", "compress_level": 1} if MODES[mode] == ".png" else {"format": "JPEG"}
            encoded = io.BytesIO()
            icc_profile = profile if mode in NEEDS_IMAGE else None
            render(mode, shown, image, cfg).save(encoded, **kind, quality=90, icc_profile=icc_profile)
            yield mode, encoded.getbuffer()


def predict_file(path: Path, predict: Predictor, size: int, cfg: Any) -> dict[str, memoryview]:
    """{mode: PNG or JPEG file} of one image, as u2mamba_predict.py writes them. Raises BadFile."""
    read = functools.partial(read_rescaled, size=size)
    (result,) = compute_maps(predict, [Source(path, path)], read, batch=1)
    return dict(encode(result, cfg.mode, cfg))
