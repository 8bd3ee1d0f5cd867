"""What is watched before every update: NaN, gradients that arrive nowhere, spikes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import Alarm, Finding, GuardStop, Say

SKIPPED_ALLOWED = 20
"""Updates in a row that an fp16 scaler, or `not_finite: skip`, may leave out."""

REMEMBERED, ENOUGH = 50, 10
"""Gradient norms whose median is taken, and how many of them there must be."""


class GradientGuards:
    """not_finite, no_gradient, unreached, gradient_spike.

    Args:
        scaled: an fp16 gradient scaler is at work, whose first overflows are normal.
    """

    def __init__(self, options: GuardOptions, say: Say, *, scaled: bool) -> None:
        self._options, self._say, self._scaled = options, say, scaled
        self.no_gradient = Alarm("no_gradient", options.no_gradient, 1, say)
        self.unreached = Alarm("unreached", options.unreached, 1, say)
        self.spike = Alarm("gradient_spike", options.gradient_spike, 1, say)
        self.alarms = (self.no_gradient, self.unreached, self.spike)
        self._norms: deque[float] = deque(maxlen=REMEMBERED)
        self._skipped = 0
        self._reached = False
        self._waiting: list[str] | None = None  # None: nothing has been looked at yet
        self._waited = 0

    def check(
        self,
        norm: float,
        numbers: Mapping[str, float],
        spread: float | None,
        parameters: Mapping[str, Tensor],
        step: int,
    ) -> None:
        """Before update number `step` (from 1) is made.

        Args:
            norm: of the whole gradient, before clipping.
            numbers: what the losses reported.
            spread: see `spread_of`; 0 where no gradient is to be expected.

        Raises:
            GuardStop: with advice.
        """
        if not math.isfinite(norm):
            self._not_finite(norm, numbers, parameters, step)
            return
        self._skipped = 0
        if not self._reached:
            self._anything_at_all(norm, spread, parameters, step)
        if norm > 0:
            self._everything(parameters, step)
            self._spikes(norm, step)

    def _not_finite(
        self, norm: float, numbers: Mapping[str, float], parameters: Mapping[str, Tensor], step: int
    ) -> None:
        bad = [name for name, value in numbers.items() if not math.isfinite(value)]
        also = f"; also not finite: {', '.join(bad)}" if bad else ""
        skipping = self._options.not_finite == "skip"
        self._skipped += 1
        if (self._scaled or skipping) and self._skipped <= SKIPPED_ALLOWED:
            if skipping and not self._scaled:
                # Without gradients the optimiser does nothing; the scaler sees to that by itself.
                for parameter in parameters.values():
                    parameter.grad = None
                if self._skipped == 1:
                    self._say(
                        f"guard not_finite: step {step}: the gradient's norm is {norm}{also}. "
                        "The update is left out"
                    )
            return
        row = f" in {self._skipped} updates in a row" if self._skipped > 1 else ""
        raise GuardStop(
            "not_finite",
            Finding(
                f"the gradient's norm is {norm}{row}{also}",
                f"step {step}",
                "the parameters were not touched, the last checkpoint is sound.\n"
                "try a lower train.learning_rate, train.mixed_precision=no or bf16, a smaller clip"
                " range,\nand see whether the reward returns huge numbers",
            ),
            way_on="skip (leaves such updates out)",
        )

    def _anything_at_all(
        self, norm: float, spread: float | None, parameters: Mapping[str, Tensor], step: int
    ) -> None:
        # Later a zero is honest (everything clipped); at the first update it is not, unless all
        # advantages are zero.
        arrived = any(parameter.grad is not None for parameter in parameters.values())
        self._reached = arrived and norm > 0
        self.no_gradient.check(
            not arrived or (norm == 0 and spread != 0),
            lambda: Finding(
                "no gradient reached the trained parameters",
                f"step {step}",
                "is the policy loaded with LoRA (or full=True), is the adapter switched on,\n"
                "and does nothing on the way run under no_grad or detach?",
            ),
        )

    def _everything(self, parameters: Mapping[str, Tensor], step: int) -> None:
        """LoRA's A has no gradient while B is zero, hence at the first update of all."""
        if not self.unreached.is_on or self._waiting == []:
            return
        waiting = list(parameters) if self._waiting is None else self._waiting
        gradients = [parameters[name].grad for name in waiting if name in parameters]
        norms: list[Any] = [None if g is None else torch.linalg.vector_norm(g) for g in gradients]
        # A sharded tensor's norm is put together from all processes: the answer is the same on all.
        whole: list[Any] = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]
        known = [n for n in whole if n is not None]
        values = iter(torch.stack(known).tolist() if known else [])
        arrived = [n is not None and next(values) > 0 for n in whole]
        self._waiting = [name for name, there in zip(waiting, arrived, strict=True) if not there]
        self._waited += 1
        if self._waited < self._options.unreached_updates:
            return
        lost, self._waiting = self._waiting, []
        self.unreached.check(
            bool(lost),
            lambda: Finding(
                f"{len(lost)} of {len(parameters)} trained tensors got no gradient in "
                f"{self._waited} updates: {', '.join(lost[:3])}{' ...' if len(lost) > 3 else ''}",
                f"step {step}",
                "they cost memory and learn nothing: is a module of lora.targets unused by this "
                "model,\nor cut off by no_grad or detach?",
            ),
        )

    def _spikes(self, norm: float, step: int) -> None:
        known = len(self._norms)
        usual = median(self._norms) if known >= ENOUGH else math.inf
        self._norms.append(norm)
        self.spike.check(
            norm > self._options.gradient_spike_factor * usual,
            lambda: Finding(
                f"the gradient's norm is {norm:.3g}, {norm / usual:.3g} times the median of the "
                f"last {known}",
                f"step {step}",
                "train.max_grad_norm keeps such an update small; where spikes come often, lower "
                "train.learning_rate\nor look for single samples with extreme rewards "
                "(reward/min, reward/max)",
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """All counts."""
        return {
            "norms": list(self._norms),
            "skipped": self._skipped,
            "reached": self._reached,
            "waiting": None if self._waiting is None else list(self._waiting),
            "waited": self._waited,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._norms = deque(state["norms"], maxlen=REMEMBERED)
        self._skipped, self._reached = state["skipped"], state["reached"]
        self._waiting, self._waited = state["waiting"], state["waited"]
        if self._waiting is not None:
            self._waiting = list(self._waiting)
