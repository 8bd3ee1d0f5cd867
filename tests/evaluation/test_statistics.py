"""Paired statistics against scipy, formulas by hand, and simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from diffusion_align.evaluation.statistics import (
    headline,
    in_words,
    outcome,
    paired,
    share_interval,
    t_interval,
)

NAN = float("nan")


def rounds(prompts: int, seeds: int) -> list[int]:
    return [p for p in range(prompts) for _ in range(seeds)]


def test_means_and_interval_agree_with_scipy_on_prompt_means() -> None:
    rng = np.random.default_rng(1)
    base, tuned = rng.normal(size=(25, 4)), rng.normal(0.3, 1, size=(25, 4))
    result = paired(base.ravel(), tuned.ravel(), rounds(25, 4))

    test = stats.ttest_1samp((tuned - base).mean(axis=1), 0.0)
    expected = test.confidence_interval(0.95)
    assert result.difference == pytest.approx((tuned - base).mean())
    assert result.ci95 == pytest.approx((expected.low, expected.high))
    assert result.tuned - result.base == pytest.approx(result.difference)
    assert (result.pairs, result.prompts, result.invalid) == (100, 25, 0)


def test_the_interval_is_about_prompts_and_not_about_pictures() -> None:
    # Every picture of a prompt says the same: four copies are no more evidence than one.
    difference = np.random.default_rng(2).normal(0.2, 1, size=30)
    once = paired(np.zeros(30), difference, range(30))
    copied = paired(np.zeros(120), np.repeat(difference, 4), rounds(30, 4))
    assert copied.ci95 == pytest.approx(once.ci95)
    assert copied.win_rate_ci95 == pytest.approx(once.win_rate_ci95)


def test_prompts_weigh_the_same_however_many_pairs_they_have_left() -> None:
    result = paired([0, 0, 0, 0], [1, 1, 1, 5], [0, 0, 0, 1])
    assert result.difference == pytest.approx(3.0)  # (1 + 5) / 2, not (1 + 1 + 1 + 5) / 4


def test_wins_ties_and_losses_count_a_tie_as_half() -> None:
    result = paired([1, 1, 1, 1], [2, 1, 0, 1], [0, 0, 1, 1])
    assert (result.wins, result.ties, result.losses) == (1, 2, 1)
    assert result.win_rate == pytest.approx(0.5)


@pytest.mark.parametrize("bad", [NAN, math.inf, -math.inf])
def test_pairs_with_a_score_that_is_not_finite_are_removed_and_counted(bad: float) -> None:
    clean = paired([1, 2, 3], [2, 2, 5], [0, 1, 2])
    dirty = paired([1, bad, 2, 3, 9], [2, 7, 2, 5, bad], [0, 0, 1, 2, 3])
    assert dirty.invalid == 2
    assert dirty.ci95 == pytest.approx(clean.ci95)
    assert dirty.difference == pytest.approx(clean.difference)
    assert dirty.prompts == 3  # prompt 3 lost its only pair


def test_nothing_valid_gives_nan_and_no_verdict() -> None:
    result = paired([NAN, NAN], [1, 1], [0, 1])
    assert result.pairs == 0
    assert math.isnan(result.difference)
    assert outcome(result) == "no scores"
    assert headline("x", result) == "x: no pair could be scored"


def test_one_prompt_has_a_difference_but_no_interval() -> None:
    result = paired([1, 1], [2, 4], [7, 7])
    assert result.difference == pytest.approx(2.0)
    assert all(math.isnan(bound) for bound in (*result.ci95, *result.win_rate_ci95))
    assert headline("x", result) == "x +2.0; wins 100 % of 2 pairs"


def test_equal_differences_give_an_interval_without_width() -> None:
    # np.std of 30 times 0.1 + 0.2 is 6e-17: rounding is not spread.
    low, high = t_interval(np.full(30, 0.1 + 0.2))
    assert low == high == pytest.approx(0.3)
    same = paired(np.ones(30), np.ones(30), range(30))
    assert same.ci95 == (0.0, 0.0)
    assert outcome(same) == "unchanged"


def test_winning_every_pair_is_not_certainty() -> None:
    result = paired(np.zeros(20), np.ones(20), range(20))
    low, high = result.win_rate_ci95
    quantile = stats.t.ppf(0.975, 19)
    assert low == pytest.approx(20 / (20 + quantile**2))  # Wilson's bound at 100 %
    assert high == 1.0


def test_independent_pairs_give_wilsons_interval_with_a_t_quantile() -> None:
    # One pair per prompt: the effective number of pairs is P - 1 over P of the number of prompts.
    shares = np.array([1.0] * 14 + [0.0] * 6)
    n, p, t = 19.0, 0.7, stats.t.ppf(0.975, 19)
    roots = np.roots([n + t**2, -(2 * n * p + t**2), n * p**2])
    assert share_interval(shares, 20) == pytest.approx((roots.min(), roots.max()))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=2, max_size=40),
)
def test_a_win_rate_interval_lies_in_the_unit_range_around_its_value(wins: list[int]) -> None:
    shares = np.array(wins) / 4
    low, high = share_interval(shares, 4 * len(wins))
    assert 0.0 <= low <= shares.mean() + 1e-12
    assert shares.mean() - 1e-12 <= high <= 1.0
    assert high > low


def test_swapping_the_models_mirrors_everything() -> None:
    rng = np.random.default_rng(3)
    base, tuned, ids = rng.normal(size=60), rng.normal(0.4, 1, size=60), rounds(20, 3)
    there, back = paired(base, tuned, ids), paired(tuned, base, ids)
    assert back.difference == pytest.approx(-there.difference)
    assert back.ci95 == pytest.approx((-there.ci95[1], -there.ci95[0]))
    assert back.win_rate == pytest.approx(1 - there.win_rate)
    expected = (1 - there.win_rate_ci95[1], 1 - there.win_rate_ci95[0])
    assert back.win_rate_ci95 == pytest.approx(expected)


def skewed_differences(rng: np.random.Generator, runs: int) -> tuple[np.ndarray, float]:
    """Prompt means `[runs, 20]` of a reward with a long right tail, and their true mean."""
    level = rng.gamma(1.0, 1.0, (runs, 20, 1))
    base = level + rng.gamma(1.0, 1.0, (runs, 20, 4))
    tuned = level + 0.3 + rng.gamma(1.5, 1.0, (runs, 20, 4))
    return (tuned - base).mean(axis=2), 0.8


def test_the_t_interval_covers_95_percent_where_the_percentile_bootstrap_does_not() -> None:
    rng = np.random.default_rng(4)
    differences, truth = skewed_differences(rng, 4000)

    bounds = np.array([t_interval(run) for run in differences])
    covered = np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
    assert 0.93 <= covered <= 0.97

    draws = rng.integers(0, 20, (300, 20))
    means = np.stack([differences[:, draw].mean(axis=1) for draw in draws])
    low, high = np.quantile(means, [0.025, 0.975], axis=0)
    bootstrap = np.mean((low <= truth) & (truth <= high))
    assert bootstrap < covered - 0.01


@pytest.mark.parametrize(("alpha", "beta"), [(2.0, 2.0), (8.0, 2.0), (0.5, 0.5), (30.0, 1.0)])
def test_the_win_rate_interval_covers_at_least_its_95_percent(alpha: float, beta: float) -> None:
    # The prompts' own win rates differ: beta-binomial, 20 prompts of 4 pairs.
    rng = np.random.default_rng(5)
    shares = rng.binomial(4, rng.beta(alpha, beta, (1500, 20))) / 4
    bounds = np.array([share_interval(run, 80) for run in shares])
    truth = alpha / (alpha + beta)
    covered = np.mean((bounds[:, 0] <= truth) & (truth <= bounds[:, 1]))
    assert 0.93 <= covered <= 0.99


def test_a_verdict_is_withheld_below_twenty_prompts() -> None:
    rng = np.random.default_rng(6)
    gain = rng.normal(1.0, 0.1, 20)
    assert outcome(paired(np.zeros(19), gain[:19], range(19))) == "too few prompts"
    assert "19 prompts" in in_words(paired(np.zeros(19), gain[:19], range(19)))
    assert outcome(paired(np.zeros(20), gain, range(20))) == "better"
    assert outcome(paired(np.zeros(20), -gain, range(20))) == "worse"
    assert outcome(paired(np.zeros(20), gain - 1, range(20))) == "unclear"


def test_the_headline_reads_as_documented() -> None:
    difference = np.tile([0.42 - 0.25, 0.42 + 0.25], 12)
    line = headline("tiny-aesthetic", paired(np.zeros(24), difference, range(24)))
    assert line == "tiny-aesthetic +0.42 [0.31, 0.53]; wins 100 % [85, 100] of 24 pairs"


def test_lengths_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="differ in length: 2, 1, 2"):
        paired([1, 2], [1], [0, 1])
