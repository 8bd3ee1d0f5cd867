"""Reading the next files in a few threads while the current ones are scored.

Order is kept and at most `ahead` units wait, so that results do not depend on timing and memory
does not grow with the number of files.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# Decoders leave Python's lock alone for most of their time; more threads only cost memory.
_MOST_THREADS = 8


def reading_threads() -> int:
    """As many as there are cores, two at least: a disk or network share answers late."""
    return max(2, min(_MOST_THREADS, os.cpu_count() or 1))


def read_ahead(
    units: Iterable[Sequence[Callable[[], T]]], *, threads: int | None = None, ahead: int = 1
) -> Generator[list[T], None, None]:
    """The results of each unit's jobs, unit by unit, in order.

    A job that raises does so where its unit is asked for. Close the iterator (`contextlib.closing`)
    to give up what was not read yet.

    Args:
        units: jobs that belong together; taken from the iterable only `ahead` units before they
            are needed.
        threads: default `reading_threads()`.
    """
    pool = ThreadPoolExecutor(threads or reading_threads(), thread_name_prefix="read")
    waiting: deque[list[Future[T]]] = deque()
    try:
        for unit in units:
            waiting.append([pool.submit(job) for job in unit])
            if len(waiting) > ahead:
                yield _results(waiting)
        while waiting:
            yield _results(waiting)
    finally:
        pool.shutdown(cancel_futures=True)


def _results(waiting: deque[list[Future[T]]]) -> list[T]:
    # The futures go before the results are handed out: else they would keep a batch alive.
    return [future.result() for future in waiting.popleft()]
