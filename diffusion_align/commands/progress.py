"""A progress bar for work that is neither training nor over at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(phase: str) -> Iterator[Callable[[int, int], None]]:
    """Call what this yields with (done, total); rate and time left appear on a terminal's stderr.

    Where stderr is no terminal nothing is drawn: a log file has no use for it.
    """
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn(phase), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(phase, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)
