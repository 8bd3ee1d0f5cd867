"""Paired statistics of a before/after comparison.

Base and tuned model draw the same prompts from the same noise, so scores come in pairs. Pictures
of one prompt resemble each other: the independent unit is the *prompt*, and every interval here is
computed on prompt means. With P prompts, d_p the mean difference of prompt p:

    difference = mean(d_p)        ci95 = difference +- t(0.975, P - 1) * sd(d_p) / sqrt(P)

The t interval is used because the percentile bootstrap is too narrow with few prompts: about 93 %
instead of 95 % at 20 (`tests/evaluation/test_statistics.py` measures both).

The win rate counts a tie as half. Its interval is Wilson's with the effective number of pairs
n_eff = p (1 - p) / se^2 taken from the spread between prompts and a t quantile (Korn and Graubard
1998; Franco et al. 2019): inside [0, 1] by construction and of honest width at 0 and 100 %, where
a t interval would have no width at all.

Pairs with a score that is not finite could not be scored; they are removed and counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

MIN_PROMPTS = 20
CONFIDENCE = 0.95

Interval = tuple[float, float]
Outcome = Literal["better", "worse", "unclear", "unchanged", "too few prompts", "no scores"]

Floats = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class Paired:
    """The paired comparison of one reward; all means are means of prompt means.

    Numbers that do not exist are NaN: everything without a valid pair, intervals with one prompt.

    Attributes:
        base, tuned: mean reward before and after; `difference` is `tuned - base`.
        ci95: 95 % interval of the difference.
        win_rate: share of pairs the tuned picture wins, a tie counting half, in [0, 1].
        win_rate_ci95: its 95 % interval, inside [0, 1].
        wins, ties, losses: counts of pairs, from the tuned model's side.
        pairs, prompts: what was used; `invalid` pairs were removed (a score was not finite).
        base_sd: standard deviation of single base scores, the unit of `effect`.
    """

    base: float
    tuned: float
    difference: float
    ci95: Interval
    win_rate: float
    win_rate_ci95: Interval
    wins: int
    ties: int
    losses: int
    pairs: int
    prompts: int
    invalid: int
    base_sd: float

    @property
    def effect(self) -> float:
        """The difference in standard deviations of base scores (NaN where those do not vary)."""
        return self.difference / self.base_sd if self.base_sd > 0 else math.nan

    @property
    def rose(self) -> bool:
        """The interval lies above zero."""
        return self.ci95[0] > 0

    @property
    def fell(self) -> bool:
        """The interval lies below zero."""
        return self.ci95[1] < 0


def paired(
    base: Sequence[float] | Floats, tuned: Sequence[float] | Floats, prompt_ids: Sequence[int]
) -> Paired:
    """Compare two models on the same pictures-to-be.

    Args:
        base, tuned: `[N]` scores; entry i of both has the same prompt and the same noise.
        prompt_ids: `[N]` which prompt each pair belongs to.

    Raises:
        ValueError: lengths that differ.

    >>> paired([1.0, 1.0, 2.0, 2.0], [2.0, 2.0, 2.0, 4.0], [0, 0, 1, 1]).difference
    1.0
    """
    before = np.asarray(base, dtype=np.float64).reshape(-1)
    after = np.asarray(tuned, dtype=np.float64).reshape(-1)
    ids = np.asarray(prompt_ids).reshape(-1)
    if not len(before) == len(after) == len(ids):
        raise ValueError(
            f"base, tuned and prompt_ids differ in length: {len(before)}, {len(after)}, {len(ids)}"
        )
    valid = np.isfinite(before) & np.isfinite(after)
    before, after, ids = before[valid], after[valid], ids[valid]
    won = (after > before) + 0.5 * (after == before)
    base_means, difference_means, win_means = (
        prompt_means(values, ids) for values in (before, after - before, won)
    )
    average = _mean(base_means)
    difference = _mean(difference_means)
    return Paired(
        base=average,
        tuned=average + difference,
        difference=difference,
        ci95=t_interval(difference_means),
        win_rate=_mean(win_means),
        win_rate_ci95=share_interval(win_means, pairs=len(won)),
        wins=int((after > before).sum()),
        ties=int((after == before).sum()),
        losses=int((after < before).sum()),
        pairs=len(before),
        prompts=len(base_means),
        invalid=int((~valid).sum()),
        base_sd=float(before.std(ddof=1)) if len(before) > 1 else math.nan,
    )


def prompt_means(values: Floats, ids: np.ndarray[Any, Any]) -> Floats:
    """The mean of `values` for each distinct id, in ascending order of the ids."""
    _, index = np.unique(ids, return_inverse=True)
    counts = np.bincount(index)
    return np.bincount(index, weights=values) / np.maximum(counts, 1)


def t_interval(values: Floats, confidence: float = CONFIDENCE) -> Interval:
    """Student's interval for the mean of independent `values`; NaN with fewer than two.

    Equal values have no spread and give an interval of no width, which is what they show.
    """
    if len(values) < 2:
        return (math.nan, math.nan)
    center = _mean(values)
    spread = float(np.std(values, ddof=1)) / math.sqrt(len(values))
    # Rounding leaves 1e-17 where all values are equal; that is no spread.
    if np.ptp(values) == 0:
        spread = 0.0
    reach = float(stats.t.ppf(0.5 + confidence / 2, len(values) - 1)) * spread
    return (center - reach, center + reach)


def share_interval(shares: Floats, pairs: int, confidence: float = CONFIDENCE) -> Interval:
    """Interval in [0, 1] for a share measured as the mean of one share per prompt.

    Args:
        shares: `[P]` each prompt's own share in [0, 1].
        pairs: how many pairs stand behind them, the most the effective number can be.
    """
    prompts = len(shares)
    if prompts < 2:
        return (math.nan, math.nan)
    p = min(max(_mean(shares), 0.0), 1.0)
    variance = float(np.var(shares, ddof=1)) / prompts
    binomial = p * (1.0 - p)
    if binomial <= 0.0:
        # Nothing varied: the pairs of a prompt may be one observation repeated.
        effective = float(prompts)
    else:
        effective = min(binomial / variance, float(pairs)) if variance > 0 else float(pairs)
    quantile = float(stats.t.ppf(0.5 + confidence / 2, prompts - 1))
    shrink = quantile**2 / effective
    center = (p + shrink / 2) / (1 + shrink)
    reach = quantile / (1 + shrink) * math.sqrt(binomial / effective + shrink / (4 * effective))
    return (max(0.0, min(center - reach, p)), min(1.0, max(center + reach, p)))


def outcome(result: Paired) -> Outcome:
    """The verdict on one reward; withheld below 20 prompts, where luck looks like an effect."""
    if result.pairs == 0:
        return "no scores"
    if result.prompts < MIN_PROMPTS:
        return "too few prompts"
    if result.rose:
        return "better"
    if result.fell:
        return "worse"
    return "unchanged" if result.wins == result.losses == 0 else "unclear"


def in_words(result: Paired) -> str:
    """The verdict as a sentence that says no more than the numbers do."""
    sentences: dict[Outcome, str] = {
        "better": "Better: the whole 95 % interval lies above zero.",
        "worse": "Worse: the whole 95 % interval lies below zero.",
        "unclear": "No clear difference: the 95 % interval contains zero.",
        "unchanged": "Unchanged: every pair scores the same.",
        "too few prompts": (
            f"No verdict: {result.prompts} prompt{'s' * (result.prompts != 1)} cannot carry one; "
            f"use {MIN_PROMPTS} or more."
        ),
        "no scores": "No verdict: no pair could be scored.",
    }
    return sentences[outcome(result)]


def headline(name: str, result: Paired) -> str:
    """The result in one line.

    `tiny-aesthetic +0.42 [0.31, 0.53]; wins 71 % [64, 77] of 512 pairs`
    """
    if result.pairs == 0:
        return f"{name}: no pair could be scored"
    win_low, win_high = (100 * bound for bound in result.win_rate_ci95)
    share = f" [{win_low:.0f}, {win_high:.0f}]" if math.isfinite(win_low) else ""
    return (
        f"{name} {difference_text(result)}; "
        f"wins {100 * result.win_rate:.0f} %{share} of {result.pairs} pairs"
    )


def difference_text(result: Paired) -> str:
    """The difference with its interval, `+0.42 [0.31, 0.53]`; `-` where no pair was scored."""
    if result.pairs == 0:
        return "-"
    digits = decimals(result)
    low, high = result.ci95
    interval = f" [{_number(low, digits)}, {_number(high, digits)}]" if math.isfinite(low) else ""
    return f"{_number(result.difference, digits, sign=True)}{interval}"


def decimals(result: Paired) -> int:
    """Decimals that show two figures of the interval's half width, or of the value without one."""
    low, high = result.ci95
    scale = (high - low) / 2 if math.isfinite(low) and high > low else abs(result.difference)
    if not math.isfinite(scale) or scale == 0:
        return 2
    return min(8, max(0, 1 - math.floor(math.log10(scale))))


def _number(value: float, digits: int, *, sign: bool = False) -> str:
    text = f"{value:{'+' if sign else ''}.{digits}f}"
    # "-0.00" says a direction that the figures do not.
    return text.replace("-", "", 1) if float(text) == 0 else text


def _mean(values: Floats) -> float:
    return float(np.mean(values)) if len(values) else math.nan
