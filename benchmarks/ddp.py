"""How does the training step scale over the GPUs of one host?

    python -m benchmarks.ddp                   1, 2, 4, 8 processes, as far as there are GPUs; the table in one run

Each process takes a GPU and the same batch; efficiency is the images/s of n processes over n times those of one. The
all-reduce alone, of as many bytes as the gradients have, tells how much of a step it is. On the CPU: 1 and 2 processes.
"""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from benchmarks.hardware import lines, median_and_spread, time_calls
from benchmarks.train_step import Options as StepOptions
from benchmarks.train_step import make_step
from u2mamba.engine.distributed import DistContext, init_distributed
from u2mamba.runtime.environment import choose_device

ROOT = Path(__file__).parents[1]
MARK = "measured: "  # begins the line by which the first process answers


@dataclass
class Options:
    arch: str = "u2mamba"
    processes: tuple[int, ...] = (1, 2, 4, 8)
    batches: tuple[int, ...] = (12, 32)  # pairs a process
    size: int = 288  # pixels
    runs: int = 5
    steps: int = 20  # a run
    device: str = "auto"
    worker: bool = False  # what torchrun starts


def measure(options: Options, world: DistContext) -> None:
    """Prints a line of JSON for each batch size: [batch, seconds a step, spread, seconds of the all-reduce, words]."""
    device, _ = choose_device(options.device, world.local_rank)
    torch.backends.cudnn.benchmark = True
    for batch in options.batches:
        step, words, memory_format = make_step(StepOptions(arch=options.arch), device, published=False, world=world)
        images = torch.randn(batch, 3, options.size, options.size, device=device).to(memory_format=memory_format)
        masks = (torch.rand(batch, 1, options.size, options.size, device=device) > 0.7).float()
        seconds = time_calls(lambda s=step, x=images, y=masks: s(x, y), device, options.runs, options.steps, warm_up=6)
        gradients = torch.zeros(sum(p.numel() for p in step.parameters), device=device)
        alone = time_calls(lambda g=gradients: world.mean(g), device, options.runs, options.steps, warm_up=3)
        print(MARK + json.dumps([batch, *median_and_spread(seconds), median_and_spread(alone)[0], words]), flush=True)


def main(options: Options) -> None:
    device, _ = choose_device(options.device)
    most = torch.cuda.device_count() if device.type == "cuda" else 2
    print("\n".join(lines(device)))
    print(f"{options.arch}, {options.size}x{options.size}, {options.runs} runs of {options.steps} steps", flush=True)
    words = f"--arch {options.arch} --size {options.size} --runs {options.runs} --steps {options.steps}".split()
    words += ["--device", options.device, "--batches", *map(str, options.batches)]
    alone = {}
    for n in (n for n in options.processes if n <= most):
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={n}"]
        command = [*launch, "-m", "benchmarks.ddp", "--worker", *words]
        done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
        for line in done.stdout.splitlines():
            if line.startswith(MARK):
                batch, seconds, spread, reduce, description = json.loads(line.removeprefix(MARK))
                alone.setdefault(batch, seconds)  # of the fewest processes: one, unless asked otherwise
                print(
                    f"{n} x batch {batch:3}: {n * batch / seconds:7.1f} img/s, {1e3 * seconds:7.2f} ms +- "
                    f"{1e3 * spread:.2f}, efficiency {alone[batch] / seconds:6.1%}, all-reduce alone "
                    f"{1e3 * reduce:.2f} ms  {description}",
                    flush=True,
                )


if __name__ == "__main__":
    chosen = tyro.cli(Options, description=__doc__, use_underscores=True)
    if chosen.worker:
        with init_distributed() as joined_world:
            measure(chosen, joined_world)
    else:
        main(chosen)
