"""The environment of a run: device, precision, memory format, memory, random seeds. Chosen once, at start."""

import contextlib
import ctypes
import os
import platform
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from u2mamba.runtime.cores import granted_cores
from u2mamba.runtime.errors import UserError

VERSION = "0.2.0"
ROOT = Path(__file__).parents[2]
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
MMAP_BLOCK = 128 << 10  # bytes: glibc's default size above which a block gets its own mapping
CGROUP_FILES = (  # memory limit and use of a container, control groups version 2 and version 1
    ("/sys/fs/cgroup", "memory.max", "memory.current"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
)


@dataclass(frozen=True)
class Environment:
    """Device and precision of a run: "fp32", or "bf16" with autocast, channels_last and weights in fp32."""

    device: torch.device
    precision: str = "fp32"

    @classmethod
    def choose(cls, cfg: Any, dist: Any) -> "Environment":
        """The environment for the settings `device`, `gpu`, `precision`, `seed`, `deterministic`; prints it.

        dist: the `DistContext`. Raises UserError for an unavailable device.
        """
        seed_everything(cfg.seed, cfg.deterministic)
        device, device_line = choose_device(cfg.device, cfg.gpu + dist.local_rank)
        precision, precision_line = choose_precision(cfg.precision, device)
        batch = f"batch size {cfg.batch_size_train}" + " each" * (dist.size > 1)
        print(f"device: {device_line}\nprocesses: {dist.size}, {batch}\nprecision: {precision_line}")
        # for operations that stay in fp32, TF32 is as precise as the bf16 around them
        torch.set_float32_matmul_precision("high" if precision == "bf16" and device.type == "cuda" else "highest")
        return cls(device, precision)

    @property
    def channels_last(self) -> bool:
        return self.precision == "bf16"

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def autocast(self) -> torch.autocast:
        """A context for the forward pass. No cache of cast weights, which a captured CUDA graph must not hold."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False)


def choose_device(wanted: str = "auto", gpu: int = 0) -> tuple[torch.device, str]:
    """The requested device ("cuda", "mps" or "cpu"; "auto": the best available), and a line that describes it.

    gpu: index among the GPUs visible to CUDA. Raises UserError if the device is unavailable.
    """
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(wanted, True):
        raise UserError(f'device = "{wanted}": PyTorch finds no such GPU; use device = "auto" or "cpu"')
    if wanted in ("auto", "cuda") and there["cuda"]:
        count = torch.cuda.device_count()
        if gpu >= count:
            raise UserError(f"gpu = {gpu}: there are {count} GPUs, numbered from 0; each process uses one")
        torch.cuda.set_device(gpu)
        name, memory = torch.cuda.get_device_name(gpu), torch.cuda.get_device_properties(gpu).total_memory
        return torch.device("cuda", gpu), f"GPU {gpu} of {count}, {name}, {memory / 2**30:.0f} GiB"
    if wanted in ("auto", "mps") and there["mps"]:
        return torch.device("mps"), f"Apple GPU ({platform.processor() or platform.machine()})"
    reason = "" if wanted == "cpu" else ", PyTorch finds no GPU"
    if (cores := granted_cores()) < torch.get_num_threads():  # PyTorch does not know the quota of a container
        torch.set_num_threads(cores)
    return torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads on {cores} cores{reason}"


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision, "bf16" only where the device is fast in it, and a line with the reason for a fallback."""
    reason = ""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        reason = "bf16 requires compute capability 8.0"
    elif device.type == "cpu" and not _cpu_has_bf16():
        reason = "this CPU has no bf16 instructions"
    elif device.type == "mps":
        reason = "bf16 autocast is not used on Apple GPUs"
    return ("fp32", f"fp32 ({reason})") if wanted == "bf16" and reason else (wanted, wanted)


def _cpu_has_bf16() -> bool:
    """AVX-512 BF16 or AMX: without them bf16 is emulated and slower than fp32."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds all generators. deterministic: bitwise reproducible runs on a GPU too.

    Call it before the first GPU operation, since cuBLAS reads its setting once. The Triton kernels are deterministic:
    they sum in a fixed order, without atomic additions.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic  # images of one size: the fastest convolution is found once
    torch.backends.cudnn.deterministic = deterministic
    # warn_only: PyTorch flags non-overlapping max pooling and histograms as nondeterministic, which they are not
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the published transforms draw from it
    torch.manual_seed(seed)


@contextlib.contextmanager
def cudnn_benchmark_disabled() -> Iterator[None]:
    """Inside the block, cuDNN uses its default algorithm: the search takes seconds, too long for a few passes."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def available_memory() -> int:
    """Bytes that can be allocated without swapping, within the limit of a container."""
    free = psutil.virtual_memory().available
    for root, limit, used in CGROUP_FILES:
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            stat = dict(line.split() for line in Path(root, "memory.stat").read_text().splitlines())
            reclaimable = int(stat.get("inactive_file", 0))  # page cache
            free = min(free, int(Path(root, limit).read_text()) - int(Path(root, used).read_text()) + reclaimable)
    return max(0, free)


def memory_in_use(device: torch.device) -> float:
    """GiB that PyTorch has reserved on a GPU, or that this process occupies."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    return psutil.Process().memory_info().rss / 2**30


def peak_memory() -> int:
    """Bytes that this process occupied at most, on Linux."""
    import resource  # POSIX only

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed; on a CPU PyTorch has no class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


class HeapRetention:
    """Inside the block, from the second entry on, the process keeps memory that CPU tensors free (glibc only).

    glibc returns each large block to the system and maps another, whose pages the kernel zeroes one by one: 4 to 30 %
    of a training step. Retention uses up to 40 % more memory, so half of the peak must be free in addition. Outside
    the block, glibc's defaults apply: retention made other work grow from 2 to 16 GB.
    """

    def __init__(self, device: torch.device):
        self.ran_before = self.active = False
        glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
        self.mallopt = ctypes.CDLL(None).mallopt if glibc else None

    def __enter__(self) -> None:
        if not self.ran_before or not self.mallopt:  # the peak is known once the block has run
            return
        free = available_memory() + psutil.Process().memory_info().rss
        was_active, self.active = self.active, free > 1.5 * peak_memory()
        if self.active:
            self.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
            self.mallopt(M_MMAP_MAX, 0)  # no block gets its own mapping
        elif was_active:
            self.mallopt(M_TRIM_THRESHOLD, MMAP_BLOCK)

    def __exit__(self, *_: object) -> None:
        self.ran_before = True
        if self.active:
            self.mallopt(M_MMAP_MAX, 65536)  # glibc's default
            self.mallopt(M_MMAP_THRESHOLD, MMAP_BLOCK)


def provenance(device: torch.device) -> dict[str, str]:
    """What config.json and last.pth record about the origin of a run: version, git commit, PyTorch, device."""
    commit = "unknown"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty= with changes"]
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.check_output(git, text=True, stderr=subprocess.DEVNULL).strip()  # noqa: S603
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {"version": VERSION, "commit": commit, "torch": str(torch.__version__), "device": name}
