"""Convolutions and projections whose weight gradients are computed on a second stream.

Nothing before the optimizer needs the gradient of a weight, and on U²-Net's many small maps one kernel does not fill a
GPU: the weight gradients (compute-bound) run while the first stream continues with the gradients of the activations
(mostly memory-bound). `may_wait` is called in the backward pass; where it is true, nothing may read the weight's
gradient before `wait_for_weight_grads`.
"""

import functools
from collections import deque
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

MAX_IN_FLIGHT = 8  # weight gradients computed at once; each keeps its input and output gradient in memory

_in_flight: deque[tuple[torch.cuda.Event, tuple[Tensor, ...]]] = deque()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def _weight_gradient(may_wait: Callable[[], bool], compute: Callable[[], Tensor], *inputs: Tensor) -> Tensor:
    """compute(), which reads `inputs`: on the side stream of their GPU where the result may wait, else at once."""
    device = inputs[0].device
    if device.type != "cuda" or not may_wait():
        return compute()
    here, side = torch.cuda.current_stream(device), _side_stream(device)
    side.wait_stream(here)
    with torch.cuda.stream(side):
        result = compute()
        done = side.record_event()
    # the inputs must not be freed, and their memory given to a kernel of this stream, before the other has read them
    _in_flight.append((done, inputs))
    if len(_in_flight) > MAX_IN_FLIGHT:
        here.wait_event(_in_flight.popleft()[0])
    return result


class Conv2d(torch.autograd.Function):
    """apply(x, weight, conv, may_wait): `conv` of x with `weight` in place of its own, without bias."""

    @staticmethod
    def forward(ctx, x, weight, conv, may_wait):
        ctx.save_for_backward(x, weight)
        ctx.may_wait = may_wait
        geometry = conv.stride, conv.padding, conv.dilation
        ctx.geometry = (*map(list, geometry), False, [0, 0], conv.groups)
        return F.conv2d(x, weight, None, *geometry, conv.groups)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        backward = functools.partial(torch.ops.aten.convolution_backward, dy, x, weight, None, *ctx.geometry)
        dx = dw = None
        if ctx.needs_input_grad[1]:
            dw = _weight_gradient(ctx.may_wait, lambda: backward([False, True, False])[1], x, dy)
        if ctx.needs_input_grad[0]:
            dx = backward([True, False, False])[0]
        return dx, dw, None, None


class Projection(torch.autograd.Function):
    """apply(weight, v, parts, tokens_first, may_wait): weight @ v as `PlainOps.project` defines it."""

    @staticmethod
    def forward(ctx, weight, v, parts, tokens_first, may_wait):
        ctx.may_wait = may_wait
        ctx.save_for_backward(weight, v)
        batched = [w.expand(v.shape[0], -1, -1) for w in weight.chunk(parts)]
        if tokens_first:
            results = [torch.bmm(v.transpose(1, 2), w.transpose(1, 2)).transpose(1, 2) for w in batched]
        else:
            results = [torch.bmm(w, v) for w in batched]
        return results[0] if parts == 1 else tuple(results)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads: Tensor):
        weight, v = ctx.saved_tensors

        def weight_gradient() -> Tensor:
            each = [torch.bmm(g, v.transpose(1, 2)).sum(0) for g in grads]
            return torch.cat(each) if len(each) > 1 else each[0]

        dw = _weight_gradient(ctx.may_wait, weight_gradient, v, *grads) if ctx.needs_input_grad[0] else None
        dv = None
        for w, g in zip(weight.chunk(len(grads)), grads, strict=True):
            batched = w.t().expand(v.shape[0], -1, -1)
            dv = torch.bmm(batched, g) if dv is None else torch.baddbmm(dv, batched, g)
        return dw, dv, None, None, None


def wait_for_weight_grads(device: torch.device) -> None:
    """Makes the current stream wait for all weight gradients that the side stream computes."""
    if _in_flight:  # a captured stream must not wait for one that is not part of the capture
        torch.cuda.current_stream(device).wait_stream(_side_stream(device))
        _in_flight.clear()
