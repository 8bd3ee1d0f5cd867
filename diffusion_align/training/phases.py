"""Where the time of an iteration goes: a listener that times phases and passes everything on."""

from __future__ import annotations

import time
from collections.abc import Callable

from diffusion_align.algorithms.base import Listener


class PhaseClock:
    """Wall time by phase. A phase lasts until another begins or `stop` is called."""

    def __init__(self, listener: Listener, clock: Callable[[], float] = time.perf_counter) -> None:
        self._listener = listener
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._phase: str | None = None
        self._since = 0.0

    def progress(self, phase: str, done: int, total: int) -> None:
        """A phase begins or goes on."""
        if phase != self._phase:
            self.stop()
            self._phase, self._since = phase, self._clock()
        self._listener.progress(phase, done, total)

    def message(self, text: str) -> None:
        """Passed on."""
        self._listener.message(text)

    def stop(self) -> None:
        """The present phase is over."""
        if self._phase is not None:
            elapsed = self._clock() - self._since
            self._seconds[self._phase] = self._seconds.get(self._phase, 0.0) + elapsed
            self._phase = None

    def take(self) -> dict[str, float]:
        """Seconds by phase since the last call, as ``time/<phase>``; the phase goes on."""
        phase = self._phase
        self.stop()
        taken = {f"time/{name}": round(value, 4) for name, value in self._seconds.items()}
        self._seconds = {}
        if phase is not None:
            self._phase, self._since = phase, self._clock()
        return taken
