"""What a run leaves in writing: rows of metrics, sample pictures, held-out scores."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffusion_align.reporting.console import Reporter
from diffusion_align.reporting.trackers import Trackers, open_trackers
from diffusion_align.training.disk import writing
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.phases import PhaseClock
from diffusion_align.training.probe import Probe, ScoredProbe
from diffusion_align.training.run_folder import RunFolder


class Recorder:
    """Writes rows to the trackers, shows them to the reporter, and looks at the model when due.

    Attributes:
        clock: the listener that algorithms report to; it times phases on the way.
        row: the last row written.
        looking: a context that every look happens in, `on_look` included.
        on_look: told (step, scores [P, S] by reward) at every look, where the probe has scores.
    """

    def __init__(
        self,
        folder: RunFolder,
        options: TrainOptions,
        reporter: Reporter,
        probe: Probe | None,
        *,
        writes: bool = True,
    ) -> None:
        """`writes`: false on all but one process of a run; these keep nothing of what they see."""
        self._writes = writes
        self.clock = PhaseClock(reporter)
        self.row: dict[str, float] = {}
        self.on_look: Callable[[int, Mapping[str, Any]], None] = lambda step, scores: None
        self.looking: Callable[[], AbstractContextManager[object]] = nullcontext
        self._folder, self._options = folder, options
        self._reporter, self._probe = reporter, probe
        self._trackers: Trackers | None = None
        self._started = time.perf_counter()

    @property
    def tracker_ids(self) -> dict[str, str]:
        """Name of a tracker -> what it calls this run, for a checkpoint to remember."""
        return self._trackers.run_ids if self._trackers is not None else {}

    def start(
        self,
        step: int,
        seconds: float,
        lines: Sequence[str],
        tracker_ids: Mapping[str, str] | None = None,
    ) -> None:
        """Begin at `step`, `seconds` into the run; at step 0 the untouched model is looked at.

        `tracker_ids`: as a checkpoint remembers them; the run folder's own count more.
        """
        self._started = time.perf_counter() - seconds
        rows = self._folder.rows()
        self.row = dict(rows[-1]) if rows else {}
        first = rows[0] if rows and rows[0]["step"] == 0 else {}
        rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        if self._writes:
            with writing(self._folder.path):
                self._trackers = open_trackers(
                    self._options.trackers,
                    self._folder.path,
                    step=step,
                    run_ids=tracker_ids,
                    options=asdict(self._options),
                    say=self._reporter.message,
                )
        self._reporter.start(
            total=self._options.steps,
            done=step,
            folder=self._folder.path,
            lines=lines,
            baseline=rewards[0] if rewards else None,
            heldout={k[8:]: v for k, v in first.items() if k.startswith("heldout/")},
        )
        if step == 0 and not rows and (heldout := self._look(0)):
            self._write({"step": 0, "iteration": 0, "seconds": self.seconds(), **heldout})
            self._reporter.step(self.row)

    def seconds(self) -> float:
        """Wall time of the run so far, earlier sittings included."""
        return round(time.perf_counter() - self._started, 3)

    def step(self, step: int, iteration: int, numbers: Mapping[str, float]) -> None:
        """One optimiser step is done."""
        due, last = self._options.sample_every, step == self._options.steps
        looked = self._look(step) if last or (due and step % due == 0) else {}
        row = {
            "step": step,
            "iteration": iteration,
            "seconds": self.seconds(),
            **numbers,
            **self.clock.take(),
            **looked,
        }
        if last or looked or step % self._options.log_every == 0:
            self._write(row)
        self._reporter.step(row)

    def close(self) -> None:
        """Close the trackers."""
        with writing(self._folder.path):  # a row that did not fit is tried once more here
            if self._trackers is not None:
                self._trackers.close()

    def _write(self, row: dict[str, float]) -> None:
        self.row = row
        if self._trackers is not None:
            with writing(self._folder.path):
                self._trackers.log(row)

    def _look(self, step: int) -> dict[str, float]:
        if self._probe is None:
            return {}
        self.clock.progress("looking", 0, 1)
        with ExitStack() as stack:
            pictures = self._folder.samples(step)
            if not self._writes:  # it looks because all ranks must, and keeps nothing
                pictures = Path(stack.enter_context(TemporaryDirectory()))
            with writing(pictures):
                pictures.mkdir(parents=True, exist_ok=True)
            stack.enter_context(self.looking())
            with writing(pictures):
                self._probe.samples(step, pictures)
            if self._trackers is not None:
                self._trackers.pictures(step, pictures)
            means = self._probe.heldout(step)
            if isinstance(self._probe, ScoredProbe):
                self.on_look(step, self._probe.scores(step))
        return {f"heldout/{name}": value for name, value in means.items()}
