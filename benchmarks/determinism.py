"""Does the same seed give the same weights, and what does `deterministic` cost?

    python -m benchmarks.determinism                  the reference step (fp32, plain layers) and the fast one
    python -m benchmarks.determinism --batch 2 --size 64 --arch u2mambap --steps 10        on a CPU

Runs the same steps from the same seed twice, with and without `deterministic`: the largest difference between the two
in loss and weights, and the time a step. Exits with 1 where deterministic runs differ.
"""

import sys
import time
import warnings
from dataclasses import dataclass

import torch
import tyro

from benchmarks.hardware import lines, wait
from benchmarks.train_step import Options as StepOptions
from benchmarks.train_step import make_step
from u2mamba.runtime.environment import choose_device, seed_everything

WARM_UP = 6  # steps that are not timed: kernels are chosen, the graph is captured


@dataclass
class Options:
    arch: str = "u2mamba"
    mamba_at: str = "bottleneck"
    batch: int = 12
    size: int = 288  # pixels
    steps: int = 50
    device: str = "auto"


def train(options: Options, device: torch.device, published: bool, deterministic: bool):
    """(weights, means of the losses, seconds a step, description) after `steps` steps on made batches."""
    seed_everything(0, deterministic)
    what = StepOptions(arch=options.arch, mamba_at=options.mamba_at)
    step, words, memory_format = make_step(what, device, published, reference_graph=True)
    generator = torch.Generator().manual_seed(1)
    shape = (4, options.batch, 4, options.size, options.size)  # four batches in turn, made on the CPU
    made = torch.rand(shape, generator=generator).to(device)
    for i in range(options.steps):
        if i == min(WARM_UP, options.steps - 1):
            wait(device)
            start, counted = time.perf_counter(), options.steps - i
        pixels = made[i % 4]
        step(pixels[:, :3].contiguous(memory_format=memory_format), (pixels[:, 3:] > 0.7).float())
    wait(device)
    seconds = (time.perf_counter() - start) / counted
    return [p.detach().cpu() for p in step.net.state_dict().values()], step.read().losses, seconds, words


def difference(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max((x.double() - y.double()).abs().max().item() for x, y in zip(a, b, strict=True))


def main(options: Options) -> int:
    seed_everything(
        0, True
    )  # before anything runs on the GPU: cuBLAS reads its setting once, so all runs below have it
    device, _ = choose_device(options.device)
    print("\n".join(lines(device)))
    failed = False
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for published in (True, False):
            speed = {}
            for deterministic in (False, True):
                (a, losses_a, _, words), (b, losses_b, seconds, _) = (
                    train(options, device, published, deterministic) for _ in range(2)
                )
                speed[deterministic] = seconds
                apart, loss = difference(a, b), max(abs(x - y) for x, y in zip(losses_a, losses_b, strict=True))
                failed |= deterministic and apart + loss > 0
                cost = f", {seconds / speed[False]:.2f} times the time without" if deterministic else ""
                print(
                    f"{words}; deterministic = {deterministic}: weights differ by {apart:.3g}, losses by {loss:.3g}; "
                    f"{1e3 * seconds:.2f} ms a step{cost}",
                    flush=True,
                )
    for line in sorted({str(w.message).split(". ")[0][:150] for w in told if "deterministic" in str(w.message)}):
        print(f"warned: {line}")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__, use_underscores=True)))
