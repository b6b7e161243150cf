"""Image files -> saliency maps, with reading, network and writing at the same time.

with ThreadPoolExecutor(THREADS) as pool:
    for found in compute_maps(predict, [Source(path, path.stem) for path in paths], pool, size=320, batch=8):
        ...  # a Map, or a BadFile that says why there is none
"""

import contextlib
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from u2mamba.dataset.cache import rescale_image
from u2mamba.dataset.decode import FORMATS
from u2mamba.dataset.pairs import BadFile, read_image
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime.workers import in_order

PIXELS_AT_ONCE = 50_000_000  # decoded at a time by all threads, up to 20 bytes each; a larger image goes alone
THREADS = min(16, os.cpu_count() or 1)  # that read and write


class Source(NamedTuple):
    """An image file, and what its outputs are called: a path under OUT/MODE, without the extension."""

    path: Path
    name: Path


class Map(NamedTuple):
    """d0 of one image, (size, size) float32, and the image's width and height as seen."""

    source: Source
    d0: np.ndarray
    width: int
    height: int


class PixelBudget:
    """Threads wait until what they are about to decode fits; a single image always does."""

    def __init__(self, most: int):
        self._most, self._held, self._changed = most, 0, threading.Condition()

    @contextlib.contextmanager
    def hold(self, pixels: int) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + pixels <= self._most)
            self._held += pixels
        try:
            yield
        finally:
            with self._changed:
                self._held -= pixels
                self._changed.notify_all()


budget = PixelBudget(PIXELS_AT_ONCE)


def declared_pixels(path: Path) -> int:
    """What the file's header says; 0 for one that `read_image` will refuse."""
    if not path.is_file():  # opening a pipe would wait
        return 0
    try:
        with Image.open(path, formats=FORMATS) as file:
            return file.width * file.height
    except Exception:
        return 0


def read(source: Source, size: int) -> tuple[Source, np.ndarray, int, int] | BadFile:
    """(source, image squashed to (size, size, 3) uint8, width, height)."""
    try:
        with budget.hold(declared_pixels(source.path)):
            image = read_image(source.path)
            return source, rescale_image(image, size), image.shape[1], image.shape[0]
    except BadFile as error:
        return error
    except MemoryError:
        return BadFile(source.path, "does not fit into memory")


def compute_maps(
    predict: Predictor, sources: Iterable[Source], pool: ThreadPoolExecutor, size: int, batch: int
) -> Iterator[Map | BadFile]:
    """The map of each image, or why there is none, in the order of `sources`; files are read ahead by `pool`."""

    def launch(group: list) -> tuple[list, torch.Tensor, torch.cuda.Event | None]:
        images = torch.from_numpy(np.stack([image for _, image, *_ in group]))
        images = images.pin_memory() if predict.device.type == "cuda" else images
        d0, done = predict(images).to("cpu", non_blocking=predict.device.type == "cuda"), None
        if predict.device.type == "cuda":
            done = torch.cuda.Event()
            done.record()
        return group, d0, done

    def finish(group: list, d0: torch.Tensor, done: torch.cuda.Event | None) -> Iterator[Map | BadFile]:
        if done:
            done.synchronize()
        for (source, _, width, height), one in zip(group, d0[:, 0].numpy(), strict=True):
            if np.isfinite(one).all():
                yield Map(source, one, width, height)
            else:
                yield BadFile(source.path, "its map is not finite: damaged weights, or try --precision fp32")

    group, running = [], None
    for _, got in in_order(pool, lambda source: read(source, size), sources, 2 * batch + THREADS):
        if isinstance(got, BadFile):
            yield got
            continue
        group.append(got)
        if len(group) == batch:
            before, running, group = running, launch(group), []
            if before:  # a GPU computes the next batch while the host looks at this one
                yield from finish(*before)
    for launched in (running, launch(group) if group else None):
        if launched:
            yield from finish(*launched)


def at_size(d0: np.ndarray, width: int, height: int, threshold: float | None = None) -> np.ndarray:
    """(S, S) float32 -> (height, width) uint8, bilinear: 0 to 255, or where a threshold is given 0 and 255.

    In strips, since 48 million pixels of float32 are 0.2 GB; what Pillow filters does not end at a strip's edge.
    """
    small, out = Image.fromarray(d0), np.empty((height, width), np.uint8)
    rows = max(1, 2**20 // width)
    for top in range(0, height, rows):
        end = min(top + rows, height)
        box = (0, top * d0.shape[0] / height, d0.shape[1], end * d0.shape[0] / height)
        strip = np.asarray(small.resize((width, end - top), Image.Resampling.BILINEAR, box))
        out[top:end] = np.rint(strip * 255) if threshold is None else (strip > threshold) * 255
    return out
