"""Convolutions and projections whose weight gradient is computed beside the rest of the backward pass.

Nothing before the optimizer needs the gradient of a weight, and on U²-Net's many small maps one kernel does not fill a
GPU: on a second stream the weight gradients (compute-bound) run while the first goes on with the gradients of the
activations (mostly memory-bound). `join` must be called after backward and before the weights' gradients are read.
"""

import functools
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

WAITING = 8  # weight gradients on their way at once; each keeps its input and output gradient in memory

_waiting: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _beside(compute: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
    """What `compute` makes of `inputs`, on the side stream of their GPU; on the CPU at once."""
    device = inputs[0].device
    if device.type != "cuda":
        return compute()
    here, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = compute()
        done = side.record_event()
    # the inputs must not be freed, and their memory given to a kernel of this stream, before the other has read them
    _waiting.append((done, inputs))
    if len(_waiting) > WAITING:
        here.wait_event(_waiting.popleft()[0])
    return result


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
        dw = _beside(lambda: backward([False, True, False])[1], x, dy)
        dx = backward([True, False, False])[0] if ctx.needs_input_grad[0] else None
        return dx, dw, None, None


def convolution(x: Tensor, weight: Tensor, padding: tuple[int, int], dilation: tuple[int, int]) -> Tensor:
    """`F.conv2d` with stride 1 and no bias; on a GPU the gradient of `weight` is ready only after `join`."""
    if x.is_cuda:
        return _Convolution.apply(x, weight, padding, dilation)
    return F.conv2d(x, weight, None, 1, padding, dilation)


class _Projection(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, v: Tensor, parts: int, tokens_first: bool):
        ctx.save_for_backward(weight, v)
        many = [w.expand(v.shape[0], -1, -1) for w in weight.chunk(parts)]
        if tokens_first:
            results = [torch.bmm(v.transpose(1, 2), w.transpose(1, 2)).transpose(1, 2) for w in many]
        else:
            results = [torch.bmm(w, v) for w in many]
        return results[0] if parts == 1 else tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        weight, v = ctx.saved_tensors

        def weight_gradient() -> Tensor:
            each = [torch.bmm(g, v.transpose(1, 2)).sum(0) for g in grads]
            return torch.cat(each) if len(each) > 1 else each[0]

        dw = _beside(weight_gradient, v, *grads)
        dv = None
        for w, g in zip(weight.chunk(len(grads)), grads, strict=True):
            many = w.t().expand(v.shape[0], -1, -1)
            dv = torch.bmm(many, g) if dv is None else torch.baddbmm(dv, many, g)
        return dw, dv, None, None


def projection(weight: Tensor, v: Tensor, parts: int = 1, tokens_first: bool = False):
    """weight @ v: (rows, columns), (B, columns, L) -> (B, rows, L), in memory so or, `tokens_first`, as (B, L, rows).

    With parts > 1 a tuple of the result's rows in so many tensors. On a GPU the gradient of `weight` is ready only
    after `join`.
    """
    return _Projection.apply(weight, v, parts, tokens_first)


def join(device: torch.device) -> None:
    """Makes the current stream wait for all weight gradients."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
        _waiting.clear()
