"""Batches of a training run: pairs at training size as bytes in memory (cache.py), cropped, flipped and normalized a
whole batch at a time (augment.py), on any device. A plan fixes the augmentation of each image in an epoch, so that a
run can resume in mid-epoch, and streaming from disk gives the same batches as the cache.

    train, val = train_val_split(pair_folders("images", "masks"))
    data = open_data(train, val, size=320)
    plan = epoch_plan(len(data.train), epoch=0, seed=0)
    for x, y, rows, wait in batches(data.train, plan, batch_size=12): ...
"""

from __future__ import annotations

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from u2mamba.dataset.augment import INDEX, Augmentation, augment
from u2mamba.dataset.cache import PairCache, cached_pairs, format_bytes
from u2mamba.dataset.check import DataReport, check_pairs
from u2mamba.dataset.decode import Pair, open_pair
from u2mamba.dataset.image_file import BadFile, DataError
from u2mamba.dataset.masks import MaskRule
from u2mamba.dataset.rescale import rescale_image, rescale_mask
from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.environment import available_memory
from u2mamba.runtime.workers import THREADS, ordered_map

MEMORY_SHARE = 0.8  # of the free memory, for the cache of all processes
STREAM_AHEAD = 64  # images that are read ahead where the cache does not fit, 0.4 MB each
CPU = torch.device("cpu")


@dataclass(eq=False)
class DataSource:
    """Pairs to build batches from: rows of a cache, or, without one, decoded by threads on demand."""

    pairs: Sequence[Pair]
    size: int
    cache: PairCache | None = None
    rows: Tensor | None = None  # of the cache, one per pair, int64
    rule: MaskRule | None = None  # how the masks are read while streaming; None: each on its own
    device: torch.device = CPU

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: str | torch.device, log: Callable[[str], None] = print) -> DataSource:
        """Makes batches on `device`. The cache, which training and validation share, moves to a GPU if it needs at most
        a quarter of the free memory there: the training step needs the rest."""
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if self.cache is None or self.device.type != "cuda" or self.in_gpu_memory():
            return self
        need, free = PairCache.bytes_for(len(self.cache.images), self.size), torch.cuda.mem_get_info(self.device)[0]
        if need > free / 4:
            log(f"cache: stays in CPU memory, {format_bytes(need)} exceeds 1/4 of {format_bytes(free)} GPU memory")
        else:
            self.cache.images, self.cache.masks = (t.to(self.device) for t in (self.cache.images, self.cache.masks))
            log(f"cache: {format_bytes(need)} moved to GPU memory")
        return self

    def in_gpu_memory(self) -> bool:
        return self.cache is not None and self.cache.images.is_cuda

    def _stream(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        # Threads suffice, because decoding and rescaling release the GIL. Processes would take seconds to start, need
        # shared memory, of which a container has 64 MB, and outlive a killed parent.
        def read(index: int) -> tuple[Tensor, Tensor]:
            with open_pair(self.pairs[index], bool(self.rule and self.rule.as_stored)) as pair:
                arrays = rescale_image(pair.image, self.size), rescale_mask(pair.mask.by(self.rule), self.size)
            return tuple(torch.from_numpy(np.require(a, requirements="W")) for a in arrays)  # Pillow's are read-only

        indices = torch.cat([part[:, INDEX] for part in parts]).tolist() if parts else []
        with contextlib.closing(ordered_map(read, indices, ahead=STREAM_AHEAD)) as results:
            try:
                for part in parts:
                    pairs = (pair for _, pair in itertools.islice(results, len(part)))
                    images, masks = zip(*pairs, strict=True)
                    yield torch.stack(images), torch.stack(masks)
            except BadFile as error:
                raise DataError(
                    f"{error}; it was readable at the start: repair it, or remove it and use --resume force"
                ) from None

    def _fetch(self, parts: list[Tensor]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(images, masks, rows of the plan) on self.device, where the rows' INDEX counts in these images."""
        if self.cache is None:
            groups = self._stream(parts)
        else:
            cache, places = self.cache, [self.rows[part[:, INDEX]] for part in parts]
            if cache.images.device == self.device:
                if parts:  # one copy to the device for the epoch: one per batch would wait for the step before
                    whole = torch.cat(parts)
                    whole[:, INDEX] = torch.cat(places)
                    for part in whole.to(self.device).split([len(part) for part in parts]):
                        yield cache.images, cache.masks, part
                return
            groups = ((cache.images[rows], cache.masks[rows]) for rows in places)
        for part, group in zip(parts, groups, strict=True):
            part = part.clone()
            part[:, INDEX] = torch.arange(len(part))
            if self.device.type == "cuda":  # from pageable memory the copy would wait for the GPU
                group = [t.pin_memory() for t in group]
            yield tuple(t.to(self.device, non_blocking=True) for t in (*group, part))


class Batch(NamedTuple):
    """x and y as `augment` makes them, their rows of the plan, seconds that the device waited for them."""

    x: Tensor
    y: Tensor
    rows: Tensor
    wait: float


def batches(
    source: DataSource,
    plan: Tensor,
    batch_size: int,
    crop: int = 288,
    channels_last: bool = False,
    augmentation: Augmentation | None = None,
) -> Iterator[Batch]:
    """Batches of a plan in its order; the last one is smaller if they do not divide.

    From a cache nothing is prefetched: a batch of 12 takes 3 to 6 ms on 2 cores, and GPU work is queued anyway.
    Raises DataError if a file that was readable at the start no longer is.
    """
    parts = [part for part in plan.split(batch_size) if len(part)]
    fetched = source._fetch(parts)
    on_gpu = source.device.type == "cuda"
    for part in parts:
        start = time.perf_counter()
        earlier = torch.cuda.current_stream(source.device).record_event() if on_gpu else None
        images, masks, rows = next(fetched)
        busy = on_gpu and not earlier.query()  # the GPU still has earlier steps to do, so it does not wait for data
        x, y = augment(images, masks, rows, crop=crop, channels_last=channels_last, augmentation=augmentation)
        yield Batch(x, y, part, 0.0 if busy else time.perf_counter() - start)


def validation_batches(
    source: DataSource, indices: Sequence[int] | None = None, batch_size: int = 12, channels_last: bool = False
) -> Iterator[Batch]:
    """Whole images in order, neither cropped nor flipped, normalized as in training."""
    chosen = torch.arange(len(source)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
    plan = torch.zeros((len(chosen), 4), dtype=torch.int64)
    plan[:, INDEX] = chosen
    return batches(source, plan, batch_size, crop=source.size, channels_last=channels_last)


class Data(NamedTuple):
    """Training pairs, validation pairs (may be none), the report of the check, and a checksum of names and contents of
    all pairs, which distinguishes two datasets with the same file names."""

    train: DataSource
    val: DataSource
    report: DataReport
    fingerprint: int

    def to(self, device: str | torch.device) -> Data:
        """Makes batches on `device`; see `DataSource.to`."""
        return self._replace(train=self.train.to(device), val=self.val.to(device, log=lambda line: None))


def open_data(
    train: Sequence[Pair],
    val: Sequence[Pair],
    size: int = 320,
    dist=None,
    cache_dir: str | Path | None = None,
    log: Callable[[str], None] = print,
) -> Data:
    """Decodes and checks the pairs once, and keeps them in memory at size x size if they fit; else batches stream from
    disk. The cache is also stored in `cache_dir`, by default next to the image folder.

    dist: the `DistContext` of a run with several processes; the first one of each machine decodes.
    Raises DataError (one line to print) if the data cannot be used.
    """
    processes, here = (dist.size, dist.local_size) if dist else (1, 1)
    with dist.main_process_first() if dist else contextlib.nullcontext():
        pairs = sorted({*train, *val}, key=lambda pair: (pair.image, pair.mask))  # the same cache for every split
        if not pairs:
            raise DataError("no pairs to train on")
        need, free = PairCache.bytes_for(len(pairs), size) * here, available_memory()
        if need > free * MEMORY_SHARE:
            text = f"cache: needs {format_bytes(need)} but only {format_bytes(free)} of memory is free; "
            log(f"{text}streaming from disk with {THREADS} threads")
            cache, report = None, check_pairs(pairs, size, log=log, threads=granted_cores())
        else:
            log(f"cache: {len(pairs):,} pairs, {format_bytes(need // here)} in memory")
            cache, report = cached_pairs(pairs, Path(cache_dir or pairs[0].image.parent.parent), size, log)
    for line in report.lines():
        log(line)
    if report.usable and len(report.found.get("empty", ())) == len(report.usable):
        raise DataError(f"no mask in {pairs[0].mask.parent} shows an object (bright on dark): nothing to learn from")
    row_of = {pairs[index]: row for row, index in enumerate(report.usable)}
    sources, fingerprint = [], 0
    for part in (train, val):
        part = [pair for pair in part if pair in row_of]
        rows = [row_of[pair] for pair in part]
        sources.append(DataSource(part, size, cache, torch.tensor(rows, dtype=torch.int64), report.rule))
        content = "".join(f"{pair.stem} {report.checksums[row]}\n" for pair, row in zip(part, rows, strict=True)) + "\n"
        fingerprint = zlib.crc32(content.encode(errors="surrogateescape"), fingerprint)
    log(f"data: {len(sources[0]):,} pairs for training, {len(sources[1]):,} for validation")
    if len(sources[0]) < processes:
        held_out = f"; {len(sources[1])} are for validation, by a hash of their names" if len(sources[1]) else ""
        raise DataError(f"{len(sources[0])} usable training pairs, but at least {processes} required{held_out}")
    if not len(sources[1]):
        log(
            "warning: no validation pairs (by default a hash of the file name selects 5 %): no validation scores, no "
            "best.pth; the weights will be in the newest <model_name>_bce_itr_*.pth"
        )
    return Data(*sources, report, fingerprint)
