"""Does a long run grow? The real trainer, with checkpoints, validation, log and pictures, on a network of a few channels.

    python -m benchmarks.long_run                 10,000 iterations on the CPU: minutes
    python -m benchmarks.long_run --device cuda

Prints memory, open files and threads along the way, and exits with 1 where the last figures are above those of the first
tenth by more than the bounds named below.
"""

import dataclasses
import os
import sys
import tempfile
import threading
from pathlib import Path

import torch
import tyro

import u2mamba_train
from benchmarks.hardware import lines
from engine.device import memory_in_use
from engine.run import one_line_errors
from model import U2NET
from train_data.make_demo import make_demo

MOST_GROWTH = {"RSS, MiB": 32.0, "files": 2, "threads": 2, "GPU, MiB": 8.0}  # RSS: the allocator's slack


@dataclasses.dataclass
class Options:
    iterations: int = 10_000
    device: str = "cpu"
    seconds: float = 0.5  # between two looks


class Few(U2NET):
    """U²-Net with 2 channels inside its blocks and 4 between them: all its layers, little arithmetic."""

    table = {stage: (height, 3 if stage == "1" else 4, 2, 4) for stage, height in ()}


def look(device: torch.device) -> dict[str, float]:
    gpu = torch.cuda.memory_reserved(device) / 2**20 if device.type == "cuda" else 0.0
    handles = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    return {
        "RSS, MiB": 1024 * memory_in_use(torch.device("cpu")), "files": handles,
        "threads": threading.active_count(), "GPU, MiB": gpu,
    }  # fmt: skip
