"""The schedule of a run: epochs, iterations, crop sizes, order of the pairs; and its progress."""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from model import ARCHS
from u2mamba.dataset.augment import Augmentation, epoch_plan
from u2mamba.dataset.batches import Batch, DataSource, batches
from u2mamba.engine.distributed import DistContext
from u2mamba.runtime.config import MIN_SIZE, check_settings
from u2mamba.runtime.errors import UserError

MAX_NAME = 180  # bytes of a run's name: weights files add up to 60 to it, and file systems allow 255
LOWER_IS_BETTER = {"MAE"}  # validation scores


@dataclass
class TrainState:
    """The progress of a run; together with the settings it determines the pairs of the next step."""

    epoch: int = 0  # finished epochs, validation included
    position: int = 0  # pairs of the current epoch that were trained on
    iteration: int = 0  # finished steps
    best: float = -1.0  # best validation score so far
    best_name: str = ""  # name of that score
    seconds: float = 0.0  # training time, over all starts
    finished: bool = False

    def is_best(self, name: str, scores: Mapping[str, float]) -> bool:
        """Whether the score `name` is the best so far; ties count. A best score of another name is discarded."""
        if not scores or not all(map(math.isfinite, scores.values())):
            return False
        gain = (self.best - scores[name]) if name in LOWER_IS_BETTER else scores[name] - self.best
        return name != self.best_name or gain >= 0

    def advance(self, pairs: int) -> None:
        """Counts a step on this many pairs, over all processes."""
        self.iteration, self.position = self.iteration + 1, self.position + pairs

    def end_epoch(self) -> None:
        self.epoch, self.position = self.epoch + 1, 0


class Schedule:
    """The schedule for the settings `cfg`, a number of training pairs and a number of processes."""

    def __init__(self, cfg: Any, pairs: int, processes: int = 1):
        self.cfg, self.pairs, self.processes = cfg, pairs, processes
        self.batch = batch = cfg.batch_size_train * processes
        self.pairs_per_epoch = len(self.plan(0))
        self.total_iterations = 0  # of the run; set by start_from
        if batch > pairs:
            print(f"warning: batch size {batch} exceeds the {pairs} training pairs: one step per epoch")

    def start_from(self, state: TrainState) -> None:
        """Computes `total_iterations` of a run that continues from `state`; warns where the warmup is longer."""
        whole, rest = self._steps(self.pairs_per_epoch), self._steps(self.pairs_per_epoch - state.position)
        self.total_iterations = state.iteration + (self.cfg.epoch_num - state.epoch - 1) * whole + rest
        if self.cfg.warmup_iters > self.total_iterations:
            print(
                f"warning: warmup_iters = {self.cfg.warmup_iters} exceeds the run's {self.total_iterations} "
                "iterations: lr is never reached; decrease it, or train for more epochs"
            )

    def epoch_is_over(self, state: TrainState) -> bool:
        """Whether all pairs of the current epoch were trained on."""
        return self._steps(self.pairs_per_epoch - state.position) == 0

    def _steps(self, rows: int) -> int:
        return -(-(rows // self.processes) // self.cfg.batch_size_train)

    def progress(self, state: TrainState) -> float:
        """The completed fraction of the run, counted in epochs: the number of processes may change on resuming."""
        return (state.epoch + state.position / self.pairs_per_epoch) / self.cfg.epoch_num

    def crop_size(self, epoch: int) -> int:
        """Pixels; progressive resizing trains the first epochs at a smaller size."""
        early = self.cfg.early_crop and epoch < self.cfg.early_fraction * self.cfg.epoch_num
        return self.cfg.early_crop if early else self.cfg.crop

    def augmentation(self, epoch: int) -> Augmentation:
        """Whole images replace random crops in the last epochs, to match prediction (arXiv 1906.06423)."""
        whole = epoch >= (1 - self.cfg.whole_fraction) * self.cfg.epoch_num
        augmentation = Augmentation.from_config(self.cfg)
        return augmentation._replace(scale_min=1.0, scale_max=1.0) if whole else augmentation

    def plan(self, epoch: int) -> Tensor:
        """Order, crops and flips of an epoch: rows of `epoch_plan`, a function of seed and epoch alone."""
        cfg = self.cfg
        plan = epoch_plan(
            self.pairs, epoch, cfg.seed, cfg.rescale, self.crop_size(epoch), cfg.vflip_prob, cfg.hflip_prob,
            random=any(self.augmentation(epoch)),
        )  # fmt: skip
        dropped = len(plan) % self.batch if cfg.drop_last and len(plan) >= self.batch else 0
        return plan[: len(plan) - dropped]


def train_batches(
    source: DataSource, schedule: Schedule, state: TrainState, channels_last: bool, dist: DistContext
) -> Iterator[Batch]:
    """The batches of a run from `state` on, over its epochs: x and y of this process, the plan's rows of all processes.

    Raises DataError for a file that became unreadable.
    """
    cfg = schedule.cfg
    for epoch in range(state.epoch, cfg.epoch_num):
        rows, done = schedule.plan(epoch)[state.position :], 0
        crop, augmentation = schedule.crop_size(epoch), schedule.augmentation(epoch)
        for batch in batches(source, dist.shard(rows), cfg.batch_size_train, crop, channels_last, augmentation):
            start, done = done, done + len(batch.rows) * dist.size
            yield batch._replace(rows=rows[start:done])


def validate_config(cfg: Any, weights_path: Callable[[str], Path]) -> tuple[Any, Path | None]:
    """(the settings with `~` expanded, the file of `pretrained`). Raises UserError for wrong or incompatible ones."""
    cfg = check_settings(cfg)
    weights = weights_path(cfg.pretrained) if cfg.pretrained else None
    if cfg.arch not in ARCHS:
        raise UserError(f"arch = {cfg.arch!r}: must be one of {', '.join(ARCHS)}")
    if max(cfg.crop, cfg.early_crop) > cfg.rescale:
        raise UserError(f"crop = {max(cfg.crop, cfg.early_crop)}: cannot be larger than rescale = {cfg.rescale}")
    if 0 < cfg.early_crop < MIN_SIZE:
        raise UserError(f"early_crop = {cfg.early_crop}: must be 0 or at least {MIN_SIZE}")
    if cfg.scale_min > cfg.scale_max:
        raise UserError(f"scale_min = {cfg.scale_min}: cannot be larger than scale_max = {cfg.scale_max}")
    if cfg.grad_accum_steps > cfg.batch_size_train:
        raise UserError(f"grad_accum_steps = {cfg.grad_accum_steps}: exceeds the batch size {cfg.batch_size_train}")
    if cfg.model_name in ("", "..") or Path(cfg.model_name).name != cfg.model_name:
        raise UserError(f"model_name = {cfg.model_name!r}: must be the name of a folder, without a path")
    if len(os.fsencode(cfg.model_name)) > MAX_NAME:
        raise UserError(f"model_name = {cfg.model_name[:20]!r}...: is too long, the limit is {MAX_NAME} bytes")
    begins = not Path(cfg.saved_models, cfg.model_name, "last.pth").exists()  # a resumed run no longer needs them
    if begins and weights and not weights.is_file():
        raise UserError(f"pretrained = {cfg.pretrained!r}: there is no such checkpoint")
    if cfg.crop < 0.6 * cfg.rescale:
        print(f"warning: crop {cfg.crop} of rescale {cfg.rescale}: trained at {cfg.crop} pixels, used at {cfg.rescale}")
    return cfg, weights
