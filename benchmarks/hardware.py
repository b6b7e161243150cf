"""What a benchmark ran on, as lines, and the median and spread of its runs."""

import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

import torch


def lines(device: torch.device) -> list[str]:
    """Hardware and versions, to stand above every table."""
    cpu = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            cpu = next((row.split(":")[1].strip() for row in file if row.startswith("model name")), cpu)
    except OSError:
        pass
    gpu = ""
    if device.type == "cuda":
        p = torch.cuda.get_device_properties(device)
        gpu = f", {p.name}, {p.total_memory / 2**30:.0f} GiB"
    versions = f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}"
    if gpu:
        versions += f", CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    return [f"{cpu}, {os.cpu_count()} cores ({torch.get_num_threads()} threads){gpu}", versions]


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_calls(
    call: Callable[[], object], device: torch.device, runs: int, calls: int = 1, warm_up: int = 1
) -> list[float]:
    """Seconds a call in each of `runs` runs of `calls` calls, by the wall clock around a waiting device."""
    for _ in range(warm_up):
        call()
    seconds = []
    for _ in range(runs):
        wait(device)
        start = time.perf_counter()
        for _ in range(calls):
            call()
        wait(device)
        seconds.append((time.perf_counter() - start) / calls)
    return seconds


def median_and_spread(seconds: list[float]) -> tuple[float, float]:
    """(median, half the distance between the fastest and the slowest)."""
    return statistics.median(seconds), (max(seconds) - min(seconds)) / 2
