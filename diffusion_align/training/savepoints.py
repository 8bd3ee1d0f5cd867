"""Where a run can go back to: its checkpoints, and in memory the moment before an iteration.

Checkpoints fall between iterations, so a batch is never saved. Before an error ends a run, what it
has learnt so far is saved once more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from diffusion_align.algorithms.base import Algorithm
from diffusion_align.errors import UserError
from diffusion_align.training import random_state
from diffusion_align.training.best import BestWeights
from diffusion_align.training.checkpoint import (
    Checkpoint,
    checkpoint_path,
    checkpoint_steps,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)
from diffusion_align.training.distribution import Processes
from diffusion_align.training.exactness import reservations
from diffusion_align.training.guards.watch import Guards
from diffusion_align.training.probe import Probe
from diffusion_align.training.record import Recorder
from diffusion_align.training.run_folder import RunFolder
from diffusion_align.training.setup import Machinery


@dataclass(frozen=True)
class Start:
    """Where a sitting begins; by default at the beginning of the run.

    `trackers` are the runs that trackers keep elsewhere, by the tracker's name.
    """

    step: int = 0
    iteration: int = 0
    seconds: float = 0.0
    trackers: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Moment:
    """What an iteration changes before its first update; random states of all ranks."""

    algorithm: dict[str, Any]
    guards: dict[str, Any]
    randoms: list[dict[str, Any]]


class Savepoints:
    """Saves one run, rescues it, and brings it back.

    Args:
        algorithm, machinery, guards: what is saved and restored; the recorder's clock, tracker
            names and seconds as well.
        folder: where to.
        group: the main process writes; what all must do together, all call.
        keep: so many checkpoints stay.
    """

    def __init__(
        self,
        algorithm: Algorithm[Any, Any],
        folder: RunFolder,
        machinery: Machinery,
        recorder: Recorder,
        guards: Guards,
        group: Processes,
        *,
        keep: int,
    ) -> None:
        self._algorithm, self._machinery, self._guards = algorithm, machinery, guards
        self._folder, self._recorder, self._group, self._keep = folder, recorder, group, keep
        self._best = BestWeights(folder.path / "best")
        self._saved_at = -1

    def moment(self) -> Moment:
        """The present, for `rewind`."""
        randoms = self._group.exchange(random_state.capture())
        return Moment(self._algorithm.state_dict(), self._guards.state_dict(), randoms)

    def rewind(self, moment: Moment, error: BaseException) -> None:
        """As if the iteration had not begun; a guard that ended it may count anew."""
        self._algorithm.load_state_dict(moment.algorithm)
        self._guards.load_state_dict(moment.guards)
        self._guards.forgive(error)
        random_state.restore(moment.randoms[self._group.rank])

    def save(self, step: int, iteration: int, randoms: list[dict[str, Any]] | None = None) -> None:
        """Write the checkpoint of `step`.

        Args:
            randoms: states of all ranks; where none are given, all ranks must call and tell theirs.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        randoms = randoms or self._group.exchange(random_state.capture())
        parameters, state = self._machinery.whole_parameters(), self._machinery.state_dict()
        self._saved_at = step
        if not self._group.is_main:
            return
        self._folder.flush()
        checkpoint = Checkpoint(
            step=step,
            iteration=iteration,
            seconds=self._recorder.seconds(),
            algorithm=type(self._algorithm).__name__,
            parameters=parameters,
            state={
                "algorithm": self._algorithm.state_dict(),
                "guards": self._guards.state_dict(),
                "random": randoms[0],
                "random_of_others": randoms[1:],
                "trackers": self._recorder.tracker_ids,
                **state,
            },
        )
        self._saved_at = -1  # until it is
        save_checkpoint(self._folder.checkpoints, checkpoint, keep=self._keep)
        self._saved_at = step
        self._settle_best()

    def save_once(
        self, step: int, iteration: int, randoms: list[dict[str, Any]] | None = None
    ) -> None:
        """The same, unless `step` is saved already."""
        if self._saved_at != step:
            self.save(step, iteration, randoms)

    def rescue(
        self, step: int, iteration: int, randoms: list[dict[str, Any]] | None = None
    ) -> None:
        """Save before an error ends the run; the error itself matters more than a failed save."""
        if step == 0:
            return  # nothing was learnt
        say = self._recorder.clock.message
        try:
            self.save_once(step, iteration, randoms)
        except UserError as error:
            say(f"the run stops, and its last steps could not be saved: {error}")
            return
        say(
            f"the run stops; step {step} is saved in "
            f"{checkpoint_path(self._folder.checkpoints, step)}: go on with --resume"
        )

    def keep_best(self, step: int) -> None:
        """Keep the present weights in `best/`, as those of `step`."""
        with self._machinery.savable():
            if self._group.is_main:
                self._best.keep(step, self._algorithm.policy.save)

    def restore(self, say: Callable[[str], None], probe: Probe | None = None) -> Start:
        """Go back to the newest sound checkpoint, or to the beginning where there is none.

        Raises:
            UserError: all checkpoints are damaged, or the newest sound one does not fit.
        """
        checkpoint = self._newest(say)
        if checkpoint is None:
            self._cut(-1)
            say("no checkpoint was made yet: beginning at step 0")
            return Start()
        self._machinery.load(checkpoint, type(self._algorithm).__name__)
        self._algorithm.load_state_dict(checkpoint.state["algorithm"])
        if (watched := checkpoint.state.get("guards")) is not None:
            self._guards.load_state_dict(watched)
        lost = self._restore_random(checkpoint.state)
        self._saved_at = checkpoint.step
        self._cut(checkpoint.step)
        say(f"resumed at step {checkpoint.step}, iteration {checkpoint.iteration}")
        device, size = str(self._machinery.device), self._group.size
        for line in reservations(
            self._algorithm, self._folder, lost, device=device, processes=size, probe=probe
        ):
            say(line)
        trackers = dict(checkpoint.state.get("trackers", {}))
        return Start(checkpoint.step, checkpoint.iteration, checkpoint.seconds, trackers)

    def _newest(self, say: Callable[[str], None]) -> Checkpoint | None:
        """The main process chooses, and sets damaged ones aside; the others read the same."""
        place = self._folder.checkpoints
        chosen = load_newest(place, say) if self._group.is_main else None
        step = self._group.exchange(chosen.step if chosen else None)[0]
        if self._group.is_main or step is None:
            return chosen
        return load_checkpoint(checkpoint_path(place, step))

    def _cut(self, step: int) -> None:
        """Forget what is past `step`; nobody goes on before it is gone."""
        if self._group.is_main:
            self._folder.cut(step)
            self._best.cut(step)
            self._settle_best()
        self._group.wait()

    def _settle_best(self) -> None:
        """Drop the best weights that none of the kept checkpoints knows."""
        steps = sorted(checkpoint_steps(self._folder.checkpoints))
        self._best.settle(steps[-max(self._keep, 1) :])

    def _restore_random(self, state: Mapping[str, Any]) -> list[str]:
        """This rank's random states, where there was such a rank; what could not be restored."""
        known, rank = [state["random"], *state.get("random_of_others", [])], self._group.rank
        return random_state.restore(known[rank]) if rank < len(known) else []
