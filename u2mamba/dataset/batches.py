"""Pairs on disk -> batches for training.

Two ways to the same pictures: the classes that users of U-2-Net know (`SalObjDataset`, `RescaleT`, `RandomCrop`,
`ToTensorLab`, ... in data_loader.py), which define them, and the quick way that the training run takes:
pairs at 320x320 as bytes in memory (cache.py), and crop, flips and normalisation of a whole batch at once
(augment.py), on any device. What happens to each picture of an epoch stands in a plan, so that a run can go on in
the middle of an epoch and streaming from disk gives what the cache gives.

    data = open_data("train_data/DUTS-TR/DUTS-TR/im_aug", "train_data/DUTS-TR/DUTS-TR/gt_aug")
    for x, y, rows, wait in batches(data.train, epoch_plan(len(data.train), epoch=0, seed=0), batch_size=12): ...
"""

from __future__ import annotations

import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from u2mamba.dataset.augment import INDEX, Changes, augment
from u2mamba.dataset.cache import (
    MEMORY_SHARE,
    PairCache,
    available_memory,
    cached_pairs,
    in_words,
    rescale_image,
    rescale_mask,
)
from u2mamba.dataset.pairs import (
    BadFile,
    DataError,
    Pair,
    Report,
    check_pairs,
    find_pairs,
    hold_out,
    is_held_out,
    reading,
)

STREAM_WORKERS = min(16, os.cpu_count() or 1)  # threads that decode where the cache does not fit
STREAM_AHEAD = 64  # pictures that they read ahead, 0.4 MB each

HOW_TO_GET_DATA = """\
  DUTS-TR (10,553 pairs, 0.3 GB): download DUTS-TR.zip from http://saliencydetection.net/duts/, then
    python train_data/prepare_duts.py DUTS-TR.zip
  your own pairs: images and masks of the same names in two folders, then
    python u2mamba_train.py PRESET --data_dir FOLDER --tra_image_dir images --tra_label_dir masks
  (PRESET finetune goes on from the weights that ship, which needs few pairs; fast, small and best begin anew)
  without any data, a small set is made and trained on in minutes by
    python u2mamba_train.py demo"""


class DataSource:
    """Pairs that batches can be made of: from `cache`, or where it is None read from disk by worker threads."""

    def __init__(
        self, pairs: Sequence[Pair], size: int = 320, cache: PairCache | None = None, workers: int = STREAM_WORKERS
    ):
        self.pairs, self.size, self.cache, self.workers = list(pairs), size, cache, max(1, workers)
        self.device = torch.device("cpu")

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: str | torch.device, say: Callable[[str], None] = print) -> DataSource:
        """Make batches on `device`; the cache moves there too where it takes at most a quarter of the free GPU memory:
        the training step wants the rest."""
        self.device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
        if self.cache is None or self.device.type != "cuda":
            return self
        need = PairCache.bytes_for(len(self), self.size)
        free = torch.cuda.mem_get_info(self.device)[0]
        if need > free / 4:
            say(f"cache: stays in memory, {in_words(need)} are over a quarter of the {in_words(free)} free on the GPU")
        else:
            self.cache = PairCache(self.cache.images.to(self.device), self.cache.masks.to(self.device))
            say(f"cache: {in_words(need)} moved to GPU memory")
        return self

    def in_gpu_memory(self) -> bool:
        return self.cache is not None and self.cache.images.is_cuda

    def _streamed(self, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        # Threads, because decoding and rescaling run outside Python's lock. Processes would take seconds to start, and
        # shared memory, of which a container has 64 MB; and they outlive a parent that is killed.
        def read(index: int) -> tuple[torch.Tensor, torch.Tensor]:
            with reading(self.pairs[index]) as got:
                small = rescale_image(got.image, self.size), rescale_mask(got.mask, self.size)
            return tuple(torch.from_numpy(np.require(a, requirements="W")) for a in small)  # Pillow's are read-only

        indices = iter(torch.cat([part[:, INDEX] for part in parts]).tolist() if parts else [])
        ahead: deque[Future] = deque()
        pool = ThreadPoolExecutor(self.workers)
        try:
            for part in parts:
                more = len(part) + STREAM_AHEAD - len(ahead)
                ahead.extend(pool.submit(read, index) for index in itertools.islice(indices, more))
                images, masks = zip(*(ahead.popleft().result() for _ in part), strict=True)
                yield torch.stack(images), torch.stack(masks)
        except BadFile as error:
            raise DataError(
                f"{error}; it was readable at the start: mend it, or remove it and give --resume anyway"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _fetched(self, parts: list[torch.Tensor]) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
        """(images, masks, rows) on self.device, in which the rows' INDEX counts."""
        if self.cache is not None and self.cache.images.device == self.device:
            if parts:  # one copy to the device for the epoch: one for each batch would wait for the step before
                whole = torch.cat(parts).to(self.device)
                for part in whole.split([len(part) for part in parts]):
                    yield self.cache.images, self.cache.masks, part
            return
        if self.cache is None:
            groups = self._streamed(parts)
        else:
            groups = ((self.cache.images[part[:, INDEX]], self.cache.masks[part[:, INDEX]]) for part in parts)
        for part, group in zip(parts, groups, strict=True):
            part = part.clone()
            part[:, INDEX] = torch.arange(len(part))
            if self.device.type == "cuda":  # from pageable memory the copy would wait for the GPU
                group = [t.pin_memory() for t in group]
            yield tuple(t.to(self.device, non_blocking=True) for t in (*group, part))


class Batch(NamedTuple):
    """x and y as `augment` makes them, the rows of the plan they came from, seconds waited (0 from GPU memory)."""

    x: torch.Tensor
    y: torch.Tensor
    rows: torch.Tensor
    wait: float


def batches(
    source: DataSource,
    plan: torch.Tensor,
    batch_size: int,
    crop: int = 288,
    channels_last: bool = False,
    changes: Changes | None = None,
) -> Iterator[Batch]:
    """Batches of a plan in its order, the last one smaller where they do not divide.

    Of a cache nothing is prepared ahead: a batch of 12 takes 3 to 6 ms of 2 cores, and a GPU gets its work queued.
    Raises DataError when a file that was readable at the start no longer is.
    """
    parts = [part for part in plan.split(batch_size) if len(part)]
    fetched = source._fetched(parts)
    ready = source.in_gpu_memory()  # else launching waits for the GPU, where the loop is ahead of it by many steps
    for part in parts:
        before = time.perf_counter()
        x, y = augment(*next(fetched), crop=crop, channels_last=channels_last, changes=changes)
        yield Batch(x, y, part, 0.0 if ready else time.perf_counter() - before)


def validation_batches(
    source: DataSource, indices: Sequence[int] | None = None, batch_size: int = 12, channels_last: bool = False
) -> Iterator[Batch]:
    """Whole pictures in order, neither cropped nor flipped, normalised by the maximum of each."""
    chosen = torch.arange(len(source)) if indices is None else torch.as_tensor(indices, dtype=torch.int64)
    plan = torch.zeros((len(chosen), 4), dtype=torch.int64)
    plan[:, INDEX] = chosen
    return batches(source, plan, batch_size, crop=source.size, channels_last=channels_last)


class Data(NamedTuple):
    """What `open_data` gives: training pairs, held-out pairs (may be none), and the report of the check."""

    train: DataSource
    val: DataSource
    report: Report


def open_data(
    image_dir: str | os.PathLike,
    mask_dir: str | os.PathLike,
    cache: bool = True,
    cache_dir: str | os.PathLike | None = None,
    size: int = 320,
    need: int = 1,
    workers: int = STREAM_WORKERS,
    say: Callable[[str], None] = print,
    copies: int = 1,
) -> Data:
    """Find, check and report all pairs, and keep them in memory at size x size where they fit.

    cache=False streams from disk. The cache is stored in `cache_dir`, by default beside the image folder. `need`:
    fewest training pairs that will do; `workers`: threads that read where there is no cache; `copies`: processes of
    this machine that each keep the pairs.
    Raises DataError (one line to print) when the data cannot be used.
    """
    pairs, unpaired = find_pairs(image_dir, mask_dir)
    train, val = hold_out(pairs)
    pairs = train + val  # so that each of the two is one piece of the cache
    total, free = PairCache.bytes_for(len(pairs), size), available_memory()
    if cache and copies * total > free * MEMORY_SHARE:
        say(f"cache: {in_words(copies * total)} do not fit into {in_words(free)} of memory; {workers} threads stream")
        cache = False
    kept = None
    if not cache:
        good, report = check_pairs(pairs, unpaired, say=say)
    else:
        say(f"cache: {len(pairs):,} pairs, {in_words(total)} in memory")
        kept, good, report = cached_pairs(pairs, unpaired, Path(cache_dir or Path(image_dir).parent), size, say)
    pairs = [pairs[index] for index in good]
    for line in report.lines():
        say(line)
    if pairs and report.empty == report.pairs:
        raise DataError(f"no mask in {mask_dir} holds an object (bright on dark), so there is nothing to learn")
    count = sum(not is_held_out(pair.stem) for pair in pairs)
    say(f"data: {count:,} pairs for training, {len(pairs) - count:,} held out for validation")
    if count == len(pairs):
        say(
            "warning: the names of these pairs hold none out (one of twenty is, by its checksum): no validation, "
            "no best.pth; the weights will be in the newest <model_name>_bce_itr_*.pth"
        )
    if count < need:
        raise DataError(f"{count} usable training pairs in {image_dir}, at least {need} are needed")
    return Data(
        DataSource(pairs[:count], size, kept and kept[:count], workers),
        DataSource(pairs[count:], size, kept and kept[count:], workers),
        report,
    )
