"""What every benchmark shares: its command line, a description of the hardware, and timing."""

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch
import tyro

from u2mamba.runtime.environment import provenance
from u2mamba.runtime.errors import one_line_errors


def cli(main: Callable, config: type, doc: str, *more: object) -> None:
    """Runs `main` with the `config` of the command line."""
    with one_line_errors():
        sys.exit(main(tyro.cli(config, description=doc, use_underscores=True), *more))


def print_hardware(device: torch.device) -> None:
    """Prints processor, device, versions and commit, above a table."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # macOS and Windows have none
        cpu = next((row.split(":")[1].strip() for row in file if row.startswith("model name")), cpu)
    print(f"{cpu}, {os.cpu_count()} cores ({torch.get_num_threads()} threads)")
    versions = {"Python": platform.python_version()} | provenance(device)
    print(", ".join(f"{name} {value}" for name, value in versions.items()), flush=True)


def median_and_spread(values: list[float]) -> tuple[float, float]:
    """(median, half the distance between the smallest and the largest value)."""
    return statistics.median(values), (max(values) - min(values)) / 2


def time_in_turn(
    variants: dict[str, Callable[[], object]], device: torch.device, runs: int, calls: int = 1, warm_up: int = 1
) -> dict[str, tuple[float, float]]:
    """Seconds per call of each variant: median and spread of `runs` runs of `calls` calls, after `warm_up` calls.

    The variants alternate, so that a busy machine slows all of them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for run in range(1 + runs):
        for name, call in variants.items():
            synchronize()
            start = time.perf_counter()
            for _ in range(calls if run else warm_up):
                call()
            synchronize()
            seconds[name].append((time.perf_counter() - start) / calls)
    return {name: median_and_spread(values[1:]) for name, values in seconds.items()}
