"""The two small charts of the report as plain numbers; the template draws them as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from diffusion_align.evaluation.comparison import Result
from diffusion_align.evaluation.statistics import Outcome, outcome

Direction = Literal["down", "even", "up"]

SIDES: Mapping[Outcome, Direction] = {"better": "up", "worse": "down"}
BINS = 25  # odd: the middle bin holds "no difference" and belongs to neither side


@dataclass(frozen=True)
class Bar:
    """One bar: position and size in percent of the chart, and what it counts."""

    x: float
    width: float
    height: float
    side: Direction
    count: int


@dataclass(frozen=True)
class Histogram:
    """Paired differences of one reward, symmetric around zero.

    Attributes:
        bars: left to right; bars with nothing in them are left out.
        mean: where the mean difference lies, in percent of the width.
        reach: the difference at the right edge; the left edge is `-reach`.
        outside: pairs beyond the edges, counted in the outermost bars.
    """

    bars: tuple[Bar, ...]
    mean: float
    reach: float
    outside: int


def histogram(result: Result) -> Histogram | None:
    """The histogram of one result; None where no pair was scored or no score changed."""
    differences = (result.tuned - result.base).reshape(-1)
    differences = differences[np.isfinite(differences)]
    if not len(differences) or not np.any(differences):
        return None
    # One wild pair must not flatten all the others: the edges keep 99 % of them.
    size = np.abs(differences)
    reach = float(np.quantile(size, 0.99)) or float(size.max())
    counts, _ = np.histogram(differences.clip(-reach, reach), bins=BINS, range=(-reach, reach))
    step, tallest, middle = 100 / BINS, int(counts.max()), BINS // 2
    bars = tuple(
        Bar(
            x=step * index,
            width=step,
            height=100 * int(count) / tallest,
            side="even" if index == middle else "down" if index < middle else "up",
            count=int(count),
        )
        for index, count in enumerate(counts)
        if count
    )
    mean = 50 + 50 * max(-1.0, min(1.0, result.paired.difference / reach))
    return Histogram(bars, mean, reach, int((size > reach).sum()))


@dataclass(frozen=True)
class IntervalMark:
    """A difference and its interval on the shared axis, in percent of the width."""

    low: float
    point: float
    high: float
    side: Direction


@dataclass(frozen=True)
class IntervalPlot:
    """All rewards on one axis: differences in standard deviations of the base scores.

    Attributes:
        marks: one per result, None where there is no interval or no spread to measure it in.
        reach: the axis runs from `-reach` to `reach` standard deviations.
    """

    marks: tuple[IntervalMark | None, ...]
    reach: float


def interval_plot(results: Sequence[Result]) -> IntervalPlot:
    """Place every result's interval on one symmetric axis."""
    scaled = [_scaled(result) for result in results]
    ends = [abs(bound) for bounds in scaled if bounds for bound in (bounds[0], bounds[2])]
    reach = _round_up(max(ends, default=1.0))
    marks = tuple(
        None if bounds is None else _mark(bounds, reach, outcome(result.paired))
        for bounds, result in zip(scaled, results, strict=True)
    )
    return IntervalPlot(marks, reach)


def _scaled(result: Result) -> tuple[float, float, float] | None:
    numbers = result.paired
    low, high = numbers.ci95
    if not (math.isfinite(low) and numbers.base_sd > 0):
        return None
    sd = numbers.base_sd
    return (low / sd, numbers.difference / sd, high / sd)


def _mark(bounds: tuple[float, float, float], reach: float, verdict: Outcome) -> IntervalMark:
    # The ends of the axis keep 2 % clear, so that a mark there is not cut.
    low, point, high = (50 + 48 * bound / reach for bound in bounds)
    return IntervalMark(low, point, high, SIDES.get(verdict, "even"))


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next((m * power for m in (1, 2, 5) if m * power >= value), 10 * power)
