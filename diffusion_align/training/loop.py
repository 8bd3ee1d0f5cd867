"""The training loop: one for every algorithm.

collect -> cut into minibatches -> back-propagate every yielded loss -> clip -> update, with
checkpoints between iterations (`savepoints`). It knows the algorithm contract and nothing of any
method.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from diffusion_align.algorithms.base import Algorithm
from diffusion_align.reporting.console import Console, Quiet, Reporter
from diffusion_align.training import random_state
from diffusion_align.training.distribution import Attentive, Processes, check_equal, meet
from diffusion_align.training.final import write_final
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import GuardStop
from diffusion_align.training.guards.drift import Clip
from diffusion_align.training.guards.watch import Guards, NotFinite
from diffusion_align.training.interrupt import Interrupted, Interruption
from diffusion_align.training.means import Means
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.probe import Probe
from diffusion_align.training.record import Recorder
from diffusion_align.training.result import TrainResult
from diffusion_align.training.run_folder import (
    check_record,
    open_run_folder,
    write_environment,
    write_record,
)
from diffusion_align.training.savepoints import Savepoints, Start
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
    guards: GuardOptions | None = None,
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
        guards: what is watched while it runs, and what is done about it (docs/guards.md).

    Raises:
        UserError: options that do not fit, an occupied folder, damaged checkpoints, a guard.
    """
    options = options or TrainOptions()
    options = options if steps is None else replace(options, steps=steps)
    options.check_accumulation(algorithm.minibatch_count(), algorithm.minibatch_arithmetic())
    name = type(algorithm).__name__.lower()
    with ExitStack() as stack:
        on_cpu = torch.device(algorithm.policy.device).type == "cpu"
        group = meet(on_cpu=on_cpu, lockstep=options.distribution == "fsdp2")
        stack.enter_context(group.as_one())
        folder = group.on_main(lambda: open_run_folder(output, name=name, resume=resume, new=new))
        # The others are silent; they look at the model only where the main one cannot alone.
        reporter = (reporter or Console()) if group.is_main else Quiet()
        probe = probe if group.is_main or group.lockstep else None
        stack.callback(reporter.close)
        stack.enter_context(random_state.borrowed(seed + group.rank))
        machinery = stack.enter_context(Machinery(algorithm, options, group))
        algorithm.group = group
        recorder = Recorder(folder, options, reporter, probe, writes=group.is_main)
        recorder.looking = machinery.averaged
        stack.callback(recorder.close)
        algorithm.listener = Attentive(recorder.clock, group)
        watch = Guards(
            guards,
            say=recorder.clock.message,
            scaled=machinery.scaled,
            clip=Clip.of(algorithm),
            trained_on=algorithm.record().get("trained_on", ()),
        )
        savepoints = Savepoints(
            algorithm, folder, machinery, recorder, watch, group, keep=options.keep_checkpoints
        )
        start = Start()
        if resume:
            check_record(folder, algorithm.record())
            start = savepoints.restore(reporter.message, probe)
        run = _Run(algorithm, options, machinery, recorder, watch, savepoints, group, start)
        if group.is_main:
            write_environment(folder, str(machinery.device), group.size)
            write_record(folder, name, algorithm.record())
        interruption = stack.enter_context(Interruption(reporter.message))
        lines = [*algorithm.describe(), *machinery.notes, *run.remainder()]
        recorder.start(start.step, start.seconds, lines, start.trackers)
        run.iterate(interruption)
        if machinery.average is not None:
            machinery.average.adopt()  # checkpoints hold both; the policy is what final/ is
        # Also where nothing was left to train: a crash may have left an earlier stop's weights.
        with machinery.savable():
            if group.is_main:
                write_final(folder.final, algorithm.policy.save, reporter.message)
        group.wait()
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
        machinery: Machinery,
        recorder: Recorder,
        guards: Guards,
        savepoints: Savepoints,
        group: Processes,
        start: Start,
    ) -> None:
        self.algorithm, self.options, self.group = algorithm, options, group
        self.machinery, self.recorder = machinery, recorder
        self.guards, self.savepoints = guards, savepoints
        recorder.on_look = self._looked
        self.per_iteration = algorithm.minibatch_count() // options.accumulation
        self.updated = False  # in this sitting
        self.step, self.iteration = start.step, start.iteration

    def iterate(self, interruption: Interruption) -> None:
        """Iterations until all steps are done or the run is interrupted; checkpoints between."""
        while self._goes_on(interruption):
            if self.step and self.options.steps - self.step < self.per_iteration:
                # The coming iteration will end early, where nothing can be saved.
                self.savepoints.save_once(self.step, self.iteration)
            before = self.savepoints.moment()
            try:
                # In a group another rank may be elsewhere: there the iteration is finished.
                with interruption.droppable() if self.group.size == 1 else nullcontext():
                    batch = self.algorithm.collect(self.iteration)
                self.guards.collected(batch.metrics, self.iteration)
            except (Interrupted, Exception) as error:
                # Nothing was learnt from it, and it can be made again: as if it had not begun.
                self.savepoints.rewind(before, error)
                if isinstance(error, Interrupted):
                    break
                # Shards can be made whole only where all ranks fail at one place, as by a guard.
                savable = not self.group.lockstep or isinstance(error, GuardStop)
                self.group.fail(error, unsaved=savable)
                if savable:
                    self.savepoints.rescue(self.step, self.iteration, before.randoms)
                raise
            begun = self.step
            try:
                if not self._learn(batch):
                    return
            except GuardStop as error:
                if self.step == begun:  # no update was made: the iteration can be repeated whole
                    self.savepoints.rewind(before, error)
                    self.savepoints.rescue(self.step, self.iteration)
                raise
            self.iteration += 1
            self._check_updates()
            every = self.options.checkpoint_every
            if every and self.iteration % every == 0:
                self.savepoints.save(self.step, self.iteration)
        self.savepoints.save_once(self.step, self.iteration)

    def _goes_on(self, interruption: Interruption) -> bool:
        """Whether another iteration begins. All ranks decide alike, whoever was told to end."""
        reasons = torch.tensor([[interruption.requested, self.guards.ending is not None]])
        requested, ending = self.group.gather(reasons).any(dim=0).tolist()
        interruption.requested = requested
        return self.step < self.options.steps and not requested and not ending

    def _check_updates(self) -> None:
        """What guards say at the end of an iteration; unless it is lost, it is saved first."""
        try:
            self.guards.updated(self.machinery.named_parameters(), self.step)
        except NotFinite:
            raise
        except GuardStop:
            self.savepoints.rescue(self.step, self.iteration)
            raise

    def _looked(self, step: int, scores: Mapping[str, Any]) -> None:
        if self.group.lockstep:  # all have looked, and a score need not be the same on all
            scores = self.group.exchange(scores)[0]
        if self.guards.looked(step, scores):
            self.savepoints.keep_best(step)

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
        norm, measured = self.machinery.clip(), self.group.mean(means.take())
        trained = self.machinery.named_parameters()
        self.guards.gradient(norm, measured, batch_metrics, trained, self.step + 1)
        self.machinery.update(self.step)
        if not self.updated:
            check_equal(self.group, trained)
            self.updated = True
        self.step += 1
        numbers = {
            **batch_metrics,
            **measured,
            "train/gradient_norm": norm,
            **self.machinery.readings(),
            **self.guards.readings(),
        }
        self.recorder.step(self.step, self.iteration, numbers)
