"""What every Triton kernel here needs around it: Triton if there is one, a device to launch on, a layout."""

import contextlib
import os

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.language import constexpr
except ImportError:  # PyTorch for macOS, Windows and the CPU comes without Triton; the slow definitions serve there
    triton = tl = constexpr = None


def jit(*no_specialize: str):
    """`triton.jit` that does not compile anew for each value of the arguments named; does nothing without Triton."""
    if triton is None:
        return lambda kernel: kernel
    return triton.jit(do_not_specialize=list(no_specialize))


def triton_runs(x: Tensor) -> bool:
    """Whether Triton kernels take `x`: floats on a GPU of compute capability 8 up, or under TRITON_INTERPRET=1."""
    if triton is None or x.dtype not in (torch.float32, torch.bfloat16, torch.float16) or x.numel() == 0:
        return False
    if x.is_cuda:
        return torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"


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
