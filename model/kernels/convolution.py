"""A convolution whose weight gradient is computed beside the rest of the backward pass.

Nothing before the optimizer needs the gradient of a weight, and on U²-Net's many small maps one kernel does not fill a
GPU: on a second stream the weight gradients (compute-bound) run while the first goes on with the gradients of the
activations (mostly memory-bound). `join` must be called after backward and before the weights' gradients are read.
"""

import functools
from collections import deque

import torch
import torch.nn.functional as F
from torch import Tensor

WAITING = 8  # weight gradients on their way at once; each keeps its input and output gradient in memory

_waiting: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.geometry = ([1, 1], list(padding), list(dilation), False, [0, 0], 1)
        return F.conv2d(x, weight, None, 1, padding, dilation)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor):
        x, weight = ctx.saved_tensors
        backward = functools.partial(torch.ops.aten.convolution_backward, dy, x, weight, None, *ctx.geometry)
        here, side = torch.cuda.current_stream(dy.device), _side_stream(dy.device)
        side.wait_stream(here)
        with torch.cuda.stream(side):
            dw = backward([False, True, False])[1]
            done = side.record_event()
        dx = backward([True, False, False])[0] if ctx.needs_input_grad[0] else None
        # x and dy must not be freed, and their memory given to a kernel of this stream, before the other has read them
        _waiting.append((done, x, dy))
        if len(_waiting) > WAITING:
            here.wait_event(_waiting.popleft()[0])
        return dx, dw, None, None


def convolution(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """`F.conv2d` with stride 1 and no bias; on a GPU the gradient of `weight` is ready only after `join`."""
    if x.is_cuda:
        return _Convolution.apply(x, weight, padding, dilation)
    return F.conv2d(x, weight, None, 1, padding, dilation)


def join(device: torch.device) -> None:
    """Makes the current stream wait for all weight gradients."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
        _waiting.clear()
