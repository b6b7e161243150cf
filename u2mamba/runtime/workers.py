"""Worker processes that end with the run however it ends, and results in the order of their items."""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

from u2mamba.runtime.errors import UserError

MOST_PROCESSES = 61  # Windows waits for no more than that


@contextlib.contextmanager
def worker_pool(processes: int) -> Iterator[Executor | None]:
    """Processes started as new interpreters on every system (a fork would copy the locks of torch's threads).

    None for one process, which is the caller's own. As always with such processes, a script that calls this keeps its
    own work under `if __name__ == "__main__":`. Raises UserError when a process was killed from outside.
    """
    if processes <= 1:
        yield None
        return
    processes = min(processes, MOST_PROCESSES)
    context = multiprocessing.get_context("spawn")
    # one that were idle before the last has started would be given the task that is to start the last
    all_here = context.Barrier(processes)
    pool = ProcessPoolExecutor(processes, context, initializer=_set_up, initargs=(all_here,))
    try:
        try:
            with _deaf_to_ctrl_c():
                for _ in range(processes):
                    pool.submit(int)  # starts one
        except BaseException:
            all_here.abort()  # those that have started wait for the others
            raise
        yield pool
    except BrokenProcessPool:
        raise UserError("a worker process was killed, for memory perhaps: try --workers 1") from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def in_order(pool: Executor, task: Callable, items: Iterable[Any], ahead: int) -> Iterator[tuple[Any, Any]]:
    """(item, task(item)) in the order of `items`, of which at most `ahead` are taken before their turn."""
    waiting: deque = deque()
    for item in items:
        waiting.append((item, pool.submit(task, item)))
        if len(waiting) > ahead:
            item, future = waiting.popleft()
            yield item, future.result()
    while waiting:
        item, future = waiting.popleft()
        yield item, future.result()


def _set_up(all_here: threading.Barrier) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to every process; the first one ends the others
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(threading.BrokenBarrierError):
        all_here.wait(60)  # seconds


def _end_with_parent() -> None:
    """A worker whose parent was killed would wait for work for ever: it holds the other end of its own queue."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Processes started in here never see Ctrl-C, imports included (not on Windows); the caller sees it afterwards."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set what signals do
        yield
        return
    seen: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: seen.append(number))
    # a new process inherits what its starter blocks; ignored, a Ctrl-C of these moments would be lost
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT}) if sys.platform != "win32" else set()
    try:
        yield
    finally:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        signal.signal(signal.SIGINT, before)
        if seen:
            signal.raise_signal(signal.SIGINT)
