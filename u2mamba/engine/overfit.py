"""The check to make before any training: can this network learn a handful of pairs by heart?"""

import itertools
import time
from pathlib import Path

from u2mamba.dataset.batches import DataSource, validation_batches
from u2mamba.engine.logger import write_picture
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import preview, validate
from u2mamba.runtime.errors import EXIT_OK, StopSignal, UserError

GOAL = 0.95  # IoU
LEAST_OBJECT = 0.01  # share of the picture: an empty mask, or one of a few pixels, shows nothing
MOST_STEPS = 500  # the small network needs 50 to 100 for one pair


def overfit(
    step: TrainStep,
    source: DataSource,
    count: int,
    batch_size: int,
    channels_last: bool,
    folder: Path,
    stop: StopSignal,
) -> int:
    """Trains on `count` pairs as they are, neither cropped nor flipped, until their IoU is above GOAL -> exit code.

    Measured as a user will: in eval mode, by the running statistics of batch norm. Writes `folder`/preview.png.
    Raises UserError when MOST_STEPS do not suffice, there are too few pairs that show an object, or several processes.
    """
    if step.mean_of_all.world.size > 1:
        raise UserError(f"overfit = {count}: is a check that one process makes, without torchrun")
    singles = zip(itertools.count(), validation_batches(source, batch_size=1, channels_last=channels_last))
    chosen = list(itertools.islice((i for i, batch in singles if batch.y.mean() > LEAST_OBJECT), count))
    if len(chosen) < count:
        raise UserError(f"overfit = {count}: only {len(chosen)} training pairs have a mask that shows an object")
    print(f"overfit: {', '.join(source.pairs[i].image.name for i in chosen[:5])}{', ...' if count > 5 else ''}")
    endless = itertools.chain.from_iterable(
        validation_batches(source, chosen, batch_size, channels_last) for _ in itertools.count()
    )
    started, steps, iou = time.monotonic(), 0, 0.0
    while steps < MOST_STEPS and iou <= GOAL and not stop:
        for batch in itertools.islice(endless, 10):
            step(batch.x, batch.y)
        steps += 10
        means = step.read()
        step.reset()
        figures = validate(step.net, validation_batches(source, chosen, batch_size, channels_last), stop)
        iou = figures["IoU"] if figures else iou
        print(f"[ite: {steps}] train loss: {means.loss:.3f}, tar: {means.losses[0]:.3f}, IoU: {iou:.3f}", flush=True)
    shown = next(validation_batches(source, chosen[:6], channels_last=channels_last))
    where = str(folder / "preview.png")
    try:
        write_picture(preview(step.net, shown.x, shown.y), folder / "preview.png")
    except OSError as error:
        where += f" (could not be written: {error.strerror or error})"
    if stop:
        return stop.exit_code
    told = f"IoU {iou:.3f} after {steps} iterations, {time.monotonic() - started:.0f} s; {where}"
    if iou <= GOAL:
        raise UserError(
            f"overfit failed, {told} shows image, mask, map: look whether the masks belong to the images, then try "
            "another lr (1e-3 for Adam)"
        )
    print(f"overfit: learned, {told}")
    return EXIT_OK
