"""Worker processes (joblib's) that end with the process that started them, however it ends."""

import contextlib
import functools
import os
import signal
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import resource_tracker
from typing import Any, TypeVar

import joblib
import psutil

from u2mamba.runtime.errors import UserError

T = TypeVar("T")
MAX_WORKERS = 60  # Windows cannot wait for more processes


def _init_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the first one ends the others
    threading.Thread(target=_exit_with_parent, args=(psutil.Process(os.getppid()),), daemon=True).start()


OPTIONS = {  # of joblib.Parallel
    "backend": "loky", "return_as": "generator", "batch_size": 1, "max_nbytes": None, "initializer": _init_worker,
}  # fmt: skip


def process_map(task: Callable[[T], Any], items: Iterable[T], workers: int) -> Iterator[tuple[T, Any]]:
    """(item, task(item)) in the order of `items`, by `workers` processes (1, or where none can be started: this one).

    A thread of joblib's reads `items`, two per worker in advance. Raises UserError when a worker
    was killed. Close the generator where it is not exhausted.
    """
    workers = min(workers, MAX_WORKERS)
    if workers == 1 or not _started(workers):
        yield from ((item, task(item)) for item in items)
        return
    waiting: deque[T] = deque()

    def calls() -> Iterator[tuple]:
        for item in items:
            waiting.append(item)
            yield joblib.delayed(task)(item)

    results = iter(())
    hook, threading.excepthook = threading.excepthook, _ignore_cancelled_task
    try:
        with _sigint_blocked():
            results = joblib.Parallel(workers, **OPTIONS)(calls())
        for result in results:
            yield waiting.popleft(), result
    except BrokenProcessPool:
        raise UserError("a worker process was killed, perhaps because memory ran out: try --workers 1") from None
    finally:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib's about results that are not used
            getattr(results, "close", int)()
        threading.excepthook = hook


@functools.cache
def _started(workers: int) -> bool:
    """Starts the processes, which joblib keeps for the next call; prints a line where that fails."""
    try:
        with _sigint_blocked(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # joblib's about what the line of the caller says
            ids = list(joblib.Parallel(workers, **OPTIONS)(joblib.delayed(os.getpid)() for _ in range(workers)))
    except Exception as error:  # a limit of processes or threads, no semaphores, no folder for temporary files
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    else:
        if os.getpid() not in ids:
            return True
        reason = "no semaphores, as without /dev/shm"
    print(f"one process: no worker processes can be started ({reason})", flush=True)
    return False


def _ignore_cancelled_task(args: threading.ExceptHookArgs) -> None:
    """joblib's manager thread may fail to find a task that a Ctrl-C has just cancelled."""
    if not (args.exc_type is KeyError and args.thread and args.thread.name == "ExecutorManagerThread"):
        threading.__excepthook__(args)


def _exit_with_parent(parent: psutil.Process) -> None:
    """A worker whose parent was killed would wait for tasks: it holds the other end of its own queue."""
    parent.wait()
    os._exit(1)


@contextlib.contextmanager
def _sigint_blocked() -> Iterator[None]:
    """Processes started inside never receive Ctrl-C, imports included (except on Windows); the caller does."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set signal handlers
        yield
        return
    received: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _frame: received.append(number))
    mask = None
    if hasattr(signal, "pthread_sigmask"):
        resource_tracker.ensure_running()  # joblib would start it, and before Python 3.13 that unblocks SIGINT
        # new processes inherit the mask; if SIGINT were ignored instead, a Ctrl-C would be lost
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        signal.signal(signal.SIGINT, before)
        if received:
            signal.raise_signal(signal.SIGINT)
