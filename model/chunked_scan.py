"""The selective scan in pure PyTorch, backend "torch" of `model.selective_scan`, which explains the symbols.

`scan` processes the tokens in blocks of lanes x steps; a lane is `steps` consecutive tokens. The decays and states of a
block are buffers (tokens, b, n, d) that stay in the CPU's cache; its lanes advance in parallel, which hides the 2 µs
overhead of a PyTorch call. Only the state before each block is kept for the backward pass, which recomputes the others.
docs/performance.md compares its time with that of the loop.

`traceable_scan` computes the same in some 250 plain operations.
"""

import contextlib
import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

LOG2_E = 1 / math.log(2)  # exp(x) = exp2(x log2 e): on AVX-512 torch.exp2 takes a third of the time of torch.exp
TRACED_STEPS = 16  # steps of a traced graph: its states are (b, d, n, L/16), as large as u at n = 16


def scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """u, delta (b, d, L), A (d, n), B, C (b, n, L), all of one dtype -> y (b, d, L), without D and gate."""
    return _ChunkedScan.apply(u, delta, A, B, C)


def traceable_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """The same, out of place: the steps of all chunks in parallel from zero states, a log-depth scan over their last
    states (Hillis & Steele 1986), and the steps again from the right states."""
    L = int(u.shape[2])  # tracing makes a tensor of it
    steps = min(TRACED_STEPS, L)
    chunks = -(-L // steps)

    def split(v: Tensor, missing: int) -> tuple[Tensor, ...]:  # -> (b, d, 1, chunks) or (b, 1, n, chunks) for each step
        return F.pad(v, (0, chunks * steps - L)).unflatten(2, (chunks, steps)).unsqueeze(missing).unbind(4)

    inputs = list(zip(split(delta, 2), split(delta * u, 2), split(B, 1), split(C, 1), strict=True))
    A = A[:, :, None]  # (d, n, 1)

    def advance(h: Tensor | None, delta_t: Tensor, x_t: Tensor, B_t: Tensor) -> Tensor:  # -> (b, d, n, chunks)
        return x_t * B_t if h is None else torch.exp(delta_t * A) * h + x_t * B_t

    h = None
    if chunks > 1:
        for delta_t, x_t, B_t, _ in inputs:
            h = advance(h, delta_t, x_t, B_t)
        decay = torch.exp(sum(delta_t for delta_t, *_ in inputs) * A)
        for level in range((chunks - 1).bit_length()):
            shift = 2**level
            h = h + decay * F.pad(h[..., :-shift], (shift, 0))
            decay = decay * F.pad(decay[..., :-shift], (shift, 0))
        h = F.pad(h[..., :-1], (1, 0))
    ys = []
    for delta_t, x_t, B_t, C_t in inputs:
        h = advance(h, delta_t, x_t, B_t)
        ys.append((h * C_t).sum(2))  # (b, d, chunks)
    return torch.stack(ys, 3).flatten(2)[..., :L]


def _block_shape(u: Tensor, n: int) -> tuple[int, int]:
    """(lanes, steps) of a block. On a CPU a step of 2¹⁴ elements hides the calls and a block stays in the cache;
    elsewhere the number of launches counts, and a block has up to 2²⁴ elements."""
    b, d, L = u.shape
    steps, elements = (16, 2**14) if u.device.type == "cpu" else (32, 2**19)
    steps = min(steps, math.isqrt(L - 1) + 1)
    return max(1, min(elements // (b * d * n), -(-L // steps), 64)), steps


@contextlib.contextmanager
def _single_threaded(u: Tensor, n: int) -> Iterator[None]:
    """No autocast; and one thread where a token has less than 2¹⁵ elements, PyTorch's own grain size for parallel work.

    A second thread gains little and waits for its core: b=1, d=128, L=5184 on 2 busy cores takes 0.13 s with one thread
    and 7 s with two.
    """
    threads, small = torch.get_num_threads(), u.device.type == "cpu" and u.shape[0] * u.shape[1] * n < 2**15
    try:
        if small:
            torch.set_num_threads(1)
        with torch.autocast(u.device.type, enabled=False):
            yield
    finally:
        if small:
            torch.set_num_threads(threads)


def _load_tokens(v: Tensor, start: int, tokens: int) -> Tensor:
    """(b, k, L) -> (tokens, b, k) from `start` on, zero beyond L: where Δ = 0 the state does not change."""
    v = v[:, :, start : start + tokens].contiguous().permute(2, 0, 1)  # rows a power of two apart thrash the cache
    out = v.new_empty(tokens, *v.shape[1:])
    out[: len(v)], out[len(v) :] = v, 0
    return out


def _store_tokens(block: Tensor, out: Tensor, start: int) -> None:
    """The inverse: a block (tokens, b, k) into `out` (b, k, L) from `start` on."""
    out[:, :, start : start + len(block)] = block[: out.shape[2] - start].permute(1, 2, 0)


def _recur(a: Tensor, h: Tensor, before: Tensor, steps: int, reverse: bool = False) -> Tensor:
    """h[t] += a[t] h[t-1] (reverse: h[t+1]) in place over a block (tokens, b, n, d) after the state `before` (b, n, d).
    Returns a copy of the last."""
    a, h = a.unflatten(0, (-1, steps)), h.unflatten(0, (-1, steps))
    lanes = range(len(h))[::-1] if reverse else range(len(h))
    a_t, h_t = (v.unbind(1)[::-1] if reverse else v.unbind(1) for v in (a, h))  # a (lanes, b, n, d) for each step
    h_t[0][lanes[0]].addcmul_(a_t[0][lanes[0]], before)
    for t in range(1, steps):
        h_t[t].addcmul_(a_t[t], h_t[t - 1])
    if len(lanes) > 1:  # the state that each lane should have started from, decaying along it
        decay, missing = a.prod(1), torch.zeros_like(a_t[0])
        for lane, following in itertools.pairwise(lanes):
            torch.addcmul(h_t[-1][lane], decay[lane], missing[lane], out=missing[following])
        for a_now, h_now in zip(a_t, h_t, strict=True):
            h_now.add_(missing.mul_(a_now))
    return h_t[-1][lanes[-1]].clone()


class _ChunkedScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
        (b, d, L), n = u.shape, A.shape[1]
        lanes, steps = _block_shape(u, n)
        size, length = lanes * steps, -(-L // steps) * steps
        y = u.new_empty(b, d, L)
        states = u.new_empty(-(-length // size), b, n, d)  # before each block
        ctx.save_for_backward(states, u, delta, A, B, C)
        A = A.t().contiguous()
        a_block, h_block = u.new_empty(2, size, b, n, d).unbind(0)
        h_last = u.new_zeros(b, n, d)
        with _single_threaded(u, n):
            for i, start in enumerate(range(0, length, size)):
                m = min(size, length - start)
                u_, delta_, B_, C_ = (_load_tokens(v, start, m) for v in (u, delta, B, C))
                a, h = a_block[:m], h_block[:m]
                states[i] = h_last
                torch.mul(delta_[:, :, None], A * LOG2_E, out=a).exp2_()
                torch.mul((delta_ * u_)[:, :, None], B_[:, :, :, None], out=h)
                h_last = _recur(a, h, h_last, steps)
                _store_tokens(torch.bmm(C_.view(-1, 1, n), h.view(-1, n, d)).view(m, b, d), y, start)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        states, u, delta, A, B, C = ctx.saved_tensors
        (b, d, L), n = u.shape, A.shape[1]
        lanes, steps = _block_shape(u, n)
        size, length = lanes * steps, -(-L // steps) * steps
        A = A.t().contiguous()
        du, ddelta, dB, dC = (u.new_empty(b, k, L) for k in (d, d, n, n))
        dA = torch.zeros_like(A)
        a_block, h_block, g_block = u.new_empty(3, size + 1, b, n, d).unbind(0)
        g_next = u.new_zeros(b, n, d)  # gradient of the first state after the block
        with _single_threaded(u, n):
            for start in range(0, length, size)[::-1]:
                m = min(size, length - start)
                a, h, g = a_block[: m + 1], h_block[: m + 1], g_block[:m]
                u_, B_, C_, dy_ = (_load_tokens(v, start, m) for v in (u, B, C, dy))
                delta_ = _load_tokens(delta, start, m + 1)  # one more: a[t + 1] takes the gradient back to t
                torch.mul(delta_[:, :, None], A * LOG2_E, out=a).exp2_()
                delta_ = delta_[:m]
                x = delta_ * u_
                h[0] = states[start // size]
                torch.mul(x[:, :, None], B_[:, :, :, None], out=h[1:])
                _recur(a[:m], h[1:], h[0], steps)
                torch.mul(dy_[:, :, None], C_[:, :, :, None], out=g)
                g_next = _recur(a[1:], g, g_next, steps, reverse=True)
                _store_tokens(torch.bmm(dy_.view(-1, 1, d), h[1:].view(-1, n, d).mT).view(m, b, n), dC, start)
                _store_tokens(torch.bmm(x.view(-1, 1, d), g.view(-1, n, d).mT).view(m, b, n), dB, start)
                dx = torch.bmm(B_.view(-1, 1, n), g.view(-1, n, d)).view(m, b, d)
                g.mul_(a[:m]).mul_(h[:m])  # now the gradient of Δ_t A
                _store_tokens(dx * delta_, du, start)
                _store_tokens(torch.mul(g, A, out=a[:m]).sum(2).addcmul_(dx, u_), ddelta, start)
                dA += torch.mul(g, delta_[:, :, None], out=a[:m]).sum((0, 1))
        return du, ddelta, dA.t().contiguous(), dB, dC
