"""The sanity check before any training: can this network overfit a few pairs?"""

import itertools
import time
from pathlib import Path

from u2mamba.dataset.batches import DataSource, validation_batches
from u2mamba.engine.distributed import DistContext
from u2mamba.engine.logger import write_image
from u2mamba.engine.step import TrainStep
from u2mamba.engine.validation import preview, validate
from u2mamba.runtime.environment import Environment
from u2mamba.runtime.errors import EXIT_OK, Stopped, StopSignal, UserError

TARGET_IOU = 0.95
MIN_FOREGROUND = 0.01  # fraction of the image: an empty mask, or one of a few pixels, shows nothing
MAX_STEPS = 500  # the small network needs 50 to 100 for one pair


def overfit(
    step: TrainStep, source: DataSource, count: int, batch_size: int, env: Environment, dist: DistContext, folder: Path
) -> int:
    """Trains on `count` pairs, neither cropped nor flipped, until their IoU exceeds TARGET_IOU -> exit code.

    Scored in eval mode, as in use. Writes `folder`/preview.png. Raises UserError when MAX_STEPS do not suffice, too few
    pairs show an object, or there are several processes.
    """
    if dist.size > 1:
        raise UserError(f"overfit = {count}: this check runs in one process, without torchrun")
    layout = {"channels_last": env.channels_last}
    singles = zip(itertools.count(), validation_batches(source, batch_size=1, **layout))
    chosen = list(itertools.islice((i for i, batch in singles if batch.y.mean() > MIN_FOREGROUND), count))
    if len(chosen) < count:
        raise UserError(f"overfit = {count}: only {len(chosen)} training pairs have a mask that shows an object")
    print(f"overfit: {', '.join(source.pairs[i].image.name for i in chosen[:5])}{', ...' if count > 5 else ''}")
    endless = itertools.chain.from_iterable(
        validation_batches(source, chosen, batch_size, **layout) for _ in itertools.count()
    )
    started, steps, iou = time.monotonic(), 0, 0.0
    with StopSignal() as stop:
        try:
            while steps < MAX_STEPS and iou <= TARGET_IOU:
                for batch in itertools.islice(endless, 10):
                    step(batch.x, batch.y)
                steps += 10
                means = step.read()
                step.reset()
                iou = validate(step.net, validation_batches(source, chosen, batch_size, **layout), stop)["IoU"]
                print(f"[ite: {steps}] train loss: {means.loss:.3f}, tar: {means.tar:.3f}, IoU: {iou:.3f}", flush=True)
        except Stopped as signal:
            return signal.exit_code
    shown, where = next(validation_batches(source, chosen[:6], **layout)), str(folder / "preview.png")
    try:
        write_image(preview(step.net, shown.x, shown.y), folder / "preview.png")
    except OSError as error:
        where += f" (could not be written: {error.strerror or error})"
    result = f"IoU {iou:.3f} after {steps} iterations, {time.monotonic() - started:.0f} s; {where}"
    if iou <= TARGET_IOU:
        raise UserError(
            f"overfit failed, {result} shows image, mask, map: check whether the masks belong to the images, then try "
            "another lr (1e-3 for Adam)"
        )
    print(f"overfit: learned, {result}")
    return EXIT_OK
