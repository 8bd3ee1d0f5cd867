"""How far the policy moves: the likelihood ratio against its clip range, and KL divergences.

Both are looked at once per iteration, as means (and the maximum) over its updates. Their own size
says little, because it hangs on the unit and on the number of latent dimensions (`mean` or `nats`,
see `algorithms/clipping.py`); against the clip range of the run it says everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import Alarm, Finding, Say

RATIO, DEVIATION = "policy/ratio", "policy/ratio_deviation_max"
KLS = {"kl_old": "the sampling policy", "kl_reference": "the reference"}

LEAST_KL = 1e-12
"""Below this a KL is rounding, and its growth is none."""


@dataclass(frozen=True)
class Clip:
    """The range that an algorithm clips its likelihood ratio to, and its unit."""

    range: float
    unit: str

    @classmethod
    def of(cls, algorithm: object) -> Clip | None:
        """That of an algorithm's options; None where it clips nothing."""
        options = getattr(algorithm, "options", None)
        size = getattr(options, "clip_range", None)
        return None if size is None else cls(size, str(getattr(options, "clip_unit", "mean")))


class DriftGuards:
    """ratio_drift, kl_explosion."""

    def __init__(self, options: GuardOptions, say: Say, clip: Clip | None) -> None:
        self._options, self._clip = options, clip
        self.mean = Alarm(
            "ratio_drift", options.ratio_drift, options.ratio_iterations, say, about="mean"
        )
        self.largest = Alarm(
            "ratio_drift", options.ratio_drift, options.ratio_iterations, say, about="largest"
        )
        self.limits = {
            name: Alarm("kl_explosion", options.kl_explosion, 1, say, about=f"{name}_limit")
            for name in KLS
        }
        self.growths = {
            name: Alarm(
                "kl_explosion",
                options.kl_explosion,
                options.kl_iterations,
                say,
                about=f"{name}_growth",
            )
            for name in KLS
        }
        self.alarms = (self.mean, self.largest, *self.limits.values(), *self.growths.values())
        self._before: dict[str, float] = {}
        self._sums: dict[str, float] = {}
        self._updates = 0

    def add(self, numbers: Mapping[str, float]) -> None:
        """What the losses of one update reported."""
        self._updates += 1
        for name in (RATIO, *(f"policy/{kl}" for kl in KLS)):
            if name in numbers:
                self._sums[name] = self._sums.get(name, 0.0) + numbers[name]
        if DEVIATION in numbers:
            self._sums[DEVIATION] = max(self._sums.get(DEVIATION, 0.0), numbers[DEVIATION])

    def forget(self) -> None:
        """Drop what was added since the last `check`: that iteration is not finished."""
        self._sums, self._updates = {}, 0

    def check(self, step: int) -> None:
        """An iteration's updates are all made.

        Raises:
            GuardStop: with advice.
        """
        sums, updates = self._sums, self._updates
        self.forget()
        if not updates:
            return
        if self._clip is not None and RATIO in sums:
            mean = abs(_log(sums[RATIO] / updates)) / self._clip.range
            self._ratio(self.mean, mean, self._options.ratio_mean_limit, "mean ratio", step)
        if self._clip is not None and DEVIATION in sums:
            largest = math.log1p(sums[DEVIATION]) / self._clip.range
            limit = self._options.ratio_max_limit
            self._ratio(self.largest, largest, limit, "ratio of one sample and step", step)
        for name in KLS:
            if f"policy/{name}" in sums:
                self._kl(name, sums[f"policy/{name}"] / updates, step)

    def _ratio(self, alarm: Alarm, found: float, limit: float, what: str, step: int) -> None:
        clip = self._clip
        assert clip is not None
        alarm.check(
            found > limit,
            lambda: Finding(
                f"the {what} of policy to sampling policy is {found:.3g} clip ranges away from 1 "
                f"(limit {limit:g}; clip range {clip.range:g} {clip.unit}): clipping no longer "
                "holds the policy",
                f"step {step}",
                "updates are too large for this clip range, or too many follow on one collection: "
                "lower train.learning_rate,\nuse fewer inner epochs or larger minibatches, or raise"
                " algorithm.clip_range if policy/clip_fraction is near 1 from the start",
            ),
        )

    def _kl(self, name: str, now: float, step: int) -> None:
        o = self._options
        limit = o.kl_old_limit if name == "kl_old" else o.kl_reference_limit
        fix = (
            "lower train.learning_rate or algorithm.clip_range"
            + (", or raise algorithm.kl_weight" if name == "kl_reference" else "")
            + ";\nlook at samples/ whether the pictures are still in order, and go back to an "
            "earlier checkpoint where they are not"
        )
        if limit is not None:
            self.limits[name].check(
                not now <= limit,
                lambda: Finding(
                    f"the KL to {KLS[name]} is {now:.3g}, above guards.{name}_limit {limit:g}",
                    f"step {step}",
                    fix,
                ),
            )
        before = self._before.get(name, math.inf)
        self._before[name] = now
        self.growths[name].check(
            before > LEAST_KL and now >= o.kl_growth * before,
            lambda: Finding(
                f"the KL to {KLS[name]} has multiplied by {o.kl_growth:g} or more in each of "
                f"{self.growths[name].held} iterations and is {now:.3g} now",
                f"step {step}",
                fix,
            ),
        )

    def state_dict(self) -> dict[str, Any]:
        """The KL of the last iteration (between iterations there is nothing else)."""
        return {"before": dict(self._before)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._before = dict(state["before"])
        self.forget()


def _log(ratio: float) -> float:
    """log, where a ratio of 0 or NaN is infinitely far from 1."""
    return math.log(ratio) if ratio > 0 else math.inf
