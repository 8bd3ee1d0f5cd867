"""How well scores agree with what people said: accuracy on pairs, correlation with ratings.

Pure functions of tensors, computed in float64. An item whose score is NaN or infinite was not
scored: it takes no part in any figure and is counted as `unscored`, so that nobody mistakes a
smaller set for a better model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats
from torch import Tensor

TIE = 0.5


@dataclass(frozen=True)
class PairAgreement:
    """Agreement on one attribute; a figure without pairs behind it is NaN.

    Attributes:
        pairs: labelled pairs that were scored; unscored: labelled pairs that were not.
        ties: those of `pairs` whose label is 0.5.
        accuracy: without ties: how often the higher score is the preferred picture. Equal scores
            count one half, and a soft label p counts p or 1 - p: the expected agreement with one
            person. So 0.5 is chance, and soft labels cannot reach 1.
        accuracy_with_ties: first, tie or second, where scores at most `tie_threshold` apart
            predict a tie.
        tie_threshold: a negative one never predicts a tie.
    """

    pairs: int
    unscored: int
    ties: int
    accuracy: float
    accuracy_with_ties: float
    tie_threshold: float


@dataclass(frozen=True)
class RatingAgreement:
    """Agreement on one attribute: correlations (NaN where one side is constant) and error."""

    items: int
    unscored: int
    pearson: float
    spearman: float
    rmse: float


def pair_agreement(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    mask: Tensor,
    attributes: Sequence[str],
    *,
    tie_thresholds: Mapping[str, float] | None = None,
) -> dict[str, PairAgreement]:
    """Agreement of scores with preferences, by attribute.

    Args:
        first, second: scores [N, A] of the two pictures, any float dtype.
        labels: [N, A] probability in [0, 1] that the first is preferred, 0.5 a tie.
        mask: bool [N, A], which entries are labelled.
        attributes: A names.
        tie_thresholds: by attribute, from `calibrate_ties` on other data. None calibrates on these
            very pairs, as VideoAlign's `calc_accuracy` does; that flatters accuracy with ties.
    """
    _check(attributes, first, second, labels, mask)
    result = {}
    for column, name in enumerate(attributes):
        difference, label, unscored = _scored_pairs(first, second, labels, mask, column)
        threshold = (
            _best_threshold(difference, label) if tie_thresholds is None else tie_thresholds[name]
        )
        decided = label != TIE
        result[name] = PairAgreement(
            pairs=len(label),
            unscored=unscored,
            ties=int((~decided).sum()),
            accuracy=_mean(_credit(difference, label)[decided]),
            accuracy_with_ties=_mean(_credit_with_ties(difference, label, threshold)),
            tie_threshold=threshold,
        )
    return result


def calibrate_ties(
    first: Tensor, second: Tensor, labels: Tensor, mask: Tensor, attributes: Sequence[str]
) -> dict[str, float]:
    """For each attribute the distance of scores up to which predicting a tie is best.

    The threshold with the best accuracy with ties on the given pairs, the lowest among equals; -1
    where it is best never to predict a tie. Arguments as in `pair_agreement`.

    *Source:* Deutsch, Foster and Freitag 2023 (arXiv 2305.14324). VideoAlign's code stops between
    pairs that are equally far apart and never tries to predict no tie at all.
    """
    _check(attributes, first, second, labels, mask)
    return {
        name: _best_threshold(*_scored_pairs(first, second, labels, mask, column)[:2])
        for column, name in enumerate(attributes)
    }


def rating_agreement(
    scores: Tensor, ratings: Tensor, mask: Tensor, attributes: Sequence[str]
) -> dict[str, RatingAgreement]:
    """Agreement of scores [N, A] with ratings [N, A] where mask [N, A] is on, by attribute."""
    _check(attributes, scores, ratings, mask)
    result = {}
    for column, name in enumerate(attributes):
        score, rating, labelled = (_column(t, column) for t in (scores, ratings, mask))
        keep = (labelled == 1) & np.isfinite(score)
        x, y = score[keep], rating[keep]
        # A constant has no correlation: scipy would warn and say NaN.
        varies = len(x) > 1 and np.ptp(x) > 0 and np.ptp(y) > 0
        result[name] = RatingAgreement(
            items=len(x),
            unscored=int((labelled == 1).sum()) - len(x),
            pearson=float(stats.pearsonr(x, y).statistic) if varies else math.nan,
            spearman=float(stats.spearmanr(x, y).statistic) if varies else math.nan,
            rmse=math.sqrt(_mean((x - y) ** 2)) if len(x) else math.nan,
        )
    return result


def _credit(difference: np.ndarray, label: np.ndarray) -> np.ndarray:
    """Expected agreement [n] of a choice by the sign of the difference with one person's."""
    return np.where(difference > 0, label, np.where(difference < 0, 1 - label, 0.5))


def _credit_with_ties(difference: np.ndarray, label: np.ndarray, threshold: float) -> np.ndarray:
    """The same of a choice between first, tie and second."""
    predicts_tie, is_tie = np.abs(difference) <= threshold, label == TIE
    return np.where(predicts_tie | is_tie, predicts_tie & is_tie, _credit(difference, label))


def _best_threshold(difference: np.ndarray, label: np.ndarray) -> float:
    distance = np.abs(difference)
    order = np.argsort(distance, kind="stable")
    distance = distance[order]
    is_tie = (label == TIE)[order]
    credit = np.where(is_tie, 0.0, _credit(difference, label)[order])
    # Raising the threshold over one pair gains it if it is a tie and loses its credit if not.
    gain = np.concatenate([[0.0], np.cumsum(is_tie - credit)])
    # Pairs equally far apart fall together: only the last of them is a place to stop.
    stops = np.concatenate(
        [[True], np.append(distance[1:] != distance[:-1], True)[: len(distance)]]
    )
    candidates = np.flatnonzero(stops)
    best = candidates[np.argmax(gain[candidates])]
    return -1.0 if best == 0 else float(distance[best - 1])


def _scored_pairs(
    first: Tensor, second: Tensor, labels: Tensor, mask: Tensor, column: int
) -> tuple[np.ndarray, np.ndarray, int]:
    """Differences [n] and labels [n] of scored, labelled pairs, and how many were not scored."""
    a, b, label, labelled = (_column(t, column) for t in (first, second, labels, mask))
    keep = (labelled == 1) & np.isfinite(a) & np.isfinite(b)
    difference = np.where(keep, a, 0.0) - np.where(keep, b, 0.0)
    return difference[keep], label[keep], int((labelled == 1).sum() - keep.sum())


def _column(values: Tensor, column: int) -> np.ndarray:
    return values[:, column].detach().double().cpu().numpy()


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else math.nan


def _check(attributes: Sequence[str], *tensors: Tensor) -> None:
    shape = (len(tensors[0]), len(attributes))
    if any(tuple(tensor.shape) != shape for tensor in tensors):
        raise ValueError(
            f"scores, labels and mask are all [N, {len(attributes)}] for {list(attributes)}; "
            f"these are {[tuple(tensor.shape) for tensor in tensors]}"
        )
