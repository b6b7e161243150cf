"""What every Triton kernel here needs around it: Triton if there is one, a device to launch on, a layout."""

import contextlib
import functools
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # PyTorch for macOS, Windows and the CPU comes without Triton; the slow definitions serve there
    triton = tl = constexpr = None


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's own switch, read when a kernel is defined
_compiling: list | None = None  # what was compiled inside `compile_only`

if triton is not None:

    class _Kernel(triton.JITFunction):
        def run(self, *args, grid, warmup, **kwargs):
            compiled = super().run(*args, grid=grid, warmup=warmup or _compiling is not None, **kwargs)
            if _compiling is not None:
                _compiling.append(compiled)
            return compiled


def jit(*no_specialize: str):
    """`triton.jit` that does not compile anew for each value of the arguments named; does nothing without Triton."""
    if triton is None:
        return lambda kernel: kernel
    if _INTERPRETED:
        return triton.jit(do_not_specialize=list(no_specialize))
    return lambda kernel: _Kernel(kernel, do_not_specialize=list(no_specialize))


@contextlib.contextmanager
def compile_only() -> Iterator[None]:
    """Within it a launch runs nothing: its kernel is compiled, side by side with the others, and ready at the end.

    What kernels should have written is then whatever memory held. Compiled one after the other as they are first
    launched, the kernels of a training step take two minutes; they are kept on the disk for the next start.
    """
    global _compiling
    if triton is None or _INTERPRETED or not torch.cuda.is_available():
        yield
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        _compiling = compiled = []
        try:
            with triton.AsyncCompileMode(pool):
                yield
        finally:
            _compiling = None
        kernels = [kernel.result() if hasattr(kernel, "result") else kernel for kernel in set(compiled)]
        list(pool.map(_build_launcher, kernels))
    for kernel in kernels:  # loading, in this thread: each has a current GPU of its own, and a new one's is the first
        _ = kernel.run


def _build_launcher(kernel) -> None:
    """Older versions of Triton run a C compiler for what launches a kernel: it finds the result of this on the disk.

    The object made here is thrown away, because threads that load extension modules of one name, as the launchers
    are, get each other's functions: Python copies those of a module loaded before into the one loaded last
    (`_imp.create_dynamic`, single-phase initialisation).
    """
    with contextlib.suppress(Exception):  # it only saves time: what is wrong with a kernel, loading it will say
        triton.runtime.driver.active.launcher_cls(kernel.src, kernel.metadata)


@functools.cache
def sm_count(device: torch.device) -> int:
    """Multiprocessors of a GPU; a few for the interpreter."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


def triton_runs(x: Tensor) -> bool:
    """Whether Triton kernels take `x`: floats on a GPU of compute capability 8 up, or under TRITON_INTERPRET=1."""
    if triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.numel() == 0:
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and _INTERPRETED


def on_device(x: Tensor) -> contextlib.AbstractContextManager:
    """Context in which Triton launches on `x`'s GPU (it launches on the current one, whatever its arguments)."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


def rows_of(x: Tensor) -> tuple[Tensor, int]:
    """x (B, C, H, W) with its channels side by side, and the distance in elements between its pixels.

    That distance is C in a channels_last tensor and more in a slice of channels of one; both pass as they are. Any
    other layout (the expanded gradient of a sum, for instance) is copied into channels_last.
    """
    _, C, H, W = x.shape
    stride = x.stride(3)
    wanted = (H * W * stride, 1, W * stride, stride)
    if stride >= C and all(n == 1 or s == want for n, s, want in zip(x.shape, x.stride(), wanted, strict=True)):
        return x, stride
    return x.contiguous(memory_format=torch.channels_last), C
