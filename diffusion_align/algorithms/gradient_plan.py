"""Which part of a sampling chain a reward's gradient goes through: `GradientPlan`. No torch here.

A chain x_T ... x_0 is sampled without gradients. The plan says which of its steps are re-run with
them (*active* steps), what the reward looks at, and how the steps hang together:

    x_next = step(f(alpha x + (1 - alpha) sg(x)), x)      sg = stop gradient, alpha = coupling

An inactive step's network output is a constant; the gradient passes through what the step does to x
itself. Every published method of reward backpropagation is one of these (`gradient_presets.py`).

*Source:* the four choices (reward input, active steps, weights, coupling) are FlowBP's
(arXiv 2606.11075). How we differ: whatever is drawn is drawn once per batch, never per step, and
an index range never leaves the schedule.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from diffusion_align.algorithms.options import window
from diffusion_align.errors import OptionError
from diffusion_align.policy.options import GuidanceGradient
from diffusion_align.ranges import at_least, positive, require, words

if TYPE_CHECKING:
    from numpy.random import Generator

RewardInput = Literal["x_0", "estimate"]
Active = Literal["last", "uniform", "interval", "cut", "all", "chosen"]
Cut = Literal["normal", "uniform"]

COUNTED: tuple[Active, ...] = ("last", "uniform", "interval")
"""Choices of active steps that read `active_steps`."""


@dataclass(frozen=True)
class DrawnSteps:
    """What a plan means for one batch.

    active: indices of the steps that carry a gradient, ascending. last: the last step that is run;
    the reward's input is what it leads to.
    """

    active: tuple[int, ...]
    last: int

    @property
    def first(self) -> int:
        """Where the part of the chain that matters begins."""
        return self.active[0]


@dataclass(frozen=True)
class GradientPlan:
    """Shares count from noise on: 0 is the first step, 1 the end. Windows are [start, end).

    Args:
        reward_input: the final sample, or the data that the last step run predicts.
        active: the last K steps run; K equally spaced ones from a random start; K random ones of a
            window; all from a random truncation on; all; or those of `chosen_steps`.
        active_steps: K.
        chosen_steps: indices, ascending.
        interval_start, interval_end: the window (of `interval`, and of a uniform `cut`).
        cut: how the truncation is drawn.
        cut_mean, cut_std: of a normal one.
        stop_start, stop_end: the last step run is drawn from this window; 1 and 1 is the end.
        coupling: alpha.
        step_weights: factor of each active step's network gradient, in order; None is 1.
        gradient_rescale: rho; the gradient is multiplied by 1 + rho (S / S_active - 1), with S the
            sum over steps of |d x_next / d output| (for a flow's ODE, of |d sigma|).
        lv_copies: n more data estimates from x_0 noised again to the last step's level.
        guidance_gradient: through both guidance branches, or the conditional one alone.
        norm_compensation: with `conditional`, divide by the guidance scale that multiplies it.

    Errors: a value out of range, or values that do not fit, raise `OptionError`.
    """

    reward_input: RewardInput = "x_0"
    active: Active = "last"
    active_steps: int = 1
    chosen_steps: tuple[int, ...] = ()
    interval_start: float = 0.0
    interval_end: float = 1.0
    cut: Cut = "normal"
    cut_mean: float = 0.84
    cut_std: float = 0.1
    stop_start: float = 1.0
    stop_end: float = 1.0
    coupling: float = 1.0
    step_weights: tuple[float, ...] = ()
    gradient_rescale: float = 0.0
    lv_copies: int = 0
    guidance_gradient: GuidanceGradient = "both"
    norm_compensation: bool = False

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "active_steps")
        at_least(self, 0, "lv_copies", "gradient_rescale")
        positive(self, "cut_std")
        shares = ("interval_start", "interval_end", "stop_start", "stop_end", "cut_mean")
        require(self, "lie in [0, 1]", lambda share: 0 <= share <= 1, *shares, "coupling")
        if self.interval_start >= self.interval_end:
            raise OptionError(
                "interval_end",
                f"{self.interval_end:g} leaves no step after interval_start "
                f"{self.interval_start:g}",
                reads=("interval_start",),
            )
        if self.stop_start > self.stop_end:
            raise OptionError(
                "stop_end",
                f"{self.stop_end:g} lies before stop_start {self.stop_start:g}",
                reads=("stop_start",),
            )
        self._check_choices()

    def _check_choices(self) -> None:
        """Refuse what contradicts, or would not be read."""
        if self.stops_early and self.reward_input == "x_0":
            raise OptionError(
                "reward_input",
                "x_0 is never reached by a chain that stops early",
                fix="set reward_input=estimate, or stop_start=1 and stop_end=1",
                reads=("stop_start", "stop_end"),
            )
        if self.lv_copies and self.reward_input != "x_0":
            raise OptionError(
                "lv_copies", "noise x_0 again: reward_input must be x_0", reads=("reward_input",)
            )
        if (self.active == "chosen") != bool(self.chosen_steps):
            what = "names no step" if self.active == "chosen" else "is read with active=chosen only"
            raise OptionError("chosen_steps", what, reads=("active",))
        rising = list(self.chosen_steps) == sorted(set(self.chosen_steps))
        if self.chosen_steps and (self.chosen_steps[0] < 0 or not rising):
            raise OptionError("chosen_steps", "must be indices from 0 on, each larger than before")
        if self.norm_compensation and self.guidance_gradient != "conditional":
            raise OptionError(
                "norm_compensation",
                "divides by the factor of the conditional branch",
                fix="set guidance_gradient=conditional, or leave it out",
                reads=("guidance_gradient",),
            )
        if self.step_weights:
            count = {"chosen": len(self.chosen_steps), **dict.fromkeys(COUNTED, self.active_steps)}
            if len(self.step_weights) != count.get(self.active):
                raise OptionError(
                    "step_weights",
                    f"{len(self.step_weights)} weights for "
                    f"{count.get(self.active, 'an unknown number of')} active steps",
                    reads=("active", "active_steps", "chosen_steps"),
                )

    @property
    def stops_early(self) -> bool:
        """Whether a chain may end before its last step."""
        return self.stop_start < 1

    def reachable(self, steps: int) -> set[int]:
        """Every step that some draw makes active, of a schedule of `steps`."""
        return {step for last in self._stops(steps) for step in self._possible(steps, last)}

    def leaves_gaps(self, steps: int) -> bool:
        """Whether some draw leaves an inactive step behind an active one."""
        if self.active in ("last", "cut", "all"):
            return False
        for last in self._stops(steps):
            possible = self._possible(steps, last)
            # Behind the first active step only a choice of all there are leaves none out.
            chosen = len(possible) if self.active == "chosen" else self.active_steps
            if chosen < len(possible) or possible != set(range(last + 1 - chosen, last + 1)):
                return True
        return False

    def _possible(self, steps: int, last: int) -> set[int]:
        """The steps that a draw may make active where `last` is the last one run."""
        run, count = last + 1, self.active_steps
        if self.active in ("last", "chosen"):
            return set(range(run - count, run) if self.active == "last" else self.chosen_steps)
        inside = set(self._inside(steps, run))
        if self.active == "interval":
            return inside
        if self.active == "cut" and self.cut == "uniform":
            return set(range(min(inside), run))
        # Starts of spaced steps go from 0 to a stride or more: none is left out.
        return set(range(run))

    def _inside(self, steps: int, run: int) -> list[int]:
        """The steps of the window, of those that are run."""
        return [i for i in window(steps, self.interval_start, self.interval_end) if i < run]

    def check(self, steps: int) -> None:
        """Make sure that every draw fits a schedule of `steps`.

        Raises:
            OptionError: more active steps than there are, or a window without a step.
        """
        shortest = min(self._stops(steps)) + 1
        ends = f", of which a chain that stops early may run {shortest}" if self.stops_early else ""
        if self.active in COUNTED and self.active_steps > shortest:
            raise OptionError(
                "active_steps",
                f"{self.active_steps} of {steps} steps cannot carry a gradient{ends}",
                fix=f"set {shortest} or less, or raise sampling.steps",
            )
        if self.chosen_steps and self.chosen_steps[-1] >= shortest:
            raise OptionError(
                "chosen_steps",
                f"step {self.chosen_steps[-1]} is not one of the {steps} steps (0 to "
                f"{steps - 1}){ends}",
            )
        inside = self._inside(steps, shortest)
        wanted = self.active_steps if self.active == "interval" else 1
        reads = self.active == "interval" or (self.active == "cut" and self.cut == "uniform")
        if reads and len(inside) < wanted:
            raise OptionError(
                "interval_start",
                f"the window {self.interval_start:g} to {self.interval_end:g} of {steps} steps has "
                f"{len(inside)}, {wanted} are wanted{ends}",
                fix="widen the window",
            )

    def draw(self, generator: Generator, steps: int) -> DrawnSteps:
        """The active steps of one batch. All draws are made here, once.

        Args:
            generator: of the batch; the same one gives the same steps on every process.
            steps: of the schedule; `check` has passed.
        """
        stops = self._stops(steps)
        last = stops[int(generator.integers(len(stops)))]
        return DrawnSteps(tuple(sorted(self._active(generator, steps, last))), last)

    def _active(self, generator: Generator, steps: int, last: int) -> Iterable[int]:
        run, count = last + 1, self.active_steps
        if self.active == "last":
            return range(run - count, run)
        if self.active == "all":
            return range(run)
        if self.active == "chosen":
            return self.chosen_steps
        inside = self._inside(steps, run)
        if self.active == "uniform":
            stride = run // count
            # The largest start leaves room for all K: an index never passes the end.
            start = int(generator.integers(run - stride * (count - 1)))
            return range(start, start + stride * count, stride)
        if self.active == "interval":
            return [int(i) for i in generator.choice(inside, size=count, replace=False)]
        if self.cut == "uniform":
            first = inside[int(generator.integers(len(inside)))]
        else:
            drawn = round(generator.normal(self.cut_mean * steps, self.cut_std * steps))
            first = min(max(drawn, 0), last)
        return range(first, run)

    def _stops(self, steps: int) -> list[int]:
        """The steps that may be the last one run."""
        return list(window(steps, self.stop_start, self.stop_end)) or [
            max(0, min(steps - 1, round(self.stop_start * steps)))
        ]
