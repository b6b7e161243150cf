"""Image files -> saliency maps, with reading, network and the caller's work at the same time: prediction, evaluation.

with ThreadPoolExecutor(THREADS) as pool:
    for source, saliency, extra in compute_maps(predict, sources, read, pool, batch=8):
        ...
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch

from u2mamba.dataset.decode import DECODE_BUDGET, BadFile, Pair, decode, open_image, open_pair, to_rgb
from u2mamba.dataset.masks import MaskRule
from u2mamba.dataset.rescale import rescale_image
from u2mamba.inference.predictor import Predictor
from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.environment import peak_memory
from u2mamba.runtime.errors import UserError

if TYPE_CHECKING:  # prediction does without PySODMetrics
    from u2mamba.inference.evaluation import Item

THREADS = min(16, granted_cores())  # that read and write files
S = TypeVar("S")  # what names an image file, by an attribute `image`
Read = Callable[[S], tuple[np.ndarray, Any]]  # -> (image of the network's size, (S, S, 3) uint8; what goes with it)


@contextlib.contextmanager
def held_image(path: Path) -> Iterator[np.ndarray]:
    """The image of a file, (H, W, 3) uint8 RGB, upright; inside the block they count as decoded. Raises BadFile."""
    with open_image(path) as file, DECODE_BUDGET.hold(file.width * file.height):
        yield decode(path, file, to_rgb)[0]


def ordered_map(pool: Executor, task: Callable[[S], Any], items: Iterable[S], ahead: int) -> Iterator[tuple[S, Any]]:
    """(item, task(item)) in the order of `items`; at most `ahead` of them are started before they are asked for."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(task, item)))
        if len(waiting) > ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()


def compute_maps(
    predict: Predictor, sources: Iterable[S], read: Read, pool: ThreadPoolExecutor, batch: int
) -> Iterator[tuple[S, np.ndarray | BadFile, Any]]:
    """(source, saliency map (S, S) float32 or why there is none, what `read` returned with the image).

    `pool` reads the files ahead of the network. Maps come in the order of `sources`.
    """
    cuda = predict.device.type == "cuda"

    def read_or_say_why(source: S) -> tuple[np.ndarray | BadFile, Any]:
        try:
            return read(source)
        except BadFile as error:
            return error, None
        except MemoryError:
            return BadFile(source.image, "does not fit into memory"), None

    def launch(group: list) -> tuple[list, torch.Tensor, torch.cuda.Event | None]:
        images = torch.from_numpy(np.stack([image for _, (image, _) in group]))
        maps, done = predict(images.pin_memory() if cuda else images).to("cpu", non_blocking=cuda), None
        if cuda:
            done = torch.cuda.Event()
            done.record()
        return group, maps, done

    def finish(group: list, maps: torch.Tensor, done: torch.cuda.Event | None) -> Iterator[tuple[S, Any, Any]]:
        if done:
            done.synchronize()
        for (source, (_, extra)), saliency in zip(group, maps[:, 0].numpy(), strict=True):
            if not np.isfinite(saliency).all():
                saliency = BadFile(source.image, "its map has NaN/Inf values: damaged weights, or try --precision fp32")
            yield source, saliency, extra

    running = None
    results = ordered_map(pool, read_or_say_why, sources, ahead=2 * batch + THREADS)
    while chunk := list(itertools.islice(results, batch)):
        yield from ((source, image, None) for source, (image, _) in chunk if isinstance(image, BadFile))
        if group := [entry for entry in chunk if not isinstance(entry[1][0], BadFile)]:
            before, running = running, launch(group)
            if before:  # a GPU computes the next batch while the host handles this one
                yield from finish(*before)
    if running:
        yield from finish(*running)


def read_pair_rescaled(item: Item, size: int, rule: MaskRule | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(image resized to (size, size, 3), mask (H, W)) of an item. Raises BadFile where they do not fit together."""
    with open_pair(Pair(item.stem, item.image, item.mask), bool(rule and rule.as_stored)) as pair:
        return rescale_image(pair.image, size), pair.mask.by(rule)


def predict_items(
    predict: Predictor, items: Iterable[Item], size: int, batch: int, rule: MaskRule | None = None
) -> Iterator[Item]:
    """The items with mask and map in memory, or with the reason why there is no map in its place."""
    read = functools.partial(read_pair_rescaled, size=size, rule=rule)
    with ThreadPoolExecutor(THREADS) as pool:
        for item, saliency, mask in compute_maps(predict, items, read, pool, batch):
            yield item._replace(map=saliency, mask=item.mask if mask is None else mask)


def measure_speed(predict: Predictor, items: Iterable[Item], size: int, batch: int) -> dict[str, float]:
    """{"img_s": images per second of the network alone, over at least three seconds, "memory_GiB": peak memory}.

    The memory is that of tensors on a GPU, and of the process on a CPU. Raises UserError when no image can be read.
    """
    images = []
    for item in items:
        with contextlib.suppress(BadFile):
            images.append(read_pair_rescaled(item, size)[0])
        if len(images) == batch:
            break
    if not images:
        raise UserError("--speed: no image can be read")
    stack = torch.from_numpy(np.stack(images))
    for _ in range(2):
        predict(stack)
    start, calls = time.perf_counter(), 0
    while calls < 3 or time.perf_counter() - start < 3:
        predict(stack)[-1].sum().item()  # .item() waits for the device
        calls += 1
    speed = calls * len(images) / (time.perf_counter() - start)
    return {"img_s": speed, "memory_GiB": peak_memory(predict.device)}
