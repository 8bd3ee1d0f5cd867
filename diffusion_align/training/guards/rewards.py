"""What is watched of every iteration's samples: their rewards, and what the pictures look like."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from statistics import median
from typing import Any

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import Alarm, Finding, Say

WINDOW = 5
"""Iterations whose median is a running number: one bad iteration does not move it."""

PICTURES = {
    "saturation": ("saturation", 1.0),
    "edge_density": ("edge density", 1.0),
    "colour_entropy": ("colour entropy", 9.0),
    "diversity": ("same-prompt diversity", 1.0),
}
"""Statistics of the samples (`picture/<name>`): what they are called, and their range."""

LEAST_MOVE = 0.02
"""Moves below this share of a statistic's range are no news, however large against its start."""


EQUAL = 1e-7
"""Rewards whose spread is below this share of their mean differ by rounding (float32) alone."""


def spread_of(metrics: Mapping[str, float]) -> float | None:
    """What a gradient comes from, 0 where there is nothing; None where that is not known.

    The share of samples with a weight, in methods that weigh (equal weights teach as well); else
    the spread of the advantages, or that of the rewards.
    """
    names = ("weight/positive", "advantage/std", "reward/std")
    return next((metrics[name] for name in names if name in metrics), None)


LUCK = 2.5
"""By so many standard deviations of single iterations the first may have lain above all."""

FEW = 6
"""With so many bends the scatter counts twice, with many as it is."""

SCATTER_OF_UPPER = 1 / 2.818
"""Standard deviation of normal values from the upper quartile of |a - 2 b + c|, three in a row.
The quartile, as one bad iteration bends the curve in three places."""


class Running:
    """A number's first value, its median over the last iterations, and how much it scatters."""

    def __init__(self) -> None:
        self.first: float | None = None
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._bends: deque[float] = deque(maxlen=4 * WINDOW)

    @property
    def scatter(self) -> float:
        """Standard deviation of single iterations, as other prompts come; no trend is in it."""
        if not self._bends:
            return 0.0
        # A quantile of few is often far too small.
        upper = sorted(self._bends)[len(self._bends) * 3 // 4]
        return upper * SCATTER_OF_UPPER * (1 + FEW / len(self._bends))

    @property
    def now(self) -> float:
        """The running median; there must be a value."""
        return median(self._last)

    def add(self, value: float) -> None:
        """One more value."""
        if self.first is None:
            self.first = value
        if len(self._last) > 1:
            self._bends.append(abs(value - 2 * self._last[-1] + self._last[-2]))
        self._last.append(value)

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first, "last": list(self._last), "bends": list(self._bends)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first, self._last = state["first"], deque(state["last"], maxlen=WINDOW)
        # Checkpoints before 2026-11-21 have none.
        self._bends = deque(state.get("bends", ()), maxlen=4 * WINDOW)


class RewardGuards:
    """equal_rewards, reward_collapse, picture_change. All numbers are means over all processes."""

    def __init__(self, options: GuardOptions, say: Say) -> None:
        self._options = o = options
        self.equal = Alarm("equal_rewards", o.equal_rewards, o.equal_rewards_iterations, say)
        self.collapse = Alarm(
            "reward_collapse", o.reward_collapse, o.reward_collapse_iterations, say
        )
        self.changes = {
            name: Alarm(
                "picture_change", o.picture_change, o.picture_change_iterations, say, about=name
            )
            for name in PICTURES
        }
        self.alarms = (self.equal, self.collapse, *self.changes.values())
        self.reward = Running()
        self._deviation = 0.0
        self._pictures = {name: Running() for name in PICTURES}

    def check(self, metrics: Mapping[str, float], iteration: int) -> None:
        """An iteration's samples are there, nothing was learnt from them yet.

        Raises:
            GuardStop: with advice.
        """
        self._equal_rewards(metrics)
        if (mean := metrics.get("reward/mean")) is not None:
            if self.reward.first is None:
                self._deviation = metrics.get("reward/std", 0.0)
            self.reward.add(mean)
            self._collapse(iteration)
        for name, running in self._pictures.items():
            if (value := metrics.get(f"picture/{name}")) is not None:
                running.add(value)
                self._change(name, running, iteration)

    def _equal_rewards(self, metrics: Mapping[str, float]) -> None:
        deviation, source = metrics.get("reward/std"), spread_of(metrics)
        # What is remembered of a prompt gives equal rewards advantages, down to rounding: look at
        # the rewards themselves.
        equal = deviation is not None and deviation <= EQUAL * abs(metrics.get("reward/mean", 0.0))

        def finding() -> Finding:
            row = f"in {self.equal.held} iterations"
            if not equal and "weight/positive" in metrics:
                return Finding(
                    f"no sample had a weight {row} in a row: there is nothing to learn from",
                    "algorithm.threshold",
                    "no reward reaches it: lower it to what the rewards are"
                    f" (they are {metrics.get('reward/mean')} on average,"
                    f" {metrics.get('reward/max')} at most),\nor leave it out and set"
                    " algorithm.quantile",
                )
            if not equal:
                return Finding(
                    f"the rewards differ, but every advantage was zero {row} in a row: there is "
                    "nothing to learn from",
                    "algorithm.advantages",
                    "the samples that are compared with each other all got one reward: give more"
                    " samples per prompt\nor a finer reward, or compare across prompts"
                    " (algorithm.advantages=global)",
                )
            return Finding(
                f"all rewards were equal ({metrics.get('reward/mean')}) {row} in a row: there is "
                "nothing to learn from",
                "reward",
                "look at the sample pictures; is the reward saturated, or too coarse for these"
                " prompts?\nmore samples per prompt, or a finer reward, give it something to tell"
                " apart",
            )

        self.equal.check(equal or source == 0, finding)

    def _collapse(self, iteration: int) -> None:
        first, now = self.reward.first or 0.0, self.reward.now
        # With few prompts an iteration the first one may have been a lucky draw.
        luck = LUCK * self.reward.scatter
        limit = self._options.reward_collapse_deviations * self._deviation
        self.collapse.check(
            self._deviation > 0 and now < first - luck - limit,
            lambda: Finding(
                f"the running reward fell from {first:.4g} to {now:.4g}, "
                f"{(first - now) / self._deviation:.2g} standard deviations of the first "
                f"iteration's rewards (iterations scatter by {self.reward.scatter:.2g})",
                f"iteration {iteration}",
                "what was learnt makes the pictures worse: go back to an earlier checkpoint, and "
                "lower train.learning_rate or the clip range,\nraise algorithm.kl_weight or give "
                "more samples per prompt. Look at samples/ for when it began",
            ),
        )

    def _change(self, name: str, running: Running, iteration: int) -> None:
        first, now = running.first or 0.0, running.now
        label, scale = PICTURES[name]
        keeps = 1 - self._options.picture_change_share
        far = now <= keeps * first or keeps * now >= first
        self.changes[name].check(
            far and abs(now - first) >= LEAST_MOVE * scale,
            lambda: Finding(
                f"{label} of the samples went from {first:.3g} to {now:.3g} "
                f"({_percent(first, now)}){self._meanwhile()}",
                f"iteration {iteration}",
                "the usual sign of a reward that is being pleased by the wrong means (erased "
                "backgrounds, one loud colour, one picture for all):\nlook at samples/, name "
                "held-out rewards (evaluation.rewards), raise algorithm.kl_weight or stop earlier. "
                "It is no fault where the reward asks for it",
            ),
        )

    def _meanwhile(self) -> str:
        if self.reward.first is None:
            return ""
        return (
            f" while the running reward went from {self.reward.first:.4g} to {self.reward.now:.4g}"
        )

    @property
    def rose(self) -> bool:
        """Whether the running reward is above that of the first iteration."""
        return self.reward.first is not None and self.reward.now > self.reward.first

    def state_dict(self) -> dict[str, Any]:
        """First values and running medians."""
        return {
            "reward": self.reward.state_dict(),
            "deviation": self._deviation,
            "pictures": {name: running.state_dict() for name, running in self._pictures.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.reward.load_state_dict(state["reward"])
        self._deviation = state["deviation"]
        for name, running in self._pictures.items():
            running.load_state_dict(state["pictures"][name])


def _percent(first: float, now: float) -> str:
    return f"{100 * (now / first - 1):+.0f} %" if first else "from nothing"
