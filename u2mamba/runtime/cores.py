"""The number of CPU cores granted to the process. Without PyTorch, which evaluating saved maps does not load."""

import contextlib
import os
from pathlib import Path

import psutil

CPU = Path("/sys/fs/cgroup/cpu")
QUOTA_FILES = (  # quota and period of a container, control groups version 2 and version 1
    (CPU.with_name("cpu.max"),),
    (CPU / "cpu.cfs_quota_us", CPU / "cpu.cfs_period_us"),
)


def granted_cores() -> int:
    """CPU cores that this process may use: CPU affinity (not on macOS) and the quota of its container, at least 1."""
    affinity = getattr(psutil.Process(), "cpu_affinity", None)
    cores = len(affinity()) if affinity else os.cpu_count() or 1
    for files in QUOTA_FILES:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            quota, period = map(int, " ".join(file.read_text() for file in files).split())
            cores = min(cores, max(1, quota // period)) if quota > 0 else cores
    return cores
