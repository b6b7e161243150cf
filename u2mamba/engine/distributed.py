"""Distributed training, one process per GPU, started by torchrun: rendezvous, sharding of the pairs, shared decisions.

The processes agree through gloo on decisions: when to stop, which settings, what to resume from. The gradients are
averaged in the step itself (engine/gradients.py).
"""

import contextlib
import datetime
import os
import sys
import time
import traceback
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from u2mamba.runtime.config import differences
from u2mamba.runtime.errors import EXIT_USAGE, Stopped, StopSignal, UserError, locate, one_line_errors

# of a collective; long because the main process decodes the dataset first. A crashed process is detected at once
TIMEOUT = datetime.timedelta(minutes=30)


@dataclass(frozen=True)
class DistContext:
    """The processes of a run, and the rank of this one. By default there is one, which communicates with none."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # among the processes of this machine
    local_size: int = 1  # processes on this machine

    @property
    def is_main(self) -> bool:
        """The process that writes files and prints."""
        return self.rank == 0

    def shard(self, rows: Tensor) -> Tensor:
        """This process's rows of an epoch's plan: every size-th.

        The batches of all processes together are then a contiguous part of the plan, so a position in it is valid for
        any number of processes. Up to size - 1 rows at the end are dropped, so that all have the same number of pairs
        per step.
        """
        return rows[self.rank : len(rows) - len(rows) % self.size : self.size]

    def all_reduce_max(self, value: int) -> int:
        """The maximum of the processes' values; blocks until all have called it."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value)
        dist.all_reduce(agreed, dist.ReduceOp.MAX)
        return int(agreed)

    def raise_if_stopped(self, stop: StopSignal) -> None:
        """Raises Stopped in all processes if one of them received a signal: all end at the same iteration."""
        if exit_code := self.all_reduce_max(stop.exit_code):
            raise Stopped(exit_code)

    def mean(self, values: Tensor) -> Tensor:
        """The mean of `values`, on any device, over the processes, in place."""
        if self.size > 1 and values.is_cuda:
            dist.all_reduce(values, dist.ReduceOp.AVG)
        elif self.size > 1:
            dist.all_reduce(values.mul_(1 / self.size))  # gloo does not support AVG
        return values

    @contextlib.contextmanager
    def main_process_first(self) -> Iterator[None]:
        """The first process of each machine runs the block, then the others, which find its results."""
        if self.local_rank:
            self.all_reduce_max(0)
        yield
        if not self.local_rank:
            self.all_reduce_max(0)

    def broadcast_object(self, make: Callable[[], Any]) -> Any:
        """The result of `make` in the main process, broadcast to all."""
        if self.size == 1:
            return make()
        box = [make() if self.is_main else None]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def check_same(self, settings: dict[str, Any], ignore: set[str]) -> None:
        """Raises UserError if the settings or the pairs of this process differ from those of the main one."""
        if other := differences(self.broadcast_object(lambda: settings), settings, ignore):
            raise UserError(
                f"the processes differ (main -> this one): {'; '.join(other)}; start all with the same settings"
            )

    def broadcast_weights(self, net: nn.Module) -> None:
        """Broadcasts the weights of the main process."""
        for tensor in net.state_dict().values() if self.size > 1 else ():
            dist.broadcast(tensor, 0)


@contextlib.contextmanager
def init_distributed() -> Iterator[DistContext]:
    """The processes that torchrun describes in the environment variables, or one process.

    Only the main process prints; an error is printed once, by the first process that fails. The process ends
    with this block, by os._exit, because shutting NCCL down waits for captured graphs
    (github.com/pytorch/pytorch/issues/115388) and, after an error, for processes that wait for this one.
    """
    if (world := os.environ.get("WORLD_SIZE", "").strip()) in ("", "1"):
        yield DistContext()
        return
    needed = ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if not os.environ.get(name)]:
        raise UserError(
            f"WORLD_SIZE = {world!r} is set, but not by torchrun (no {', '.join(missing)}): unset it, or start with "
            "torchrun"
        )
    store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
    store = _store_of_this_attempt(store, rank, size)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    context = DistContext(rank, size, int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"]))
    code = 1  # Python's own after an exception
    try:
        with one_line_errors(), _rank0_logging(store, context):
            yield context
        code = 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _store_of_this_attempt(store: dist.Store, rank: int, size: int) -> dist.Store:
    """`store` without what the processes before a restart by torchrun left in it, such as their addresses.

    PyTorch keeps it (github.com/pytorch/pytorch/issues/135712), and torchrun's count of restarts differs between
    machines. So the main process names the attempt, and the others use the name once it has answered them.
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
def _rank0_logging(store: dist.Store, context: DistContext) -> Iterator[None]:
    stderr = sys.stderr
    if not context.is_main:
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 - until the process ends
    try:
        yield
    except Exception as error:
        text = str(error) if isinstance(error, UserError) else locate(error)
        if isinstance(error, dist.DistError) or "gloo" in text:
            text = (
                "another process of this run has ended; the same command resumes from last.pth "
                "(torchrun --max-restarts does so automatically)"
            )
        if store.add("failed", 1) > 1:
            sys.exit(EXIT_USAGE)
        raise UserError(text if context.is_main else f"process {context.rank}: {text}") from None
    finally:
        sys.stderr = stderr
