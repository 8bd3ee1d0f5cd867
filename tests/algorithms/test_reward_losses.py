"""Losses of reward training against enumeration in plain Python, and what a mask must mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from diffusion_align.algorithms.reward_losses import (
    REWARD_LOSSES,
    bradley_terry_loss,
    bradley_terry_ties_loss,
    regression_loss,
    soft_label_loss,
    tie_log_probabilities,
)
from diffusion_align.errors import UserError

PAIR_LOSSES = {name: loss.function for name, loss in REWARD_LOSSES.items() if loss.kind == "pairs"}
N, A = 7, 3


def batch(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    """Scores of both, hard labels with ties, a mask with gaps, weights."""
    rng = torch.Generator().manual_seed(seed)
    first, second = torch.randn(2, N, A, generator=rng, dtype=dtype) * 2
    labels = torch.tensor([0.0, 0.5, 1.0], dtype=dtype)[torch.randint(3, (N, A), generator=rng)]
    mask = torch.rand(N, A, generator=rng) < 0.7
    return first, second, labels, mask, torch.rand(N, generator=rng, dtype=dtype) + 0.5


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def one_bradley_terry(a: float, b: float, y: float) -> float | None:
    return None if y == 0.5 else -math.log(sigmoid(a - b if y else b - a))


def one_with_ties(a: float, b: float, y: float, k: float = 5.0) -> float | None:
    wins = {1.0: sigmoid(a - b - math.log(k)), 0.0: sigmoid(b - a - math.log(k))}
    # The tie is what is left of 1, which does not use the formula of the loss.
    return -math.log(wins.get(y, 1 - sum(wins.values())))


def one_soft(a: float, b: float, y: float) -> float | None:
    # Kullback-Leibler divergence of the label from the softmax of the two.
    p = math.exp(a) / (math.exp(a) + math.exp(b))
    return sum(t * math.log(t / q) for t, q in ((y, p), (1 - y, 1 - p)) if t > 0)


ORACLES: dict[str, Callable[[float, float, float], float | None]] = {
    "bradley-terry": one_bradley_terry,
    "bradley-terry-ties": one_with_ties,
    "soft-label": one_soft,
}


def enumerated(name: str, values: tuple[Tensor, ...]) -> float:
    first, second, labels, mask, weights = values
    total = count = 0.0
    for n, a in product(range(N), range(A)):
        if not mask[n, a]:
            continue
        cost = ORACLES[name](*(float(t[n, a]) for t in (first, second, labels)))
        if cost is not None:
            total, count = total + float(weights[n]) * cost, count + float(weights[n])
    return total / count


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_loss_of_pairs_is_the_weighted_mean_of_its_labelled_entries(name: str, seed: int) -> None:
    values = batch(seed)
    loss = PAIR_LOSSES[name](*values)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(enumerated(name, values), rel=1e-12)
    single = PAIR_LOSSES[name](*(t.float() if t.is_floating_point() else t for t in values))
    assert single.dtype == torch.float32 and single.item() == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_gradients_are_those_of_finite_differences(name: str) -> None:
    first, second, *rest = (values[:3] for values in batch(11))
    inputs = (first.requires_grad_(), second.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: PAIR_LOSSES[name](a, b, *rest), inputs)


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_masked_entry_has_no_gradient_and_no_say_whatever_it_holds(name: str) -> None:
    first, second, labels, mask, weights = batch(12, torch.float32)
    plain = PAIR_LOSSES[name](first, second, labels, mask, weights)
    for junk in (math.nan, math.inf, -1e30):
        spoiled = [torch.where(mask, t, torch.tensor(junk)) for t in (first, second, labels)]
        a, b = spoiled[0].requires_grad_(), spoiled[1].requires_grad_()
        loss = PAIR_LOSSES[name](a, b, spoiled[2], mask, weights)
        assert loss.item() == plain.item()
        for gradient in torch.autograd.grad(loss, (a, b)):
            assert (gradient[~mask] == 0).all()
            assert gradient.isfinite().all() and gradient[mask].abs().sum() > 0


@pytest.mark.parametrize("name", PAIR_LOSSES)
@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_far_apart_scores_stay_finite(name: str, gap: float) -> None:
    first = torch.tensor([[gap], [gap], [gap]], requires_grad=True)
    labels = torch.tensor([[1.0], [0.0], [0.5]])
    loss = PAIR_LOSSES[name](
        first, torch.zeros(3, 1), labels, torch.ones(3, 1, dtype=torch.bool), torch.ones(3)
    )
    (gradient,) = torch.autograd.grad(loss, first)
    assert loss.isfinite() and gradient.isfinite().all()
    # The side that lost by far costs its distance, so its gradient is full: the mean's share.
    assert gradient.abs().max().item() == pytest.approx(1 / (2 if name == "bradley-terry" else 3))


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_a_pair_turned_round_costs_the_same(name: str) -> None:
    first, second, labels, mask, weights = batch(13)
    turned = PAIR_LOSSES[name](second, first, 1 - labels, mask, weights)
    assert turned.item() == pytest.approx(
        PAIR_LOSSES[name](first, second, labels, mask, weights).item(), rel=1e-12
    )


@pytest.mark.parametrize("name", REWARD_LOSSES)
def test_nothing_labelled_costs_nothing_and_moves_nothing(name: str) -> None:
    scores = torch.randn(2, 2, requires_grad=True)
    none, weights = torch.zeros(2, 2, dtype=torch.bool), torch.ones(2)
    labels = torch.full((2, 2), math.nan)
    pairs = REWARD_LOSSES[name].kind == "pairs"
    arguments = (scores, scores.flip(0), labels) if pairs else (scores, labels)
    loss = REWARD_LOSSES[name].function(*arguments, none, weights)
    assert loss.item() == 0
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient == 0).all()


@given(st.floats(-40, 40), st.floats(1.01, 50))
def test_the_three_outcomes_are_rao_and_kuppers_and_add_up_to_one(margin: float, k: float) -> None:
    parts = tie_log_probabilities(torch.tensor([margin], dtype=torch.float64), k)
    first, tie, second = (part.exp().item() for part in parts)
    assert first + tie + second == pytest.approx(1, abs=1e-12)
    # Their form, with strengths e^margin and 1 in place of sigmoids.
    strength = math.exp(margin)
    assert first == pytest.approx(strength / (strength + k), rel=1e-9)
    assert second == pytest.approx(1 / (1 + k * strength), rel=1e-9)
    assert tie == pytest.approx(
        (k * k - 1) * strength / ((strength + k) * (1 + k * strength)), rel=1e-9
    )


def test_ties_are_likeliest_at_equal_scores_and_two_in_three_with_the_published_constant() -> None:
    margins = torch.linspace(-6, 6, 121, dtype=torch.float64)
    tie = tie_log_probabilities(margins)[1].exp()
    assert tie.argmax() == 60 and tie[60].item() == pytest.approx((5 - 1) / (5 + 1))
    for k in (1.0, 0.5, math.nan, math.inf):
        with pytest.raises(ValueError, match="above 1"):
            tie_log_probabilities(margins, k)


def test_near_k_1_ties_vanish_and_the_loss_is_bradley_terry() -> None:
    first, second, labels, mask, weights = batch(14)
    decided = mask & (labels != 0.5)
    nearly = bradley_terry_ties_loss(first, second, labels, decided, weights, k=1 + 1e-9)
    plain = bradley_terry_loss(first, second, labels, mask, weights)
    assert nearly.item() == pytest.approx(plain.item(), rel=1e-7)


@pytest.mark.parametrize("function", [bradley_terry_loss, bradley_terry_ties_loss])
def test_shares_of_votes_are_refused_where_they_have_no_meaning(
    function: Callable[..., Tensor],
) -> None:
    zeros, mask = torch.zeros(2, 1), torch.tensor([[True], [False]])
    function(zeros, zeros, torch.tensor([[1.0], [0.7]]), mask, torch.ones(2))
    with pytest.raises(UserError, match=r"one is 0\.7[^0-9][\s\S]*soft-label"):
        function(zeros, zeros, torch.tensor([[0.7], [0.0]]), mask, torch.ones(2))


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.75, 1.0])
def test_soft_labels_are_met_where_the_scores_say_the_same_and_cost_nothing_there(
    share: float,
) -> None:
    one = torch.ones(1, 1, dtype=torch.bool)
    label = torch.tensor([[share]], dtype=torch.float64)
    # log odds of the label, held within what float64 can tell from certainty
    odds = torch.logit(label.clamp(1e-15, 1 - 1e-15)).requires_grad_()
    arguments = (torch.zeros(1, 1, dtype=torch.float64), label, one, torch.ones(1))
    loss = soft_label_loss(odds, *arguments)
    (gradient,) = torch.autograd.grad(loss, odds)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert gradient.item() == pytest.approx(0, abs=1e-12)
    whole = soft_label_loss(odds, *arguments, less_entropy=False).item()
    entropy = -sum(p * math.log(p) for p in (share, 1 - share) if p)
    assert whole == pytest.approx(entropy, abs=1e-12)


def test_the_scale_multiplies_the_scores_and_can_learn() -> None:
    first, second, labels, mask, weights = batch(15)
    scale = torch.tensor(3.0, dtype=torch.float64, requires_grad=True)
    scaled = soft_label_loss(first, second, labels, mask, weights, scale=scale)
    by_hand = soft_label_loss(3 * first, 3 * second, labels, mask, weights)
    assert scaled.item() == pytest.approx(by_hand.item(), rel=1e-12)
    assert torch.autograd.gradcheck(
        lambda s: soft_label_loss(first, second, labels, mask, weights, scale=s), (scale,)
    )


def test_hard_labels_without_ties_cost_the_same_under_two_losses() -> None:
    first, second, labels, mask, weights = batch(16)
    labels = (labels > 0.4).double()
    values = (first, second, labels, mask, weights)
    assert soft_label_loss(*values).item() == pytest.approx(
        bradley_terry_loss(*values).item(), rel=1e-12
    )


def test_regression_is_the_weighted_mean_square_of_what_is_labelled() -> None:
    scores, ratings, _, mask, weights = batch(17)
    expected = total = 0.0
    for n, a in product(range(N), range(A)):
        if mask[n, a]:
            expected += float(weights[n]) * (float(scores[n, a]) - float(ratings[n, a])) ** 2
            total += float(weights[n])
    unlabelled = torch.where(mask, ratings, torch.nan)
    scores.requires_grad_()
    loss = regression_loss(scores, unlabelled, mask, weights)
    assert loss.item() == pytest.approx(expected / total, rel=1e-12)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()
    check = partial(regression_loss, ratings=unlabelled, mask=mask, weights=weights)
    assert torch.autograd.gradcheck(check, (scores,))


def test_only_bradley_terry_leaves_labelled_ties_unused() -> None:
    labels = torch.tensor([[1.0, 0.5, math.nan]])
    mask = torch.tensor([[True, True, False]])
    used = {name: int(loss.used(labels, mask).sum()) for name, loss in REWARD_LOSSES.items()}
    assert used == {"bradley-terry": 1, "bradley-terry-ties": 2, "soft-label": 2, "regression": 2}


@pytest.mark.parametrize("name", PAIR_LOSSES)
def test_shapes_that_would_broadcast_are_refused(name: str) -> None:
    first, second, labels, mask, weights = batch(18)
    with pytest.raises(ValueError, match=r"\[N, A\]"):
        PAIR_LOSSES[name](first, second[:, :1], labels, mask, weights)
    with pytest.raises(ValueError, match=r"\[N, A\]"):
        PAIR_LOSSES[name](first[:, 0], second[:, 0], labels[:, 0], mask[:, 0], weights)
    with pytest.raises(ValueError, match="weights"):
        PAIR_LOSSES[name](first, second, labels, mask, weights[:, None])
