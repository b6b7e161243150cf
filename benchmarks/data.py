"""How fast do training batches come: the published loader, streaming, and the cache, in one run.

    python -m benchmarks.data --data DIR        the folder that holds im_aug/ and gt_aug/ (default: DUTS-TR's place)

published: scikit-image on every access (SalObjDataset + RescaleT(320) + RandomCrop(288) + ToTensorLab(0)) in a
DataLoader with one worker. cached: bytes in memory -> augmented batches of 12, 288x288 float32. streaming: the same
pictures read from disk by threads. All are warmed up (workers started, one epoch of the cache) before the clock runs.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import skimage
import torch
from torch.utils.data import DataLoader

import data_loader
from benchmarks.hardware import lines
from benchmarks.scan import gpu_ms, replay
from data_loader import (
    Changes,
    RandomCrop,
    RescaleT,
    SalObjDataset,
    Sample,
    ToTensorLab,
    batches,
    epoch_plan,
    open_data,
)
from u2mamba.dataset.pairs import DataError
from u2mamba_train import FAST

BATCH = 12
CROP = 288  # pixels, as published
PUBLISHED_BATCHES = 10  # at 20 images/s a run over all pairs would take most of the time
RUNS = 5


class Published:
    """The three transforms in a row."""

    def __init__(self):
        self.steps = (RescaleT(320), RandomCrop(CROP), ToTensorLab(0))

    def __call__(self, sample: Sample) -> Sample:
        for step in self.steps:
            sample = step(sample)
        return sample


def rates(make: Callable, most: int, runs: int) -> list[float]:
    """Images a second of `runs` passes over at most `most` batches each; the first batch only starts the workers."""
    found = []
    for _ in range(runs):
        got, iterator = 0, iter(make())
        next(iterator)
        started = time.perf_counter()
        for number, count in enumerate(iterator, 2):
            got += count
            if number > most:
                break
        found.append(got / (time.perf_counter() - started))
    return found


def main() -> int:
    """Prints the table; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("train_data/DUTS-TR/DUTS-TR"))
    parser.add_argument("--runs", type=int, default=RUNS)
    args = parser.parse_args()
    print("\n".join(lines(torch.device("cuda" if torch.cuda.is_available() else "cpu"))))
    print(f"numpy {np.__version__}, scikit-image {skimage.__version__}")
    with tempfile.TemporaryDirectory() as empty:  # so that the cache is filled, not read, and nothing is left behind
        try:
            data = open_data(args.data / "im_aug", args.data / "gt_aug", cache_dir=empty, need=4 * BATCH)
            again = time.perf_counter()
            open_data(args.data / "im_aug", args.data / "gt_aug", cache_dir=empty, say=lambda _: None)
        except DataError as error:
            print(error, file=sys.stderr)
            return 2
        print(f"start with the cache on disk: {time.perf_counter() - again:.2f} s")
    source = data.train
    plan = epoch_plan(len(source), epoch=0, seed=0)
    dataset = SalObjDataset([p.image for p in source.pairs], [p.mask for p in source.pairs], Published())
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    stream = data_loader.DataSource(source.pairs, source.size)
    ways: dict[str, tuple[Callable, int]] = {
        "published, 1 worker": (lambda: (len(s["label"]) for s in loader), PUBLISHED_BATCHES),
        f"streaming, {data_loader.STREAM_WORKERS} threads": (
            lambda: (len(b.x) for b in batches(stream, plan, BATCH)),
            10**9,
        ),
        "cached": (lambda: (len(b.x) for b in batches(source, plan, BATCH)), 10**9),
        "cached, channels_last": (lambda: (len(b.x) for b in batches(source, plan, BATCH, channels_last=True)), 10**9),
    }
    first = None
    print(f"{'way':<24} {'images/s':>9} {'spread':>15} {'ratio':>7}   ({args.runs} runs, median, batches of {BATCH})")
    for name, (make, most) in ways.items():
        rates(make, most, 1)
        found = rates(make, most, args.runs)
        middle = statistics.median(found)
        first = first or middle
        print(f"{name:<24} {middle:>9.1f} {min(found):>7.1f}-{max(found):<7.1f} {middle / first:>6.1f}x", flush=True)
    if torch.cuda.is_available():
        on_gpu(source.to("cuda"))
    return 0


def on_gpu(source: data_loader.DataSource) -> None:
    """Time of one augmented batch made from a cache in GPU memory, launched one by one and replayed from a graph."""
    if not source.cache.images.is_cuda:
        return
    for size, changed in itertools.product((12, 32), (False, True)):
        make = augmenting(source.cache.images, source.cache.masks, size, changed)
        words = f"GPU, batch {size}, {'changed as in fast' if changed else 'as published'}"
        times = [f"{gpu_ms(way, RUNS):.3f} ms" for way in (make, replay(make))]
        print(f"{words}: augment {times[0]}, in a CUDA graph {times[1]}; {torch.cuda.get_device_name()}")


def augmenting(images: torch.Tensor, masks: torch.Tensor, size: int, changed: bool) -> Callable[[], object]:
    """What makes a batch of `size` pictures from a cache (PairCache's tensors), as published or as `fast` does."""
    count, side = images.shape[:2]
    plan = epoch_plan(count, epoch=0, seed=0, rescale=side, crop=CROP, numbers=True)
    rows = plan.repeat(-(-size // count), 1)[:size].to(images.device)
    changes = Changes.of(FAST) if changed else None
    return lambda: data_loader.augment(images, masks, rows, CROP, channels_last=True, changes=changes)


if __name__ == "__main__":
    sys.exit(main())
