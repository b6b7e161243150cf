"""Images per second of the training batches: the published loader, streaming from disk, and the cache.

    python -m benchmarks.data --data FOLDER      the folder that holds im_aug/ and gt_aug/ (default: DUTS-TR's place)

Published: SalObjDataset with RescaleT(320), RandomCrop(288) and ToTensorLab(0) in a DataLoader with one worker. The
others make the same augmented batches of 12 as float32. The first pass of each is not counted.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import Compose

from benchmarks.hardware import cli, median_and_spread, print_hardware
from data_loader import RandomCrop, RescaleT, SalObjDataset, ToTensorLab
from u2mamba.dataset.augment import epoch_plan
from u2mamba.dataset.batches import DataSource, batches, open_data
from u2mamba.dataset.pairs import pair_folders, train_val_split

BATCH = 12
PUBLISHED_BATCHES = 10  # at 20 images/s a pass over all pairs would take most of the time


@dataclass
class Config:
    data: str = "train_data/DUTS-TR/DUTS-TR"
    runs: int = 5


def images_per_second(counts: Iterator[int]) -> float:
    """Of a pass that gives the number of images in each batch; the first batch only starts the workers."""
    next(counts)
    started = time.perf_counter()
    return sum(counts) / (time.perf_counter() - started)


def main(cfg: Config) -> None:
    print_hardware(torch.device("cpu"))
    folders = [Path(cfg.data, name) for name in ("im_aug", "gt_aug")]
    with tempfile.TemporaryDirectory() as cache:  # so that the cache is filled, and nothing is left behind
        source = open_data(*train_val_split(pair_folders(*folders)), cache_dir=cache).train
    published = Compose([RescaleT(320), RandomCrop(288), ToTensorLab(0)])
    dataset = SalObjDataset([p.image for p in source.pairs], [p.mask for p in source.pairs], published)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=1, persistent_workers=True)
    plan, stream = epoch_plan(len(source), epoch=0, seed=0), DataSource(source.pairs, source.size)
    variants: dict[str, Callable[[], Iterator[int]]] = {
        "published, 1 worker": lambda: islice((len(s["label"]) for s in loader), 1 + PUBLISHED_BATCHES),
        "streaming": lambda: (len(b.x) for b in batches(stream, plan, BATCH)),
        "cached": lambda: (len(b.x) for b in batches(source, plan, BATCH)),
    }
    base = 0.0
    print(f"{'variant':<24} {'images/s':>9} {'±':>7} {'ratio':>7}   ({cfg.runs} runs, median, batches of {BATCH})")
    for name, start in variants.items():
        rates = [images_per_second(start()) for _ in range(1 + cfg.runs)]
        middle, spread = median_and_spread(rates[1:])
        base = base or middle
        print(f"{name:<24} {middle:>9.1f} {spread:>7.1f} {middle / base:>6.1f}×", flush=True)


if __name__ == "__main__":
    cli(main, Config, __doc__)
