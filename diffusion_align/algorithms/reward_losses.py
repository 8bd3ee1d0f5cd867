"""What a reward model learns from: losses of preferences and ratings over named attributes.

Pure functions. Those of pairs share one signature,

    loss(first [N, A], second [N, A], labels [N, A], mask [N, A], weights [N]) -> Tensor, 0-d

with the scores of both pictures for A attributes and the probability in [0, 1] that the first is
preferred; that of ratings takes `scores` and `ratings` in their place. Every loss is a weighted
mean over the entries it uses: an unlabelled one is in neither numerator nor denominator and its
gradient is exactly 0, whatever its score and label hold (NaN too). Where nothing is used the loss
is 0. (VideoAlign leaves unlabelled entries in the denominator, so that sparse attributes learn
less.) Computed in float32; float64 scores stay float64. A NaN score of a labelled entry makes the
loss NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from diffusion_align.algorithms.losses import at_least_float32, logistic_preference_loss
from diffusion_align.errors import UserError

TIE = 0.5
# The constant of Bradley-Terry with ties in VideoAlign: at equal scores two in three are ties.
TIE_CONSTANT = 5.0


def bradley_terry_loss(
    first: Tensor, second: Tensor, labels: Tensor, mask: Tensor, weights: Tensor
) -> Tensor:
    """-log sigmoid(preferred - other); ties (0.5) are dropped like unlabelled entries.

    *Source:* Bradley and Terry 1952; for rewards of images ImageReward (Xu et al. 2023, arXiv
    2304.05977), which drops ties too and averages over all pairs of a ranking.

    Raises:
        UserError: a soft label other than a tie: use `soft-label`.
    """
    _check_pairs(first, second, labels, mask, weights)
    _refuse_soft(labels, mask, "bradley-terry")
    used = mask & (labels != TIE)
    margin, target = _masked(first, used) - _masked(second, used), _masked(labels, used)
    return _mean(logistic_preference_loss(margin, target), used, weights)


def bradley_terry_ties_loss(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    k: float = TIE_CONSTANT,
) -> Tensor:
    """-log P of the label under Bradley-Terry with ties, where d = first - second:

        P(first)  = sigmoid(d - ln k)
        P(second) = sigmoid(-d - ln k)
        P(tie)    = (k^2 - 1) sigmoid(d - ln k) sigmoid(-d - ln k)

    They sum to 1; a larger k > 1 makes ties likelier ((k - 1) / (k + 1) at d = 0). Computed as
    logarithms, so no difference of scores is too large.

    *Source:* Rao and Kupper 1967; VideoReward (Liu et al. 2025, arXiv 2501.13918), whose code fixes
    k = 5 and keeps unlabelled entries in the mean's denominator; here they are in neither.

    Raises:
        UserError: a soft label other than a tie. ValueError: k is not above 1.
    """
    _check_pairs(first, second, labels, mask, weights)
    _refuse_soft(labels, mask, "bradley-terry-ties")
    target = _masked(labels, mask)
    log_first, log_tie, log_second = tie_log_probabilities(
        _masked(first, mask) - _masked(second, mask), k
    )
    chosen = torch.where(target == 1, log_first, torch.where(target == 0, log_second, log_tie))
    return _mean(-chosen, mask, weights)


def tie_log_probabilities(margin: Tensor, k: float = TIE_CONSTANT) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities [...] that the first is preferred, of a tie, that the second is preferred.

    Args:
        margin: [...] score of the first less that of the second; k: above 1.
    """
    if not (math.isfinite(k) and k > 1):
        raise ValueError(f"k is {k}; it must be above 1 (at 1 there are no ties)")
    margin = at_least_float32(margin)
    log_first = F.logsigmoid(margin - math.log(k))
    log_second = F.logsigmoid(-margin - math.log(k))
    return log_first, math.log(k * k - 1) + log_first + log_second, log_second


def soft_label_loss(
    first: Tensor,
    second: Tensor,
    labels: Tensor,
    mask: Tensor,
    weights: Tensor,
    *,
    scale: Tensor | float = 1.0,
    less_entropy: bool = True,
) -> Tensor:
    """Cross-entropy between a label and softmax(scale * (first, second)): ties count as 0.5.

    Args:
        scale: what the scores are multiplied by; for cosines of CLIP towers exp(logit_scale), for
            scores that carry it already 1. A 0-d tensor with a graph learns too.
        less_entropy: subtract the label's entropy (a constant: the gradient is the same), so that
            the optimum is 0 for soft labels and ties as well. PickScore does it for ties.

    *Source:* PickScore (Kirstain et al. 2023, arXiv 2305.01569), whose weights are 1 / examples of
    the prompt: give them as `weights`. HPS v2 (Wu et al. 2023, arXiv 2306.09341) trains on the same
    cross-entropy, summed.
    """
    _check_pairs(first, second, labels, mask, weights)
    margin = scale * (_masked(first, mask) - _masked(second, mask))
    target = _masked(labels, mask)
    loss = logistic_preference_loss(margin, target)
    if less_entropy:
        loss = loss + torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)
    return _mean(loss, mask, weights)


def regression_loss(scores: Tensor, ratings: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """(score - rating)^2 on the raw scale of the ratings.

    *Source:* the LAION aesthetic predictors (mean ratings of 1 to 10).
    """
    _check_shapes(scores, (ratings, mask), weights)
    return _mean((_masked(scores, mask) - _masked(ratings, mask)) ** 2, mask, weights)


@dataclass(frozen=True)
class RewardLoss:
    """A loss by name: its function, the judgements it learns from, what it makes of a tie."""

    function: Callable[..., Tensor]
    kind: Literal["pairs", "ratings"]
    ties: Literal["dropped", "modelled", "half", "none"]
    summary: str

    def used(self, labels: Tensor, mask: Tensor) -> Tensor:
        """bool [N, A]: the labelled entries that the loss learns from."""
        return mask & (labels != TIE) if self.ties == "dropped" else mask


REWARD_LOSSES: Mapping[str, RewardLoss] = {
    "bradley-terry": RewardLoss(
        bradley_terry_loss, "pairs", "dropped", "log-odds of the preferred picture; drops ties"
    ),
    "bradley-terry-ties": RewardLoss(
        bradley_terry_ties_loss, "pairs", "modelled", "the same with a probability of a tie"
    ),
    "soft-label": RewardLoss(
        soft_label_loss, "pairs", "half", "cross-entropy with a share of votes; a tie is one half"
    ),
    "regression": RewardLoss(
        regression_loss, "ratings", "none", "squared error of ratings on their own scale"
    ),
}


def _masked(values: Tensor, mask: Tensor) -> Tensor:
    """The values in at least float32, 0 where the mask is off; no gradient passes there.

    Before any arithmetic: 0 x NaN is NaN, in the gradient too.
    """
    return at_least_float32(torch.where(mask, values, torch.zeros_like(values)))


def _mean(values: Tensor, mask: Tensor, weights: Tensor) -> Tensor:
    """Mean of values [N, A] over the mask, row n counting weights[n]; 0 where it is empty."""
    share = mask * weights.detach().to(values)[:, None]
    total = share.sum()
    return (values * share).sum() / torch.where(total > 0, total, torch.ones_like(total))


def _refuse_soft(labels: Tensor, mask: Tensor, name: str) -> None:
    soft = mask & (labels != 0) & (labels != 1) & (labels != TIE)
    if soft.any():
        raise UserError(
            f"loss {name} takes the labels 1, 0 and 0.5 (a tie); one is {labels[soft][0].item():g}",
            fix="train with the loss soft-label, which learns from shares of votes",
        )


def _check_pairs(
    first: Tensor, second: Tensor, labels: Tensor, mask: Tensor, weights: Tensor
) -> None:
    _check_shapes(first, (second, labels, mask), weights)


def _check_shapes(scores: Tensor, others: tuple[Tensor, ...], weights: Tensor) -> None:
    shape = scores.shape
    if len(shape) != 2 or any(other.shape != shape for other in others):
        raise ValueError(
            "scores, labels and mask are all [N, A]; these are "
            f"{[tuple(tensor.shape) for tensor in (scores, *others)]}"
        )
    if weights.shape != shape[:1]:
        raise ValueError(f"weights are [N] = [{shape[0]}]; these are {list(weights.shape)}")
