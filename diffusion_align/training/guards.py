"""Guards: a run that cannot learn stops, says why, and says what to do."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import nn

from diffusion_align.errors import UserError

EQUAL_REWARDS_ALLOWED = 3
"""Iterations in a row whose rewards may all be equal."""

SKIPPED_ALLOWED = 20
"""fp16 updates in a row that its scaler may skip while it looks for its scale."""


class Guards:
    """Watches one run. Every method raises UserError when it is time to stop."""

    def __init__(self, *, scaled: bool = False) -> None:
        """`scaled`: an fp16 gradient scaler is at work, whose first overflows are normal."""
        self._scaled = scaled
        self._equal = 0
        self._skipped = 0
        self._reached = False

    def rewards(self, metrics: Mapping[str, float]) -> None:
        """Stop where the rewards of several iterations in a row have no spread at all."""
        spread = metrics.get("reward/std")
        if spread is None:
            return
        self._equal = self._equal + 1 if spread == 0 else 0
        if self._equal >= EQUAL_REWARDS_ALLOWED:
            raise UserError(
                f"all rewards were equal ({metrics.get('reward/mean')}) in {self._equal} "
                "iterations in a row: there is nothing to learn from",
                where="reward",
                fix="look at the sample pictures; is the reward saturated, or too coarse for these"
                " prompts?\nmore samples per prompt, or a finer reward, give it something to tell"
                " apart",
            )

    def gradient(
        self,
        norm: float,
        loss_metrics: Mapping[str, float],
        batch_metrics: Mapping[str, float],
        parameters: Sequence[nn.Parameter],
        step: int,
    ) -> None:
        """Stop on NaN or infinity, and where nothing reaches the parameters. Before the update."""
        if not math.isfinite(norm):
            self._not_finite(norm, loss_metrics, step)
            return
        self._skipped = 0
        if self._reached:
            return
        # Later a zero is honest (everything clipped); at the first update it is not.
        reached = any(parameter.grad is not None for parameter in parameters)
        self._reached = reached and norm > 0
        if not reached or (norm == 0 and batch_metrics.get("reward/std", 1.0) > 0):
            raise UserError(
                "no gradient reached the trained parameters",
                where=f"step {step}",
                fix="is the policy loaded with LoRA (or full=True), is the adapter switched on,\n"
                "and does nothing on the way run under no_grad or detach?",
            )

    def _not_finite(self, norm: float, loss_metrics: Mapping[str, float], step: int) -> None:
        self._skipped += 1
        if self._scaled and self._skipped <= SKIPPED_ALLOWED:
            return
        bad = [name for name, value in loss_metrics.items() if not math.isfinite(value)]
        also = f"; also not finite: {', '.join(bad)}" if bad else ""
        raise UserError(
            f"the gradient's norm is {norm}{also}",
            where=f"step {step}",
            fix="the parameters were not touched, the last checkpoint is sound.\n"
            "try a lower train.learning_rate, train.mixed_precision=no or bf16, a smaller clip"
            " range,\nand see whether the reward returns huge numbers",
        )
