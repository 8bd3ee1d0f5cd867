"""Progress of work that is neither training nor over at once."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Progress = Callable[[int, int], None]

_WINDOW = 30.0
"""Seconds over which the rate is taken: what an earlier run did passes at once."""

_BETWEEN = 10.0
"""Seconds between two lines where there is no terminal."""


class Pace:
    """How fast things get done: told (seconds, done) now and then, knows rate and time left."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def tell(self, seconds: float, done: int) -> None:
        """So much is done at that time."""
        self._seen.append((seconds, done))
        while len(self._seen) > 2 and seconds - self._seen[1][0] > _WINDOW:
            self._seen.popleft()

    def words(self, total: int) -> str:
        """`12.5/s, 1:20 left`; nothing before there is a rate."""
        if len(self._seen) < 2:
            return ""
        (first, before), (last, done) = self._seen[0], self._seen[-1]
        if last <= first or done <= before:
            return ""
        rate = (done - before) / (last - first)
        from diffusion_align.reporting.console import duration

        left = f", {duration((total - done) / rate)} left" if done < total else ""
        return f"{_rate(rate)}{left}"


@contextmanager
def bar(phase: str, *, clock: Callable[[], float] = time.monotonic) -> Iterator[Progress]:
    """Call what this yields with (done, total): rate and time left appear on stderr.

    On a terminal as a bar that goes when the work is done; elsewhere, for instance in a log file,
    as a line every ten seconds.
    """
    from rich.console import Console

    console = Console(stderr=True, highlight=False)
    with _drawn(phase, clock, console) if console.is_terminal else _lines(phase, clock) as progress:
        yield progress


@contextmanager
def _drawn(phase: str, clock: Callable[[], float], console: object) -> Iterator[Progress]:
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
    from rich.progress import Progress as Bar

    pace = Pace()
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
    )
    with Bar(*columns, console=console, transient=True) as progress:  # type: ignore[arg-type]
        task = progress.add_task(phase, total=None, pace="")

        def tell(done: int, total: int) -> None:
            pace.tell(clock(), done)
            progress.update(task, completed=done, total=total, pace=pace.words(total))

        yield tell


@contextmanager
def _lines(phase: str, clock: Callable[[], float]) -> Iterator[Progress]:
    import typer

    pace, said = Pace(), clock()

    def tell(done: int, total: int) -> None:
        nonlocal said
        now = clock()
        pace.tell(now, done)
        if now - said < _BETWEEN:
            return
        said = now
        facts = ", ".join(filter(None, [f"{phase} {done}/{total}", pace.words(total)]))
        typer.echo(facts, err=True)

    yield tell


def _rate(rate: float) -> str:
    return f"{rate:.3g}/s" if rate >= 1 else f"{1 / rate:.3g} s each"
