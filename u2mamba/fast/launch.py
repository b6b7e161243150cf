"""Shared by all Triton kernels: the import of Triton if installed, compilation, and checks of device and layout."""

import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from u2mamba.runtime.cores import granted_cores

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # PyTorch for macOS, Windows and the CPU comes without Triton
    triton = tl = constexpr = None


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch, read when a kernel is defined
_compiling: list | None = None  # what was compiled inside `compile_only`

if triton is not None:

    class _Kernel(triton.JITFunction):
        def run(self, *args, grid, warmup, **kwargs):
            compiled = super().run(*args, grid=grid, warmup=warmup or _compiling is not None, **kwargs)
            if _compiling is not None:
                _compiling.append(compiled)
            return compiled


def jit(*no_specialize: str):
    """`triton.jit` that is not specialized for values of the arguments named; does nothing without Triton."""
    if triton is None:
        return lambda kernel: kernel
    return functools.partial(triton.jit if INTERPRETED else _Kernel, do_not_specialize=list(no_specialize))


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Inside it a launch runs nothing: its kernel is compiled, in parallel with the others, and loaded at the end.

    Outputs of kernels are then uninitialized memory. Compiled one after the other at their first launch, the kernels of
    a training step take two minutes; Triton caches them on the disk.
    """
    global _compiling
    if triton is None or INTERPRETED or not torch.cuda.is_available():
        yield
        return
    with ThreadPoolExecutor(granted_cores()) as pool:
        _compiling = compiled = []
        try:
            with triton.AsyncCompileMode(pool):
                yield
        finally:
            _compiling = None
        kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in set(compiled)]
        list(pool.map(_build_launcher, kernels))
    for kernel in kernels:  # loaded in this thread: in a new one the first GPU is the current one
        _ = kernel.run


def compiling() -> bool:
    """Whether this is inside `compile_only`, where results are uninitialized."""
    return _compiling is not None


def _build_launcher(kernel) -> None:
    """Older versions of Triton compile a launcher in C for each kernel; this only fills their cache on the disk.

    The launcher itself is discarded: extension modules of the same name that are loaded in parallel threads get each
    other's functions (`_imp.create_dynamic`, single-phase initialization).
    """
    with contextlib.suppress(Exception):  # only an optimization; loading the kernel raises any real error
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


class Unsupported(ValueError):
    """Raised for inputs that a kernel does not support; the plain operation of model/layers.py does."""


def why_not(device: torch.device) -> str:
    """Why Triton kernels cannot run on `device`; "" where they can: compute capability 8 up, or TRITON_INTERPRET=1."""
    if triton is None:
        return "Triton is not installed"
    if device.type == "cuda":
        return "" if torch.cuda.get_device_capability(device) >= (8, 0) else "they require compute capability 8.0"
    return "" if device.type == "cpu" and INTERPRETED else f"they require a CUDA GPU, and this is {device}"


def require(x: Tensor, channels_last: bool = False, **conditions: bool) -> None:
    """Raises Unsupported unless Triton runs on x's device, dtype and layout are supported, and `conditions` hold."""
    if problem := why_not(x.device):
        raise Unsupported(f"kernels cannot run: {problem}")
    conditions["dtype"] = x.dtype in (torch.float32, torch.bfloat16, torch.float16)
    conditions["size"] = x.numel() > 0
    if channels_last:
        conditions["channels_last"] = x.is_contiguous(memory_format=torch.channels_last) and x.shape[1] > 1
        conditions["size"] = 0 < x[0].numel() < 2**30  # offsets within an image have 32 bits
    if failed := [name.replace("_", " ") for name, holds in conditions.items() if not holds]:
        raise Unsupported(f"not for {', '.join(failed)} of {tuple(x.shape)}, {x.dtype}, strides {x.stride()}")


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on `x`'s GPU (it launches on the current one, whatever its arguments)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def as_channels_last_rows(x: Tensor) -> tuple[Tensor, int]:
    """x (B, C, H, W) with contiguous channels, and the distance in elements between its pixels.

    That distance is C in a channels_last tensor and larger in a slice of its channels; both are returned unchanged. Any
    other layout (the expanded gradient of a sum, for instance) is copied to channels_last.
    """
    _, C, H, W = x.shape
    stride = x.stride(3)
    wanted = (H * W * stride, 1, W * stride, stride)
    if stride >= C and all(n == 1 or s == want for n, s, want in zip(x.shape, x.stride(), wanted, strict=True)):
        return x, stride
    return x.contiguous(memory_format=torch.channels_last), C
