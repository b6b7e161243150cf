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


def lines(device: torch.device) -> list[str]:
    """Processor, then device, versions and commit, to print above a table."""
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:  # macOS and Windows have none
        cpu = next((row.split(":")[1].strip() for row in file if row.startswith("model name")), cpu)
    versions = {"Python": platform.python_version()} | provenance(device)
    return [
        f"{cpu}, {os.cpu_count()} cores ({torch.get_num_threads()} threads)",
        ", ".join(f"{name} {value}" for name, value in versions.items()),
    ]


def time_calls(
    call: Callable[[], object], device: torch.device, runs: int, calls: int = 1, warm_up: int = 1
) -> list[float]:
    """Seconds per call in each of `runs` runs of `calls` calls, the device synchronized before and after each run."""
    seconds = []
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for run in range(-1, runs):  # the first run is the warm-up
        synchronize()
        start = time.perf_counter()
        for _ in range(warm_up if run < 0 else calls):
            call()
        synchronize()
        seconds.append((time.perf_counter() - start) / calls)
    return seconds[1:]


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """(median, half the distance between the fastest and the slowest run)."""
    return statistics.median(seconds), (max(seconds) - min(seconds)) / 2


def in_turn(variants: dict[str, Callable[[], object]], device: torch.device, runs: int) -> dict[str, list[float]]:
    """Seconds of each variant's runs. The variants alternate, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(runs):
        for name, call in variants.items():
            seconds[name] += time_calls(call, device, runs=1, warm_up=0)
    return seconds


def in_cuda_graph(call: Callable[[], object]) -> Callable[[], None]:
    """The call captured in a CUDA graph, as a function that replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay
