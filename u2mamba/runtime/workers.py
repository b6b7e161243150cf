"""Work on files in threads, in order: NumPy, SciPy and Pillow mostly release the GIL.

Nothing here imports torch, which evaluating saved maps does not need.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from u2mamba.runtime.cores import granted_cores

THREADS = min(16, granted_cores())  # threads that read and write files
T = TypeVar("T")


def ordered_map(
    task: Callable[[T], Any], items: Iterable[T], threads: int = THREADS, ahead: int = THREADS
) -> Iterator[tuple[T, Any]]:
    """(item, task(item)) in the order of `items`; at most `ahead` of them are started before they are asked for.

    If the system allows fewer threads, the existing ones or this one do the work. Closing the generator waits for
    running tasks.
    """
    pool, waiting, limited = ThreadPoolExecutor(threads), deque(), False
    try:
        for item in items:
            try:
                future = pool.submit(task, item)
            except RuntimeError as error:  # no more threads can be started: a system limit
                if not limited:
                    print(f"fewer than {threads} threads can be started ({error})", flush=True)
                future, limited = Future(), True
                future.set_result(task(item))
            waiting.append((item, future))
            if len(waiting) > ahead:
                item, future = waiting.popleft()
                yield item, future.result()
        for item, future in waiting:
            yield item, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
