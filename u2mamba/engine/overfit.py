"""Sanity checks: one batch through network, loss and scores before every run; overfitting a few pairs."""

import itertools
import math
import time
from functools import partial
from pathlib import Path

import torch

from model.u2net import as_list
from model.weights import METADATA_KEY, cpu_state_dict, from_state_dict
from u2mamba.dataset.batches import Batch, DataSource, validation_batches
from u2mamba.engine.logger import write_image
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import eval_mode, preview, validate
from u2mamba.runtime.errors import EXIT_OK, Stopped, StopSignal, UserError

TARGET_IOU = 0.95
MIN_FOREGROUND = 0.01  # fraction of the image: a mask of a few pixels cannot show learning
MAX_STEPS = 500  # the small network needs 50 to 100 for one pair


def try_batch(step: TrainStep, batch: Batch, best_by: str) -> None:
    """Network, loss and scores of a batch before anything is written: an edit that cannot work ends here, in one line.

    Runs in every process; changes neither statistics nor random state. Warns where a command could not load the
    weights. Raises UserError, and what edited code raises.
    """
    with torch.random.fork_rng([step.device] if step.device.type == "cuda" else []), eval_mode(step.net) as net:
        with torch.no_grad(), step.env.autocast():
            logits = net(batch.x, logits=True)
        if (size := as_list(logits)[0].shape[2:]) != batch.y.shape[2:]:
            raise UserError(f"the network's first output is of {tuple(size)} pixels, not {tuple(batch.y.shape[2:])}")
        scores = validate(net, [batch], StopSignal(), step.dist)
        for d in as_list(logits):
            d.requires_grad_()
        step.compute_loss(logits, batch.y)
        state = cpu_state_dict(net)
        try:
            from_state_dict(state, state._metadata.get(METADATA_KEY, {}), "the network of this script")
        except ValueError as error:
            print(f"warning: {error}; no other command can load its weights: edit model/ instead")
    for name, value in scores.items():
        if not math.isfinite(value):
            raise UserError(f"the score {name} of SODMetric.compute (u2mamba/engine/validation.py) is {value}")
    if best_by not in scores:
        raise UserError(f"BEST_BY = {best_by!r}: no such score; SODMetric.compute gives {', '.join(scores)}")


def overfit(step: TrainStep, source: DataSource, count: int, batch_size: int, folder: Path) -> int:
    """Trains on `count` pairs without augmentation until their IoU exceeds TARGET_IOU -> exit code.

    Scored in eval mode, as in prediction. Writes `folder`/preview.png. Raises UserError if MAX_STEPS are not enough,
    too few pairs show an object, or there are several processes.
    """
    if step.dist.size > 1:
        raise UserError(f"overfit = {count}: this check runs in one process, without torchrun")
    batches = partial(validation_batches, source, channels_last=step.env.channels_last)
    singles = enumerate(batches(batch_size=1))
    chosen = list(itertools.islice((i for i, batch in singles if batch.y.mean() > MIN_FOREGROUND), count))
    if len(chosen) < count:
        raise UserError(f"overfit = {count}: only {len(chosen)} training pairs have a mask that shows an object")
    print(f"overfit: {', '.join(source.pairs[i].image.name for i in chosen[:5])}{', ...' if count > 5 else ''}")
    endless = itertools.chain.from_iterable(batches(chosen, batch_size) for _ in itertools.count())
    started, steps, iou = time.monotonic(), 0, 0.0
    with StopSignal() as stop:
        try:
            while steps < MAX_STEPS and iou <= TARGET_IOU:
                for batch in itertools.islice(endless, 10):
                    step(batch.x, batch.y)
                steps += 10
                means = step.read()
                step.reset()
                iou = validate(step.net, batches(chosen, batch_size), stop)["IoU"]
                print(f"[ite: {steps}] train loss: {means.loss:.3f}, tar: {means.tar:.3f}, IoU: {iou:.3f}", flush=True)
        except Stopped as signal:
            return signal.exit_code
    shown, path = next(batches(chosen[:6])), folder / "preview.png"
    write_image(preview(step.net, shown.x, shown.y), path)
    result = f"IoU {iou:.3f} after {steps} iterations, {time.monotonic() - started:.0f} s; {path}"
    if iou <= TARGET_IOU:
        raise UserError(
            f"overfit failed, {result} shows image, mask, map: check that the masks match the images, then try "
            "another lr (1e-3 for Adam)"
        )
    print(f"overfit: learned, {result}")
    return EXIT_OK
