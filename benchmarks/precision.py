"""Does the fast step (bf16, channels_last, fused kernels, one CUDA graph) learn what the fp32 reference learns?

    python -m benchmarks.precision --data_dir train_data

Both start from the same weights and see the same batches; printed are the running means of the loss since the start and
their relative difference.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import tyro

from benchmarks.hardware import lines
from benchmarks.train_step import Options as StepOptions
from benchmarks.train_step import make_step
from data_loader import Batch, DataSource, batches, epoch_plan, open_data
from u2mamba.runtime.environment import choose_device


@dataclass
class Options:
    data_dir: str = "train_data"
    steps: int = 200
    batch: int = 12
    arch: str = "u2mamba"
    mamba_at: str = "bottleneck"


def endless(source: DataSource, batch: int, channels_last: bool) -> Iterator[Batch]:
    """Whole batches of one epoch after the other."""
    for epoch in itertools.count():
        plan = epoch_plan(len(source), epoch, seed=0)
        yield from batches(source, plan[: len(plan) // batch * batch], batch, channels_last=channels_last)


def main(options: Options) -> None:
    device, _ = choose_device()
    print("\n".join(lines(device)))
    root = Path(options.data_dir, "DUTS-TR", "DUTS-TR")
    source = open_data(root / "im_aug", root / "gt_aug").train.to(device)
    what = StepOptions(arch=options.arch, mamba_at=options.mamba_at)
    means = []
    for published in (True, False):
        step, words, memory_format = make_step(what, device, published, reference_graph=True)
        print(("reference: " if published else "fast: ") + words, flush=True)
        means.append([])
        for i, batch in zip(range(1, options.steps + 1), endless(source, options.batch, not published), strict=False):
            step(batch.x.to(memory_format=memory_format), batch.y)
            if i % 25 == 0:
                means[-1].append(step.read().loss)
        del step
    for i, (reference, fast) in enumerate(zip(*means, strict=True), start=1):
        print(f"ite {25 * i:4}: {reference:.4f} {fast:.4f}  {100 * (fast / reference - 1):+.2f} %")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__, use_underscores=True))
