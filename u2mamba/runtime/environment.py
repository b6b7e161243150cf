"""What the run computes on: device, precision, threads, random numbers. Decided once, before the loop."""

import contextlib
import ctypes
import os
import platform
import random
from collections.abc import Iterator

import numpy as np
import torch

from model.selective_scan import choose_backend
from u2mamba import fast as kernels
from u2mamba.dataset.cache import available_memory
from u2mamba.fast.launch import triton_runs
from u2mamba.runtime.errors import UserError

try:
    import resource
except ImportError:  # Windows
    resource = None

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of glibc's malloc.h
LARGE = 128 << 10  # bytes of a block that is the system's own, and of what the heap gives back: glibc's at its start


def choose_device(wanted: str = "auto", gpu: int = 0) -> tuple[torch.device, str]:
    """The best device there is, or the one wanted, and a line that names it.

    wanted: "auto", "cuda", "mps" or "cpu"; gpu: index among the GPUs that CUDA shows.
    Raises UserError when the one wanted is not there.
    """
    if wanted == "cuda" and not torch.cuda.is_available():
        raise UserError('device = "cuda": PyTorch sees no CUDA GPU here; use device = "auto" or "cpu"')
    if wanted == "mps" and not torch.backends.mps.is_available():
        raise UserError('device = "mps": PyTorch sees no Apple GPU here; use device = "auto" or "cpu"')
    if wanted in ("auto", "cuda") and torch.cuda.is_available():
        count = torch.cuda.device_count()
        if gpu >= count:
            raise UserError(f"gpu = {gpu}: there are {count} GPUs, numbered from 0; each process takes one")
        torch.cuda.set_device(gpu)
        properties = torch.cuda.get_device_properties(gpu)
        return torch.device(
            "cuda", gpu
        ), f"GPU {gpu} of {count}, {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    if wanted in ("auto", "mps") and torch.backends.mps.is_available():
        return torch.device("mps"), f"Apple GPU ({platform.processor() or platform.machine()})"
    why = "" if wanted == "cpu" else ", PyTorch sees no GPU"
    return torch.device("cpu"), f"CPU, {torch.get_num_threads()} threads of {os.cpu_count()} cores{why}"


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """The precision wanted, or "fp32" with the reason where the device is not made for it."""
    if wanted == "bf16":
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return "fp32", "fp32 (this GPU has no bf16; it came with Ampere, compute capability 8.0)"
        if device.type == "cpu" and not _cpu_has_bf16():
            return "fp32", "fp32 (this CPU has no bf16 instructions)"
        if device.type == "mps":
            return "fp32", "fp32 (bf16 autocast is not tried on Apple GPUs)"
    return wanted, wanted


def choose_layout(channels_last: bool, device: torch.device, precision: str) -> tuple[bool, str]:
    """Whether images lie in memory as channels_last, where that is wanted, and its name, with the reason where not."""
    if channels_last and device.type == "cpu" and precision == "fp32":
        # oneDNN's gradients of the weights: without AVX-512 a step at 288 pixels takes 1.7 times as long
        return False, "NCHW (in fp32 a CPU is faster so)"
    return channels_last, "channels_last" if channels_last else "NCHW"


def choose_kernels(
    wanted: bool, device: torch.device, precision: str, channels_last: bool, sync_batch_norm: bool = False
) -> tuple[bool, str]:
    """Whether the fused Triton kernels run, and a line that says so or why not."""
    if not wanted:
        return False, "plain PyTorch layers"
    missing = [] if device.type == "cuda" else ["a CUDA GPU"]
    missing += [] if triton_runs(torch.empty(1, device=device)) or missing else ["Triton"]
    missing += [] if precision == "bf16" else ['precision = "bf16"']
    missing += [] if channels_last else ["channels_last = True"]
    missing += ["sync_batch_norm = False"] if sync_batch_norm else []
    if missing:
        return False, f"plain PyTorch layers (the fused kernels want {', '.join(missing)})"
    if trouble := _trouble_with_kernels(device):
        return False, f"plain PyTorch layers (the fused kernels do not work here: {trouble})"
    return True, "fused Triton kernels"


def _trouble_with_kernels(device: torch.device) -> str:
    """One line on why a fused kernel fails its trial (no C compiler for Triton, say); empty where it is right."""
    try:
        x = torch.linspace(-1, 1, 2 * 16 * 8 * 8, device=device).view(2, 16, 8, 8)
        x = x.bfloat16().to(memory_format=torch.channels_last)
        results = []
        for norm in (kernels.batch_norm_relu, kernels.batch_norm_relu_reference):
            results.append(norm(x, *(torch.full((16,), v, device=device) for v in (1.0, 0.1, 0.0, 1.0))).float())
        return "" if torch.allclose(*results, atol=0.05) else "its results are wrong"
    except Exception as error:  # whatever a compiler, driver or Triton of another version throws
        return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def choose_scan(device: torch.device, wanted: str) -> tuple[str, str]:
    """The backend of the selective scan and a line on which and why. Raises UserError where it cannot run."""
    try:
        backend, reason = choose_backend(device, wanted)
    except ValueError as error:
        raise UserError(f"scan_backend: {error}") from None
    return backend, f"{backend} ({reason})"


def _cpu_has_bf16() -> bool:
    """AVX-512 BF16 or AMX: without them bf16 is emulated and slower than fp32."""
    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()) and torch.cpu._is_avx512_bf16_supported()
    except (AttributeError, RuntimeError):
        return False


def memory_in_use(device: torch.device) -> float:
    """GiB that PyTorch holds on a GPU, or that the process holds (Linux; 0 where it cannot be told)."""
    if device.type == "cuda":
        return torch.cuda.memory_reserved(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30
    except (OSError, AttributeError):
        return 0.0


def out_of_memory(error: Exception) -> bool:
    """Whether it says that memory did not suffice; on a CPU PyTorch has no class for that."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def peak_memory(device: torch.device) -> float:
    """The most GiB that tensors took on a GPU so far, or that the process took (0 on Windows, which is not asked)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if device.type == "mps":
        return torch.mps.driver_allocated_memory() / 2**30
    if resource is None:
        return 0.0
    unit = 1 if platform.system() == "Darwin" else 1024  # macOS counts bytes, Linux KiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class HeapRetention:
    """`with` it, from the second time on: memory that tensors leave on a CPU stays with the process for the next time.

    glibc gives each large block back to the system and asks for another, which comes zeroed page by page: a sixth of a
    map's time, 4 to 30 % of a training step's. Kept, all takes up to 40 % more, so half as much as the process ever
    took has to be free besides. Outside it large blocks that do not fit into what is kept are the system's: a kept one
    is often a few bytes too small for the next tensor of its size, which made other work grow from 2 to 16 GB.
    """

    def __init__(self, device: torch.device):
        self.device, self.known, self.kept = device, False, False
        glibc = device.type == "cpu" and platform.libc_ver()[0] == "glibc"
        self.mallopt = ctypes.CDLL(None).mallopt if glibc else None

    def __enter__(self) -> None:
        if not self.known or not self.mallopt:  # what it takes is known once it ran
            return
        free, peak = available_memory() / 2**30 + memory_in_use(self.device), peak_memory(self.device)
        was_kept, self.kept = self.kept, free > 1.5 * peak
        if self.kept:
            self.mallopt(M_TRIM_THRESHOLD, -1)  # the heap never shrinks
            self.mallopt(M_MMAP_MAX, 0)  # every block is of the heap
        elif was_kept:
            self.mallopt(M_TRIM_THRESHOLD, LARGE)

    def __exit__(self, *_: object) -> None:
        self.known = True
        if self.kept:
            self.mallopt(M_MMAP_MAX, 65536)  # glibc's own number
            self.mallopt(M_MMAP_THRESHOLD, LARGE)


@contextlib.contextmanager
def cudnn_benchmark_disabled() -> Iterator[None]:
    """Within it cuDNN takes its first choice of a convolution: finding the fastest takes seconds, which some passes
    of a size of their own do not bring back."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


def seed_everything(seed: int, deterministic: bool = False) -> None:
    """Seeds all generators. deterministic: on a GPU, too, the same seed gives the same weights to the last bit.

    Call it before the first work on a GPU, since cuBLAS reads its setting once. Our Triton kernels write each output
    from one place in a fixed order, without atomic adds, and need nothing.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.backends.cudnn.benchmark = not deterministic  # images of one size: the fastest convolution is found once
    torch.backends.cudnn.deterministic = deterministic
    # warn_only: max pooling without overlap and the counts of the metrics pass for nondeterministic and are not
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the reference transforms draw from it, as published
    torch.manual_seed(seed)
