"""dL/dpixels: the losses that are put on a reward's scores, and one vector-Jacobian product.

    negative   L = -r                     (DRaFT)
    relu       L = max(0, target - r)     (ReFL, SRPO: what is good enough teaches nothing)
    absolute   L = |target - r|           (AlignProp, VADER)

all times `scale`, summed over the items: every item's gradient stands in its own rows, and nothing
depends on what else is in the batch (but within a prompt, for a reward of scope `group`). Losses
live here and never in a scorer. Items without a score are taken out before any arithmetic.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.errors import UserError
from reward_models.base import Reward, Scores

_RANGE = re.compile(r"^(about )?(-?\d+(?:\.\d+)?) to (-?\d+(?:\.\d+)?)(?=$|;|,| \()")
SLACK = 0.01
"""Share of a range stated as bounds by which rounding, and pixels a little outside, may miss it."""


@dataclass(frozen=True)
class RewardLoss:
    """A loss on scores r, per item."""

    kind: Literal["negative", "relu", "absolute"]
    target: float
    scale: float

    @classmethod
    def of(cls, options: DraftOptions) -> RewardLoss:
        """The one that the options name."""
        return cls(options.loss, options.loss_target or 0.0, options.loss_scale)

    def __call__(self, scores: Tensor) -> Tensor:
        """[B] -> [B]."""
        if self.kind == "negative":
            return -self.scale * scores
        missing = self.target - scores
        return self.scale * (missing.relu() if self.kind == "relu" else missing.abs())

    def teaches(self, scores: Tensor) -> Tensor:
        """Whose loss has a slope: bool [B]; not those without a score."""
        known = scores.isfinite()
        return known if self.kind == "negative" else known & (self(scores) > 0)

    def words(self) -> str:
        """The formula with its numbers."""
        if self.kind == "negative":
            return f"-{self.scale:g} r"
        inner = f"{self.target:g} - r"
        return f"{self.scale:g} " + (f"max(0, {inner})" if self.kind == "relu" else f"|{inner}|")


class WithGradient:
    """A reward that, asked for scores, also keeps dL/dpixels of what it was given.

    It has the contract of a reward, so whoever scores chunks (whole prompts, with a time limit,
    naming what fails) need know nothing of gradients. `take` hands the gradients over.
    """

    def __init__(self, reward: Reward, loss: RewardLoss) -> None:
        self._reward, self._loss = reward, loss
        self.info = reward.info
        self._gradients: list[Tensor] = []

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Scores without a graph.

        Raises:
            UserError: scores without a gradient, or a gradient that is not finite.
        """
        with torch.enable_grad():
            leaf = media.detach().requires_grad_()
            scores = self._reward.score(leaf, prompts, fps=fps, metadata=metadata)
            values = scores.values if isinstance(scores, Scores) else None
            gradient = torch.zeros_like(media)
            if isinstance(values, Tensor) and values.ndim == 1 and len(values) == len(media):
                teaches = self._loss.teaches(values.detach())
                if bool(teaches.any()):
                    gradient = self._product(values, teaches, leaf)
        self._gradients.append(gradient)
        return scores

    def take(self) -> list[Tensor]:
        """Gradients [B, ...] of the calls since the last time, in their order."""
        taken, self._gradients = self._gradients, []
        return taken

    def _product(self, values: Tensor, teaches: Tensor, leaf: Tensor) -> Tensor:
        where = f"reward {self.info.name}"
        if not values.requires_grad:
            raise UserError(
                "its scores do not depend on the pixels differentiably, although it is declared "
                "differentiable: the chain breaks at the reward",
                where=where,
                fix="does something in it run under no_grad, .detach(), .item(), PIL or numpy?",
            )
        # Taken out first: 0 x NaN would be NaN in everybody's gradient.
        (found,) = torch.autograd.grad(self._loss(values[teaches]).sum(), leaf, allow_unused=True)
        if found is None:
            raise UserError(
                "no gradient of its scores reaches the pixels: the chain breaks at the reward",
                where=where,
                fix="does it look at a copy of the pictures that was made without gradients?",
            )
        # In a group others' scores depend on these pixels too; alone nobody's does.
        if self.info.scope == "item":
            found = found.where(teaches.view(-1, *[1] * (found.ndim - 1)), 0.0)
        if not bool(found.isfinite().all()):
            raise UserError(
                "the gradient of its scores with respect to the pixels is not finite",
                where=where,
                fix="a square root or a norm at 0, or a division by it, has such a gradient",
            )
        return found


@dataclass(frozen=True)
class StatedRange:
    """The bounds that a `RewardInfo.range` states; `about`: as an observation, not as bounds."""

    low: float
    high: float
    about: bool

    @property
    def limits(self) -> tuple[float, float]:
        """Beyond these a score is a fault: bounds but for rounding, observations by their width.

        What is optimised leaves the range of photographs, which is what it is optimised for; no
        published run's mean went as far as that range is wide (HPS v2.1, about 0.15 to 0.35: 0.41).
        """
        slack = (1.0 if self.about else SLACK) * (self.high - self.low)
        return self.low - slack, self.high + slack

    def __str__(self) -> str:
        return f"{'about ' if self.about else ''}{self.low:g} to {self.high:g}"


def stated_range(words: str) -> StatedRange | None:
    """The range that the words begin with; None where they state none, or one of some size only.

    >>> stated_range("0 to 1 (share of the claims)"), stated_range("about 4 to 7; a note")
    (StatedRange(low=0.0, high=1.0, about=False), StatedRange(low=4.0, high=7.0, about=True))
    >>> stated_range("20 to 300 at 512 x 512")
    """
    found = _RANGE.match(words)
    return StatedRange(float(found[2]), float(found[3]), bool(found[1])) if found else None


class RangeCheck:
    """Whether scores stay in the range that their reward states: stop, or say it once.

    Gradients find the directions in which a scorer leaves what it was made for; a score that the
    scorer calls impossible means just that, or pixels of another range. A range that is stated
    with an "about" was observed, on photographs mostly: there a score is a fault when it lies
    further outside than the range is wide. Where no range is stated nothing is looked at; of a
    weighted sum each term is.
    """

    def __init__(
        self, reward: Reward, action: Literal["stop", "warn", "off"], say: Callable[[str], None]
    ) -> None:
        self._action, self._say, self._said = action, say, False
        whole, inner = reward.info, getattr(reward, "image_reward", reward)
        known = [("", whole), *((r.info.name, r.info) for _, _, r in getattr(inner, "terms", ()))]
        # Of the scores, "", and of the parts that are terms of a sum.
        self._stated = {name: stated_range(info.range) for name, info in known}
        self._name = whole.name

    def look(self, scores: Scores, iteration: int) -> None:
        """values, and parts of a sum: float [N], NaN where there is no score.

        Raises:
            UserError: a score outside the stated range (`stop`).
        """
        if self._action == "off":
            return
        for name, stated in self._stated.items():
            values = scores.parts.get(name) if name else scores.values
            if stated is not None and values is not None:
                self._compare(values, stated, name or self._name, iteration)

    def _compare(self, values: Tensor, stated: StatedRange, name: str, iteration: int) -> None:
        low, high = stated.limits
        outside = values[(values < low) | (values > high)]
        if not len(outside):
            return
        what = (
            f"{len(outside)} of {len(values)} scores of iteration {iteration} lie outside its "
            f"range {stated}{', by more than its width' if stated.about else ''}: "
            f"{float(outside[0]):.4g}"
        )
        where = f"reward {name}"
        if self._action == "stop":
            raise UserError(
                what,
                where=where,
                fix="the reward is over-optimised (see docs/reward_hacking.md: a relu loss, a KL "
                "term, fewer steps), or its range is stated wrongly;\n"
                "algorithm.range_check=warn goes on",
            )
        if not self._said:
            self._say(f"warning: {where}: {what}")
        self._said = True
