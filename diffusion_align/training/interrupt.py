"""Ctrl-C: the first finishes what cannot be repeated and saves, the second quits at once."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """Raised out of work that may be dropped because it can be repeated exactly."""


class Interruption:
    """Handles SIGINT while it is entered (in the main thread; elsewhere it does nothing)."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self.requested = False
        self._say = say
        self._droppable = False
        self._previous: object = None

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)  # type: ignore[arg-type]

    @contextmanager
    def droppable(self) -> Iterator[None]:
        """Inside, a first Ctrl-C raises `Interrupted` at once instead of waiting."""
        self._droppable = True
        try:
            if self.requested:
                raise Interrupted
            yield
        finally:
            self._droppable = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = True
        if self._droppable:
            raise Interrupted
        self._say("Ctrl-C: finishing this iteration's updates, then saving (again: quit at once)")
