"""The training loop: one for every algorithm.

collect -> cut into minibatches -> back-propagate every yielded loss -> clip -> update, with
checkpoints between iterations. It knows the algorithm contract and nothing of any method.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffusion_align.algorithms.base import Algorithm
from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Console, Reporter
from diffusion_align.training import random_state
from diffusion_align.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    load_newest,
    save_checkpoint,
)
from diffusion_align.training.final import write_final
from diffusion_align.training.guards import Guards
from diffusion_align.training.interrupt import Interrupted, Interruption
from diffusion_align.training.means import Means
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.probe import Probe
from diffusion_align.training.record import Recorder
from diffusion_align.training.result import TrainResult
from diffusion_align.training.run_folder import (
    RunFolder,
    open_run_folder,
    write_environment,
    write_record,
)
from diffusion_align.training.setup import Machinery


def train(
    algorithm: Algorithm[Any, Any],
    *,
    steps: int | None = None,
    options: TrainOptions | None = None,
    output: str | Path | None = None,
    resume: bool = False,
    new: bool = False,
    seed: int = 0,
    reporter: Reporter | None = None,
    probe: Probe | None = None,
) -> TrainResult:
    """Train until `steps` optimiser updates are done; the model is in ``<output>/final``.

    Args:
        algorithm: any object of the algorithm contract, for example `DDPO`.
        steps: overrides `options.steps`.
        output: the run folder; None takes the next free ``runs/<algorithm>-001``.
        resume, new: what to do where the folder holds a run; neither is an error.
        seed: of the global generators within this call (dropout); ours are the algorithm's.
        reporter: the console by default; `reporting.console.Quiet()` for none.
        probe: sample pictures and held-out scores at step 0, every `sample_every` and at the end.

    Raises:
        UserError: options that do not fit, an occupied folder, damaged checkpoints, a guard.
    """
    options = options or TrainOptions()
    options = options if steps is None else replace(options, steps=steps)
    options.check_accumulation(algorithm.minibatch_count(), algorithm.minibatch_arithmetic())
    name = type(algorithm).__name__.lower()
    folder = open_run_folder(output, name=name, resume=resume, new=new)
    reporter = reporter or Console()
    with ExitStack() as stack:
        stack.callback(reporter.close)
        stack.enter_context(random_state.borrowed(seed))
        machinery = stack.enter_context(Machinery(algorithm, options))
        recorder = Recorder(folder, options, reporter, probe)
        stack.callback(recorder.close)
        algorithm.listener = recorder.clock
        run = _Run(algorithm, options, folder, machinery, recorder)
        if resume:
            run.restore(reporter.message)
        write_environment(folder, str(machinery.device))
        write_record(folder, name, algorithm.record())
        interruption = stack.enter_context(Interruption(reporter.message))
        lines = [*algorithm.describe(), *machinery.notes, *run.remainder()]
        recorder.start(begun := run.step, run.seconds, lines)
        run.iterate(interruption)
        if run.step > begun or not folder.final.exists():
            write_final(folder.final, algorithm.policy.save, reporter.message)
        word = "stopped" if interruption.requested else "done"
        reporter.message(f"{word} at step {run.step}: {folder.final}")
        return TrainResult(
            folder.path, run.step, run.iteration, recorder.row, interruption.requested
        )


class _Run:
    """The state of one run: step, iteration, and everything they move."""

    def __init__(
        self,
        algorithm: Algorithm[Any, Any],
        options: TrainOptions,
        folder: RunFolder,
        machinery: Machinery,
        recorder: Recorder,
    ) -> None:
        self.algorithm, self.options, self.folder = algorithm, options, folder
        self.machinery, self.recorder = machinery, recorder
        self.guards = Guards(scaled=machinery.scaled)
        self.per_iteration = algorithm.minibatch_count() // options.accumulation
        self.step = self.iteration = 0
        self.seconds = 0.0
        self.saved_at = -1

    def iterate(self, interruption: Interruption) -> None:
        """Iterations until all steps are done or the run is interrupted; checkpoints between."""
        while self.step < self.options.steps and not interruption.requested:
            if self.options.steps - self.step < self.per_iteration:
                self._save_once()  # the coming iteration will end early, where nothing can be saved
            algorithm_before, random_before = self.algorithm.state_dict(), random_state.capture()
            try:
                with interruption.droppable():
                    batch = self.algorithm.collect(self.iteration)
                self.guards.rewards(batch.metrics)
            except (Interrupted, Exception) as error:
                # Nothing was learnt from it, and it can be made again: as if it had not begun.
                self.algorithm.load_state_dict(algorithm_before)
                random_state.restore(random_before)
                if isinstance(error, Interrupted):
                    break
                self._rescue()
                raise
            if not self._learn(batch):
                return
            self.iteration += 1
            every = self.options.checkpoint_every
            if every and self.iteration % every == 0:
                self._save()
        if self.saved_at != self.step:
            self._save()

    def remainder(self) -> list[str]:
        """What to say where the last step falls inside an iteration."""
        whole, rest = divmod(self.options.steps, self.per_iteration)
        if not rest:
            return []
        near = [n * self.per_iteration for n in (whole, whole + 1) if n]
        return [
            f"{self.options.steps} steps are {whole} iterations of {self.per_iteration} and {rest} "
            "more: a run that goes on later repeats these, because nothing is saved inside an "
            f"iteration (train.steps={' or '.join(map(str, near))} wastes none)"
        ]

    def _save_once(self) -> None:
        """A checkpoint of what was learnt so far, where there is none yet."""
        if self.step > 0 and self.saved_at != self.step:
            self._save()

    def _rescue(self) -> None:
        """Save before an error ends the run; the error itself matters more than a failed save."""
        say = self.recorder.clock.message
        try:
            self._save_once()
        except UserError as error:
            say(f"the run stops, and its last steps could not be saved: {error}")
            return
        if self.step > 0:
            say(
                f"the run stops; step {self.step} is saved in "
                f"{checkpoint_path(self.folder.checkpoints, self.step)}: go on with --resume"
            )

    def _learn(self, batch: Any) -> bool:
        """The updates of one batch. False where the run's last step came before its end."""
        waiting: list[Any] = []
        for minibatch in self.algorithm.minibatches(batch):
            if self.step >= self.options.steps:
                return False
            waiting.append(minibatch)
            if len(waiting) == self.options.accumulation:
                self._update(waiting, batch.metrics)
                waiting = []
        if waiting:  # fewer than planned, because rewards failed
            self._update(waiting, batch.metrics)
        return True

    def _update(self, minibatches: list[Any], batch_metrics: Mapping[str, float]) -> None:
        """One optimiser update from the accumulated gradient of these minibatches."""
        means = Means()
        self.recorder.clock.progress("updating", self.step, self.options.steps)
        for place, minibatch in enumerate(minibatches, start=1):
            losses = self.algorithm.losses(minibatch, 1 / self.options.accumulation)
            count = self.algorithm.loss_count(minibatch)
            for number in range(1, count + 1):
                last = place == len(minibatches) and number == count
                with nullcontext() if last else self.machinery.no_sync():
                    loss, metrics = next(losses)
                    self.machinery.backward(loss)
                means.add(metrics)
            if next(losses, None) is not None:
                raise RuntimeError("losses yielded more than loss_count said")
        norm, measured, trained = self.machinery.clip(), means.take(), self.machinery.parameters
        self.guards.gradient(norm, measured, batch_metrics, trained, self.step + 1)
        self.machinery.update(self.step)
        self.step += 1
        numbers = {
            **batch_metrics,
            **measured,
            "train/gradient_norm": norm,
            **self.machinery.readings(),
        }
        self.recorder.step(self.step, self.iteration, numbers)

    def _save(self) -> None:
        checkpoint = Checkpoint(
            step=self.step,
            iteration=self.iteration,
            seconds=self.recorder.seconds(),
            algorithm=type(self.algorithm).__name__,
            parameters=self.machinery.named_parameters(),
            state={
                "algorithm": self.algorithm.state_dict(),
                "random": random_state.capture(),
                **self.machinery.state_dict(),
            },
        )
        save_checkpoint(self.folder.checkpoints, checkpoint, keep=self.options.keep_checkpoints)
        self.saved_at = self.step

    def restore(self, say: Callable[[str], None]) -> None:
        """Continue from the newest sound checkpoint, or from the beginning where there is none."""
        checkpoint = load_newest(self.folder.checkpoints, say)
        if checkpoint is None:
            self.folder.cut(-1)
            say("no checkpoint was made yet: beginning at step 0")
            return
        self.machinery.load(checkpoint, type(self.algorithm).__name__)
        self.algorithm.load_state_dict(checkpoint.state["algorithm"])
        random_state.restore(checkpoint.state["random"])
        self.step, self.iteration = checkpoint.step, checkpoint.iteration
        self.seconds, self.saved_at = checkpoint.seconds, checkpoint.step
        self.folder.cut(self.step)
        say(f"resumed at step {self.step}, iteration {self.iteration}")
