"""The training screen: live on a terminal, plain one-line records everywhere else."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO, Protocol

from rich.console import Console as Terminal
from rich.live import Live
from rich.table import Table
from rich.text import Text

from diffusion_align.secrecy.redaction import redact

_REMEMBERED = 20
"""Steps over which the rate is averaged."""


class Reporter(Protocol):
    """What the loop tells about a run. `progress` and `message` make it a `Listener`."""

    def start(
        self,
        *,
        total: int,
        done: int,
        folder: Path,
        lines: Sequence[str],
        baseline: float | None,
        heldout: Mapping[str, float] | None = None,
    ) -> None: ...

    def progress(self, phase: str, done: int, total: int) -> None: ...

    def message(self, text: str) -> None: ...

    def step(self, row: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class Quiet:
    """The reporter that says nothing."""

    def start(
        self,
        *,
        total: int,
        done: int,
        folder: Path,
        lines: Sequence[str],
        baseline: float | None,
        heldout: Mapping[str, float] | None = None,
    ) -> None:
        pass

    def progress(self, phase: str, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass

    def step(self, row: Mapping[str, float]) -> None:
        pass

    def close(self) -> None:
        pass


class Console:
    """Phase, rate, ETA, reward against its first value, held-out rewards, clipping, memory.

    Args:
        stream: where to write; default stderr, so that stdout stays free for results.
        live: force the live screen on or off; None decides by whether `stream` is a terminal.
        clock: seconds, for tests.
    """

    def __init__(
        self,
        stream: IO[str] | None = None,
        *,
        live: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._terminal = Terminal(file=stream or sys.stderr, highlight=False, soft_wrap=True)
        self._is_live = self._terminal.is_terminal if live is None else live
        self._clock = clock
        self._live: Live | None = None
        self._row: Mapping[str, float] = {}
        self._heldout: dict[str, float] = {}
        self._heldout_baseline: dict[str, float] = {}
        self._phase = ("starting", 0, 0)
        self._total = self._done = 0
        self._baseline: float | None = None
        self._times: deque[tuple[float, int]] = deque(maxlen=_REMEMBERED)

    def start(
        self,
        *,
        total: int,
        done: int,
        folder: Path,
        lines: Sequence[str],
        baseline: float | None,
        heldout: Mapping[str, float] | None = None,
    ) -> None:
        """Begin with a run of `total` steps of which `done` are there.

        `baseline` and `heldout` are the training reward and the held-out ones of step 0, where
        they are known already.
        """
        self._total, self._done, self._baseline = total, done, baseline
        self._heldout_baseline = dict(heldout or {})
        self._times.append((self._clock(), done))
        self.message(f"run folder {folder}")
        for line in lines:
            self.message(line)
        if self._is_live:
            self._live = Live(
                get_renderable=self._screen,
                console=self._terminal,
                refresh_per_second=4,
                transient=True,
            )
            self._live.start()

    def progress(self, phase: str, done: int, total: int) -> None:
        """Only remembered: the live screen draws itself four times a second."""
        self._phase = (phase, done, total)

    def message(self, text: str) -> None:
        """A line of its own; brackets in it are text, not markup."""
        self._terminal.print(Text(redact(text)))

    def step(self, row: Mapping[str, float]) -> None:
        """One optimiser step is done (or, at step 0, the held-out scores are there)."""
        self._row = row
        self._done = int(row["step"])
        self._times.append((self._clock(), self._done))
        self._heldout.update({k[8:]: v for k, v in row.items() if k.startswith("heldout/")})
        if self._done == 0:
            self._heldout_baseline = dict(self._heldout)
        if self._baseline is None:
            self._baseline = row.get("reward/mean")
        if not self._is_live:
            self.message(self.line())

    def close(self) -> None:
        """Leave the screen; the last state stays as one line."""
        if self._live is not None:
            self._live.stop()
            self._live = None
            if self._row:
                self.message(self.line())

    def line(self) -> str:
        """The record of the last step on one line."""
        head = f"step {self._done}/{self._total}"
        return "  ".join([head, *(f"{name} {value}" for name, value in self._facts())])

    def _facts(self) -> list[tuple[str, str]]:
        row = self._row
        facts = [("iteration", f"{row.get('iteration', 0):g}")]
        if (reward := row.get("reward/mean")) is not None:
            facts.append(("reward", _reward(reward, row.get("reward/std"), self._baseline)))
        if row.get("reward/invalid"):
            facts.append(("failed rewards", f"{row['reward/invalid']:g}"))
        facts += [
            (f"held-out {name}", self._against_step_0(name, value))
            for name, value in self._heldout.items()
        ]
        for name, label in _SHOWN.items():
            if name in row:
                facts.append((label, f"{row[name]:.3g}"))
        if ringing := [name[6:] for name in row if name.startswith("guard/")]:
            facts.append(("guards", ", ".join(ringing)))
        return [*facts, *self._pace()]

    def _against_step_0(self, name: str, value: float) -> str:
        if self._done == 0:
            return f"{value:.4g}"
        return _reward(value, None, self._heldout_baseline.get(name))

    def _pace(self) -> list[tuple[str, str]]:
        (first, before), (last, now) = self._times[0], self._times[-1]
        if now <= before or last <= first:
            return []
        seconds = (last - first) / (now - before)
        left = max(0, self._total - self._done)
        return [("rate", f"{seconds:.3g} s/step"), ("ETA", duration(seconds * left))]

    def _screen(self) -> Table:
        phase, done, total = self._phase
        table = Table.grid(padding=(0, 2))
        where = f"{phase} {done}/{total}" if total > 1 else phase
        table.add_row("step", Text(f"{self._done}/{self._total}   {where}", style="bold"))
        for name, value in self._facts():
            table.add_row(Text(name, style="dim"), Text(value))
        return table


_SHOWN = {
    "policy/clip_fraction": "clipped",
    "policy/kl_reference": "KL to reference",
    "policy/implicit_accuracy": "implicit accuracy",
    "train/gradient_norm": "gradient",
    "memory/peak_gb": "memory GB",
}


def _reward(mean: float, std: float | None, baseline: float | None) -> str:
    text = f"{mean:.4g}" if std is None else f"{mean:.4g} ± {std:.2g}"
    if baseline is None or not math.isfinite(baseline):
        return text
    return f"{text} ({mean - baseline:+.3g} against step 0)"


def duration(seconds: float) -> str:
    """``75 -> "1:15"``, ``3700 -> "1:01:40"``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
