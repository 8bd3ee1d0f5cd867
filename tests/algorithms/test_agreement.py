"""Agreement against counting by hand and against brute force over every threshold."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_align.algorithms.agreement import (
    PairAgreement,
    calibrate_ties,
    pair_agreement,
    rating_agreement,
)


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def agree(first: list[float], labels: list[float], threshold: float | None = -1.0) -> PairAgreement:
    """Agreement of scores against 0; NaN labels are unlabelled."""
    label = column(labels)
    return pair_agreement(
        column(first),
        torch.zeros_like(label),
        label,
        ~label.isnan(),
        ["overall"],
        tie_thresholds=None if threshold is None else {"overall": threshold},
    )["overall"]


def test_accuracy_counts_decided_pairs_and_equal_scores_as_one_half() -> None:
    #               right right wrong equal  tie  unlabelled
    found = agree([2.0, -1.0, -3.0, 0.0, 5.0, 9.0], [1.0, 0.0, 1.0, 0.0, 0.5, math.nan])
    assert (found.pairs, found.ties, found.unscored) == (5, 1, 0)
    assert found.accuracy == pytest.approx(2.5 / 4)
    # Without a predicted tie the human tie is missed and the equal scores are still one half.
    assert found.accuracy_with_ties == pytest.approx(2.5 / 5)


def test_with_a_threshold_near_scores_predict_a_tie() -> None:
    scores, labels = [2.0, -1.0, -3.0, 0.0, 0.5], [1.0, 0.0, 1.0, 0.0, 0.5]
    found = agree(scores, labels, threshold=1.0)
    # right; missed as a tie; wrong; missed as a tie; tie found
    assert found.accuracy_with_ties == pytest.approx(2 / 5)
    assert found.accuracy == pytest.approx(2.5 / 4)  # which no threshold changes


def test_soft_labels_count_as_expected_agreement_with_one_person() -> None:
    found = agree([1.0, -1.0, 1.0], [0.8, 0.7, 0.1])
    assert found.accuracy == pytest.approx((0.8 + 0.3 + 0.1) / 3)


def test_what_was_not_scored_is_counted_and_takes_no_part() -> None:
    found = agree([math.nan, 1.0, math.inf, math.nan], [1.0, 1.0, 1.0, math.nan])
    assert (found.pairs, found.unscored, found.accuracy) == (1, 2, 1.0)
    nothing = agree([math.nan], [1.0])
    assert nothing.pairs == 0 and math.isnan(nothing.accuracy)
    assert math.isnan(nothing.accuracy_with_ties)


def brute_force(scores: list[float], labels: list[float]) -> float:
    """The best accuracy with ties over every threshold that could make a difference."""

    def accuracy(threshold: float) -> float:
        hits = 0.0
        for d, y in zip(scores, labels):
            if abs(d) <= threshold:
                hits += y == 0.5
            elif y != 0.5:
                hits += y if d > 0 else 1 - y if d < 0 else 0.5
        return hits / len(scores)

    return max(accuracy(t) for t in [-1.0, *(abs(d) for d in scores)])


pairs = st.tuples(st.integers(-4, 4).map(float), st.sampled_from([0.0, 0.5, 1.0]))


@settings(max_examples=200)
@given(st.lists(pairs, min_size=1, max_size=25))
def test_the_calibrated_threshold_is_the_best_there_is(rows: list[tuple[float, float]]) -> None:
    scores, labels = ([*values] for values in zip(*rows))
    found = agree(scores, labels, threshold=None)
    assert found.accuracy_with_ties == pytest.approx(brute_force(scores, labels), abs=1e-12)


def test_calibrated_on_other_data_the_threshold_is_kept() -> None:
    scores, labels = column([0.1, -0.2, 3.0, -2.0]), column([0.5, 0.5, 1.0, 0.0])
    everything = torch.ones_like(labels, dtype=torch.bool)
    zeros = torch.zeros_like(scores)
    thresholds = calibrate_ties(scores, zeros, labels, everything, ["overall"])
    assert thresholds == {"overall": pytest.approx(0.2)}
    assert agree([0.15, 0.3], [0.5, 0.5], thresholds["overall"]).accuracy_with_ties == 0.5
    # Where people never call a tie, predicting one is never right.
    never = calibrate_ties(scores, zeros, column([1.0, 0.0, 1.0, 0.0]), everything, ["overall"])
    assert never == {"overall": -1.0}


def test_attributes_are_judged_apart() -> None:
    first, second = torch.tensor([[1.0, 1.0], [1.0, 1.0]]), torch.zeros(2, 2)
    labels = torch.tensor([[1.0, 0.0], [math.nan, 0.0]])
    found = pair_agreement(first, second, labels, ~labels.isnan(), ["vq", "ta"])
    assert (found["vq"].pairs, found["vq"].accuracy) == (1, 1.0)
    assert (found["ta"].pairs, found["ta"].accuracy) == (2, 0.0)
    with pytest.raises(ValueError, match=r"\[N, 1\]"):
        pair_agreement(first, second, labels, ~labels.isnan(), ["vq"])


def ranks(values: np.ndarray) -> np.ndarray:
    """Average ranks, by counting."""
    return np.array([(values < v).sum() + ((values == v).sum() + 1) / 2 for v in values])


def test_ratings_are_compared_by_correlation_and_error() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=60).round(1)
    y = (x + rng.normal(size=60)).round(1)
    labels = torch.from_numpy(y)[:, None].clone()
    labels[5] = math.nan
    scores = torch.from_numpy(x)[:, None].clone()
    scores[9] = math.nan
    found = rating_agreement(scores, labels, ~labels.isnan(), ["overall"])["overall"]
    keep = [i for i in range(60) if i not in (5, 9)]
    x, y = x[keep], y[keep]
    assert (found.items, found.unscored) == (58, 1)
    assert found.pearson == pytest.approx(np.corrcoef(x, y)[0, 1])
    assert found.spearman == pytest.approx(np.corrcoef(ranks(x), ranks(y))[0, 1])
    assert found.rmse == pytest.approx(np.sqrt(((x - y) ** 2).mean()))


def test_a_constant_score_has_no_correlation() -> None:
    labels, everything = column([1.0, 2.0, 3.0]), torch.ones(3, 1, dtype=torch.bool)
    found = rating_agreement(column([2.0, 2.0, 2.0]), labels, everything, ["overall"])["overall"]
    assert math.isnan(found.pearson) and math.isnan(found.spearman)
    assert found.rmse == pytest.approx(math.sqrt(2 / 3))
    none = rating_agreement(column([1.0]), column([1.0]), ~everything[:1], ["overall"])["overall"]
    assert none.items == 0 and math.isnan(none.rmse)
