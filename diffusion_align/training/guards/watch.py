"""What the training loop tells the guards, and what they keep between iterations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import Alarm, Finding, GuardStop, Say
from diffusion_align.training.guards.drift import Clip, DriftGuards
from diffusion_align.training.guards.gradients import GradientGuards
from diffusion_align.training.guards.heldout import Best, HeldoutGuard
from diffusion_align.training.guards.rewards import RewardGuards, spread_of

if TYPE_CHECKING:
    from diffusion_align.evaluation.statistics import Floats


def _silence(text: str) -> None:
    pass


class Guards:
    """Watches one run. Every number it is told is the same on all processes, so is its answer.

    Args:
        options: what is watched, and what is done about it.
        say: takes warnings, one line each.
        scaled: an fp16 gradient scaler is at work, whose first overflows are normal.
        clip: the range of the likelihood ratio; None where the algorithm clips none.
        trained_on: names of the rewards that are trained on, hence no held-out ones.
    """

    def __init__(
        self,
        options: GuardOptions | None = None,
        *,
        say: Say = _silence,
        scaled: bool = False,
        clip: Clip | None = None,
        trained_on: Sequence[str] = (),
    ) -> None:
        self.options = options or GuardOptions()
        self._gradients = GradientGuards(self.options, say, scaled=scaled)
        self._rewards = RewardGuards(self.options, say)
        self._drift = DriftGuards(self.options, say, clip)
        self._heldout = HeldoutGuard(self.options, say, trained_on)

    def collected(self, metrics: Mapping[str, float], iteration: int) -> None:
        """A batch is there and nothing was learnt from it yet.

        Raises:
            GuardStop: equal rewards, a reward that collapsed, pictures that changed too far.
        """
        self._drift.forget()
        self._rewards.check(metrics, iteration)

    def gradient(
        self,
        norm: float,
        numbers: Mapping[str, float],
        batch_metrics: Mapping[str, float],
        parameters: Mapping[str, Tensor],
        step: int,
    ) -> None:
        """Update number `step` (from 1) is about to be made; `numbers` come from its losses.

        Raises:
            GuardStop: NaN or infinity, a gradient that arrives nowhere, a spike.
        """
        self._gradients.check(norm, numbers, spread_of(batch_metrics), parameters, step)
        self._drift.add(numbers)

    def updated(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """All updates of an iteration are made, up to `step`; nothing is saved yet.

        Raises:
            GuardStop: the ratio or a KL left its bounds; the iteration should be saved first.
            NotFinite: the parameters are not finite; they must not be saved.
        """
        if not _finite(parameters.values()):
            bad = [name for name, value in parameters.items() if not _finite([value])]
            raise NotFinite(
                "not_finite",
                Finding(
                    f"{len(bad)} of {len(parameters)} trained tensors hold NaN or infinity "
                    f"(first: {bad[0]})",
                    f"step {step}",
                    "they are not saved, the last checkpoint is sound.\ntry a lower "
                    "train.learning_rate, a larger train.adam_epsilon, or "
                    "train.mixed_precision=no or bf16",
                ),
                way_on="",
            )
        self._drift.check(step)

    def looked(self, step: int, scores: Mapping[str, Floats]) -> bool:
        """Scores [P, S] by reward of the probe's pictures at `step`; step 0 is what counts against.

        Returns:
            Whether these weights are the best so far and should be kept.
        """
        best = self._heldout.look(step, scores, self._rewards.rose)
        return best and self.options.keep_best

    @property
    def ending(self) -> str | None:
        """Why the run should end with this iteration, or None."""
        return self._heldout.ending

    @property
    def best(self) -> Best:
        """The look with the best held-out rewards."""
        return self._heldout.best

    def readings(self) -> dict[str, float]:
        """``guard/<name>`` for what is wrong now: how often in a row; empty in a healthy run."""
        return {f"guard/{a.name}": float(a.held) for a in self._alarms() if a.is_ringing}

    def forgive(self, error: BaseException) -> None:
        """Where a guard's stop was rewound, let it count from the beginning after a resume."""
        if isinstance(error, GuardStop):
            for alarm in self._alarms():
                if alarm.guard == error.guard:
                    alarm.forgive()

    def _alarms(self) -> Iterator[Alarm]:
        for part in (self._gradients, self._rewards, self._drift, self._heldout):
            yield from part.alarms

    def state_dict(self) -> dict[str, Any]:
        """All counts, first values and baselines: numbers, text, None, lists and dicts of these."""
        shared = (*self._gradients.alarms, *self._rewards.alarms, *self._drift.alarms)
        return {
            "alarms": {alarm.name: alarm.state_dict() for alarm in shared},
            "gradients": self._gradients.state_dict(),
            "rewards": self._rewards.state_dict(),
            "drift": self._drift.state_dict(),
            "heldout": self._heldout.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        for alarm in (*self._gradients.alarms, *self._rewards.alarms, *self._drift.alarms):
            if alarm.name in state["alarms"]:
                alarm.load_state_dict(state["alarms"][alarm.name])
        self._gradients.load_state_dict(state["gradients"])
        self._rewards.load_state_dict(state["rewards"])
        self._drift.load_state_dict(state["drift"])
        self._heldout.load_state_dict(state["heldout"])


class NotFinite(GuardStop):
    """The parameters themselves are lost; nothing of this iteration may be saved."""


@torch.no_grad()
def _finite(tensors: Iterable[Tensor]) -> bool:
    """Whether all are; one synchronisation, and the same answer on all processes.

    0 x is 0, or NaN where x is NaN or infinite, and a sum carries that on. (A maximum would not:
    taken over several processes it may drop a NaN.)
    """
    zeros: list[Any] = [(value * 0).sum(dtype=torch.float32) for value in tensors]
    total = sum(zeros[1:], start=zeros[0])
    return bool((total.full_tensor() if hasattr(total, "full_tensor") else total) == 0)
