"""Reading the next files in a few threads while the current ones are scored.

Order is kept, so that results do not depend on timing. Memory grows neither with the number of
files nor with their size: at most `ahead` results wait, and a job says how many bytes it is about
to take (`reserve`), which it gets when there is room. Only the job that is asked for next gets them
in any case: a file larger than all the room is read too, and never a second one beside it.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TypeVar

T = TypeVar("T")

Reserve = Callable[[int], None]
"""Called by a job with bytes, once and before it takes them; returns when there is room."""

READ_AHEAD = 2**28
"""Bytes of files that are read, or being read, before they are asked for."""

# Decoders leave Python's lock alone for most of their time; more threads only cost memory.
_MOST_THREADS = 8


def reading_threads() -> int:
    """As many as there are cores, two at least: a disk or network share answers late."""
    return max(2, min(_MOST_THREADS, os.cpu_count() or 1))


def read_ahead(
    jobs: Iterable[Callable[[Reserve], T]],
    *,
    ahead: int = 1,
    room: int = READ_AHEAD,
    threads: int | None = None,
) -> Generator[T, None, None]:
    """The results of jobs, in order.

    A job that raises does so where its result is asked for. Close the iterator
    (`contextlib.closing`) to give up what was not read yet.

    Args:
        jobs: taken from the iterable only `ahead` jobs before they are needed.
        room: bytes that are reserved at once, but for the job that is asked for next.
        threads: default `reading_threads()`.
    """
    pool = ThreadPoolExecutor(threads or reading_threads(), thread_name_prefix="read")
    waiting: deque[Future[T]] = deque()
    space = _Room(room)
    try:
        for place, job in enumerate(jobs):
            waiting.append(pool.submit(job, partial(space.reserve, place)))
            if len(waiting) > ahead:
                yield _first(waiting, space)
        while waiting:
            yield _first(waiting, space)
    finally:
        space.close()
        pool.shutdown(cancel_futures=True)


def _first(waiting: deque[Future[T]], space: _Room) -> T:
    # The future goes before the result is handed out: else it would keep it alive.
    result = waiting.popleft().result()
    space.hand_out()
    return result


class _Room:
    """Bytes that jobs reserved whose results were not handed out yet.

    Threads begin jobs in order, so the one that is asked for next never waits for a thread that
    another holds while it waits for room.
    """

    def __init__(self, size: int) -> None:
        self._free = size
        self._next = 0
        self._reserved: dict[int, int] = {}
        self._closed = False
        self._change = threading.Condition()

    def reserve(self, place: int, size: int) -> None:
        """Wait until there is room, or nothing before this job is left to hand out."""
        with self._change:
            self._change.wait_for(lambda: self._closed or place == self._next or size <= self._free)
            if self._closed:
                raise CancelledError
            self._free -= size
            self._reserved[place] = size

    def hand_out(self) -> None:
        """The next job in order is done, and its result is its taker's."""
        with self._change:
            self._free += self._reserved.pop(self._next, 0)
            self._next += 1
            self._change.notify_all()

    def close(self) -> None:
        """Nobody asks any more: jobs that wait for room end."""
        with self._change:
            self._closed = True
            self._change.notify_all()
