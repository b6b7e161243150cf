"""Many processes, one a GPU: torchrun starts them, here they meet, share the pairs out and agree.

Why this is not PyTorch's DistributedDataParallel: DDP reduces a parameter's gradient when autograd has accumulated it.
The fast step's gradients come another way, through bf16 copies of the weights and a second stream (step.py,
u2mamba/fast/convolution.py), so DDP would reduce nothing, or too early. `MeanOfAll` does it explicitly instead: one
all-reduce after backward, of everything in which the processes differ, captured in the CUDA graph with the rest of the
step. On two H100 the 183 MB of U2MAMBA's gradients take 0.65 ms.

Messages between the CPUs (gloo) are for what the host decides: when to stop, which constants, what last.pth holds.
"""

import contextlib
import datetime
import math
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from u2mamba.runtime.config import differences
from u2mamba.runtime.errors import EXIT_USAGE, UserError, one_line_errors

PATIENCE = datetime.timedelta(minutes=30)  # for a slow one: the first reading of the pairs. A dead one is seen at once
ALIGNMENT = 64  # elements: the optimizers' kernels load 16 bytes at a time only from where that divides

T = TypeVar("T")


@dataclass(frozen=True)
class DistContext:
    """The processes of a run and which of them this one is; alone by default, and then every method costs nothing."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among those of this machine
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """The one that writes files and prints."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """This process's rows of an epoch's plan: every size-th.

        The batches that all processes take at a time are then one stretch of the plan, so that a position in it means
        the same to any number of processes. Up to size - 1 rows at the end that do not divide are left out: every
        process has the same number of pairs in each step, and the mean of means is the mean.
        """
        return rows[self.rank : len(rows) - len(rows) % self.size : self.size]

    def steps(self, rows: int, batch: int) -> int:
        """Into how many steps that many rows of a plan go, `batch` a process."""
        return math.ceil(rows // self.size / batch)

    def all_reduce_max(self, value: int) -> int:
        """The largest of the processes' values; returns when all have called it."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def sum(self, values: Tensor) -> Tensor:
        """Sums `values`, on any device, over the processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values`, on any device, over the processes, in place."""
        if self.size > 1 and values.is_cuda:
            dist.all_reduce(values, dist.ReduceOp.AVG)
        elif self.size > 1:
            dist.all_reduce(values.mul_(1 / self.size))  # gloo knows no mean
        return values

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process of each machine runs what is inside, and then the others do, who find what it left."""
        if self.local_rank:
            self.all_reduce_max(0)
        yield
        if not self.local_rank:
            self.all_reduce_max(0)

    def broadcast_object(self, make: Callable[[], T]) -> T:
        """What `make` returns in the first process, in all of them."""
        if self.size == 1:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def check_same(self, constants: dict[str, Any], ignore: set[str]) -> None:
        """Raises UserError where this process was started with other constants, or found other pairs, than the first.

        Two machines with different commands would otherwise wait for each other, or train on nonsense.
        """
        if other := differences(self.broadcast_object(lambda: constants), constants, ignore):
            raise UserError(f"the processes differ (first's -> this one's): {'; '.join(other)}; start them all alike")

    def prepare(self, net: nn.Module, synchronise_batch_norm: bool) -> None:
        """Gives every process the first's weights; makes batch norm see the batches of all. Raises UserError on MPS."""
        if self.size == 1:
            return
        for tensor in net.state_dict().values():
            if tensor.device.type == "mps":
                raise UserError("several processes run on CUDA GPUs or CPUs, not on an Apple GPU: start one")
            dist.broadcast(tensor, 0)
        for module in net.modules() if synchronise_batch_norm else ():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SyncBatchNorm2d  # the same parameters, buffers and keys

    def line(self, batch: int) -> str:
        """What is printed of it; batch: pairs a process and step."""
        if self.size == 1:
            return f"1, {batch} pairs a step"
        return f"{self.size}, {self.local_size} of them here, {batch} pairs each a step, {batch * self.size} together"


@contextlib.contextmanager
def init_distributed() -> Iterator[DistContext]:
    """The world that torchrun describes in the environment, or a process alone.

    In a world of several: the first one's output is the run's, the others are silent; an error is printed once, by
    the process that met it first. The process ends with this block. It leaves by os._exit, because taking NCCL down
    waits for captured graphs (github.com/pytorch/pytorch/issues/115388) and, after an error, for processes that wait
    for this one.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield DistContext()
        return
    store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    store = _of_this_attempt(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    world = DistContext(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    code = 1  # as Python's own after an exception
    try:
        with one_line_errors(), _told_once(store, world):
            yield world
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _of_this_attempt(store: dist.Store, rank: int, size: int) -> dist.Store:
    """`store` without what the processes before a restart by torchrun left in it, such as their addresses.

    PyTorch keeps the store over restarts (github.com/pytorch/pytorch/issues/135712), and torchrun's count of them
    differs between machines. So the first process makes up a name for the attempt, and the others take it when it has
    answered them.
    """
    mine = uuid.uuid4().hex
    if rank == 0:
        store.set("attempt", mine)
        for other in range(1, size):
            while not (hello := store.get(f"hello of {other}").decode()).startswith(mine):
                time.sleep(0.05)
            store.set(f"answer to {other}", hello)
        return dist.PrefixStore(mine, store)
    while True:
        attempt = store.get("attempt").decode()
        hello, answer = f"{attempt} {mine}", f"answer to {rank}"
        store.set(f"hello of {rank}", hello)
        if store.check([answer]) and store.get(answer).decode() == hello:
            return dist.PrefixStore(attempt, store)
        time.sleep(0.05)


@contextlib.contextmanager
def _told_once(store: dist.Store, world: DistContext) -> Iterator[None]:
    with contextlib.ExitStack() as silence:
        if not world.is_main:
            nowhere = silence.enter_context(open(os.devnull, "w"))
            silence.enter_context(contextlib.redirect_stdout(nowhere))
            silence.enter_context(contextlib.redirect_stderr(nowhere))
        try:
            yield
        except (UserError, RuntimeError) as error:
            text = str(error)
            if isinstance(error, dist.DistError) or "gloo" in text:
                text = (
                    "another process of this run has ended; given again, the same command goes on from last.pth "
                    "(torchrun --max-restarts does so by itself)"
                )
            elif not isinstance(error, UserError):
                raise
            if store.add("failed", 1) > 1:
                sys.exit(EXIT_USAGE)
            raise UserError(text if world.is_main else f"process {world.rank}: {text}") from None


class MeanOfAll:
    """The mean over the processes of all gradients and of some more tensors, by one all-reduce.

    more: examples of those tensors, of the parameters' device. All gradients live in one tensor, as views of the
    parameters' own strides, which is what the fused optimizers and the all-reduce want.
    """

    def __init__(self, world: DistContext, parameters: list[nn.Parameter], *more: Tensor):
        self.world, self.parameters = world, parameters
        if world.size == 1:
            return
        like = [*parameters, *more]
        room = [-(-t.numel() // ALIGNMENT) * ALIGNMENT for t in like]
        self._flat = torch.zeros(sum(room), dtype=parameters[0].dtype, device=parameters[0].device)
        parts = zip(self._flat.split(room), like, strict=True)
        views = [part.as_strided(t.shape, t.stride(), part.storage_offset()) for part, t in parts]
        self._places = dict(zip(parameters, views, strict=False))
        self._more = views[len(parameters) :]

    def empty_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Where to write a gradient so that it need not be copied."""
        return self._places[parameter] if self.world.size > 1 else torch.empty_like(parameter)

    @torch.no_grad()
    def __call__(self, *more: Tensor) -> None:
        """Replaces every parameter's gradient, and `more`, by the mean."""
        if self.world.size == 1:
            return
        used = [p for p in self.parameters if p.grad is not None]
        elsewhere = [p for p in used if p.grad is not self._places[p]]
        torch._foreach_copy_(
            [*(self._places[p] for p in elsewhere), *self._more], [*(p.grad for p in elsewhere), *more]
        )
        self.world.mean(self._flat)
        for p in used:
            p.grad = self._places[p]
        torch._foreach_copy_(list(more), self._more)


class _SumOfAll(torch.autograd.Function):
    """The sum over the processes; each one's loss depends on every addend, so the gradients are summed as well."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return _SumOfAll.forward(ctx, gradient)


class SyncBatchNorm2d(nn.BatchNorm2d):
    """Batch norm by the mean and variance of the batches of all processes, of the same size in each.

    torch.nn.SyncBatchNorm with plain operations, because that one refuses tensors on the CPU, where the tests compare
    two processes with one. One all-reduce forward and one backward.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W) -> the same."""
        if not self.training:
            return super().forward(x)
        rank, size = dist.get_rank(), dist.get_world_size()
        variance, mean = torch.var_mean(x.to(self.weight.dtype), (0, 2, 3), correction=0)
        own = F.pad(torch.stack((mean, variance))[None], (0, 0, 0, 0, rank, size - 1 - rank))  # zeros for the others
        means, variances = _SumOfAll.apply(own).unbind(1)  # (size, C) each: every process's, with gradients
        mean = means.mean(0)
        variance = variances.mean(0) + (means - mean).square().mean(0)  # not E[x²] - E[x]², which cancels
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        with torch.no_grad():
            n = size * x.numel() // self.num_features
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (n / max(n - 1, 1)), self.momentum)
            self.num_batches_tracked += 1
        return torch.addcmul(shift[:, None, None], x, scale[:, None, None]).to(x.dtype)
