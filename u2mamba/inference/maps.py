"""Maps of a trained network for the evaluation: pairs of files in, maps and masks out, reading beside computing."""

import contextlib
import itertools
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from u2mamba.dataset.cache import rescale_image
from u2mamba.dataset.pairs import BadFile, Pair, read_image, read_pair
from u2mamba.inference.evaluation import Item
from u2mamba.inference.predictor import Predictor, trained_network
from u2mamba.runtime.environment import choose_device, choose_precision, choose_scan, peak_memory
from u2mamba.runtime.errors import UserError
from u2mamba.runtime.workers import in_order

READERS = min(8, os.cpu_count() or 1)  # threads


def open_network(
    path: Path, device: str = "auto", gpu: int = 0, precision: str = "fp32", tta: bool = False
) -> tuple[Predictor, str]:
    """The network of a checkpoint, ready on the device, and a line on what it is and runs on; tta as of `Predictor`.

    Raises UserError when the device is not there, or the file is not a checkpoint of one of our networks.
    """
    chosen, device_line = choose_device(device, gpu)
    precision, precision_line = choose_precision(precision, chosen)
    net, _ = trained_network(str(path), choose_scan(chosen, "auto")[0])
    parameters = sum(p.numel() for p in net.parameters())
    line = f"{path}: {type(net).__name__}, {parameters:,} parameters; {device_line}; {precision_line}"
    return Predictor(net, chosen, precision, tta=tta), line + "; mean with the mirrored image" * tta


def maps_of(items: Iterable[Item], predict: Predictor, size: int, batch: int, bad: list[BadFile]) -> Iterator[Item]:
    """Items of files -> items with the map, (size, size) float32, and the mask, (H, W) uint8, in memory.

    Images are squashed to size x size, as in training. What cannot be read, or does not fit its mask, goes to `bad`.
    """

    def read(item: Item) -> tuple[np.ndarray, np.ndarray] | BadFile:
        try:
            got = read_pair(Pair(item.stem, item.image, item.mask))
            return rescale_image(got.image, size), got.mask
        except BadFile as error:
            return error

    with ThreadPoolExecutor(READERS) as pool:
        readings = in_order(pool, read, items, ahead=batch + 2 * READERS)
        while chunk := list(itertools.islice(readings, batch)):
            bad += [got for _, got in chunk if isinstance(got, BadFile)]
            good = [(item, got) for item, got in chunk if not isinstance(got, BadFile)]
            if good:
                maps = predict(torch.from_numpy(np.stack([image for _, (image, _) in good])))[:, 0].cpu().numpy()
                for (item, (_, mask)), d0 in zip(good, maps, strict=True):
                    yield item._replace(mask=mask, map=d0)


def measure_speed(predict: Predictor, items: Iterable[Item], size: int, batch: int) -> tuple[float, float]:
    """(images a second, peak memory in GiB) of the network alone, from bytes to map, over at least three seconds.

    The memory is what the tensors took on a GPU; on a CPU that of the whole process. Raises UserError when no image
    can be read.
    """
    images = []
    for item in items:
        with contextlib.suppress(BadFile):
            images.append(rescale_image(read_image(item.image), size))
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
    return calls * len(images) / (time.perf_counter() - start), peak_memory(predict.device)
