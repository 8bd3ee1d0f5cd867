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
        """Stop where several iterations in a row have nothing to learn from.

        That is where the rewards, or what the algorithm makes of them, have no spread at all.
        """
        spread = _spread(metrics)
        if spread is None:
            return
        self._equal = self._equal + 1 if spread == 0 else 0
        if self._equal < EQUAL_REWARDS_ALLOWED:
            return
        if metrics.get("reward/std"):
            raise UserError(
                f"the rewards differ, but every advantage was zero in {self._equal} iterations in "
                "a row: there is nothing to learn from",
                where="algorithm.advantages",
                fix="the samples that are compared with each other all got one reward: give more"
                " samples per prompt\nor a finer reward, or compare across prompts"
                " (algorithm.advantages=global)",
            )
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
        # Later a zero is honest (everything clipped); at the first update it is not, unless all
        # advantages are zero.
        reached = any(parameter.grad is not None for parameter in parameters)
        self._reached = reached and norm > 0
        if not reached or (norm == 0 and _spread(batch_metrics) != 0):
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


def _spread(metrics: Mapping[str, float]) -> float | None:
    """Of the advantages where there are any, else of the rewards; None where neither is known."""
    return metrics.get("advantage/std", metrics.get("reward/std"))
