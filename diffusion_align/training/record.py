"""What a run leaves in writing: rows of metrics, sample pictures, held-out scores."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence

from diffusion_align.reporting.console import Reporter
from diffusion_align.reporting.trackers import Tracker, open_trackers
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.phases import PhaseClock
from diffusion_align.training.probe import Probe
from diffusion_align.training.run_folder import RunFolder


class Recorder:
    """Writes rows to the trackers, shows them to the reporter, and looks at the model when due.

    Attributes:
        clock: the listener that algorithms report to; it times phases on the way.
        row: the last row written.
    """

    def __init__(
        self, folder: RunFolder, options: TrainOptions, reporter: Reporter, probe: Probe | None
    ) -> None:
        self.clock = PhaseClock(reporter)
        self.row: dict[str, float] = {}
        self._folder, self._options = folder, options
        self._reporter, self._probe = reporter, probe
        self._trackers: list[Tracker] = []
        self._started = time.perf_counter()

    def start(self, step: int, seconds: float, lines: Sequence[str]) -> None:
        """Begin at `step`, `seconds` into the run; at step 0 the untouched model is looked at."""
        self._started = time.perf_counter() - seconds
        rows = self._folder.rows()
        self.row = dict(rows[-1]) if rows else {}
        rewards = [row["reward/mean"] for row in rows if row.get("reward/mean") is not None]
        self._trackers = open_trackers(self._options.trackers, self._folder.path)
        self._reporter.start(
            total=self._options.steps,
            done=step,
            folder=self._folder.path,
            lines=lines,
            baseline=rewards[0] if rewards else None,
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
        for tracker in self._trackers:
            tracker.close()

    def _write(self, row: dict[str, float]) -> None:
        self.row = row
        for tracker in self._trackers:
            tracker.log(row)

    def _look(self, step: int) -> dict[str, float]:
        if self._probe is None:
            return {}
        self.clock.progress("looking", 0, 1)
        pictures = self._folder.samples(step)
        pictures.mkdir(parents=True, exist_ok=True)
        self._probe.samples(step, pictures)
        return {f"heldout/{name}": value for name, value in self._probe.heldout(step).items()}
