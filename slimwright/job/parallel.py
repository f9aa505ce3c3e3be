"""Tiles on threads: each worker runs torch single-threaded on its own tile.

Many small single-threaded operations side by side beat each operation spread over all cores: there is no barrier after
every elementwise step, a tile stays in its core's cache, and on a machine that others use too nobody waits for the
slowest thread. Results come back in order, so sums do not depend on the timing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from slimwright.heap import reuse_freed_pages

Item = TypeVar("Item")
Result = TypeVar("Result")

_pool: ThreadPoolExecutor | None = None
_size = 0


def workers() -> tuple[ThreadPoolExecutor, int]:
    """The process's pool, as many workers as torch has threads."""
    global _pool, _size
    threads = torch.get_num_threads()
    if _pool is None or _size != threads:
        reuse_freed_pages()
        if _pool is not None:
            _pool.shutdown(wait=True)
        _pool, _size = (
            ThreadPoolExecutor(threads, "slimwright-tile", initializer=_single_threaded),
            threads,
        )
        ready = [_pool.submit(_wait_a_little) for _ in range(threads)]
        for future in ready:
            future.result()
        torch.set_num_threads(threads)  # the workers' setting must not reach the matrix products of this thread
    return _pool, _size


def _single_threaded() -> None:
    torch.get_num_threads()  # a thread's first question takes the process's number over, which would undo the next line
    torch.set_num_threads(1)


def _wait_a_little() -> None:
    import time

    time.sleep(0.002)  # so that every worker starts and runs its initializer


def in_order(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[tuple[Item, Result]]:
    """Apply ``function`` to items on the pool, giving (item, result) in order; at most three items a worker in flight.

    An exception of the function is raised here; items in flight then finish and are dropped. Not to be called from
    within a worker.
    """
    pool, size = workers()
    flight: deque[tuple[Item, Future[Any]]] = deque()
    try:
        for item in items:
            flight.append((item, pool.submit(function, item)))
            if len(flight) >= 3 * size:
                done, future = flight.popleft()
                yield done, future.result()
        while flight:
            done, future = flight.popleft()
            yield done, future.result()
    finally:
        for _, future in flight:
            future.cancel()
        for _, future in flight:
            if not future.cancelled():
                future.exception()
