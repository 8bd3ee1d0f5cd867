"""The clipped policy loss and the logistic preference loss against their formulas."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.algorithms.losses import clipped_policy_loss, logistic_preference_loss


def oracle(
    log_prob: np.ndarray, old: np.ndarray, advantage: np.ndarray, low: float, high: float
) -> float:
    """Item by item, as the paper words it: the lesser objective of the plain and the clipped."""
    objectives = []
    for new_value, old_value, a in zip(log_prob, old, advantage):
        ratio = math.exp(new_value - old_value)
        clipped = min(max(ratio, low), high)
        objectives.append(min(ratio * a, clipped * a))
    return -float(np.mean(objectives))


numbers = st.floats(-2, 2, allow_nan=False)


@given(
    st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=12), st.floats(0.01, 0.9)
)
def test_it_equals_the_formula(rows: list[tuple[float, float, float]], clip: float) -> None:
    new, old, advantage = (np.array(column) for column in zip(*rows))
    loss, _ = clipped_policy_loss(
        torch.from_numpy(new), torch.from_numpy(old), torch.from_numpy(advantage), clip
    )
    assert loss.item() == pytest.approx(oracle(new, old, advantage, 1 - clip, 1 + clip), abs=1e-12)


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "has_gradient"),
    [
        (1.0, 0.5, False),  # already more likely than allowed, and good: no further
        (1.0, -0.5, True),  # less likely although good: bring it back
        (-1.0, 0.5, True),  # more likely although bad: bring it back
        (-1.0, -0.5, False),  # already less likely than allowed, and bad: no further
        (1.0, 0.05, True),
        (-1.0, 0.05, True),
    ],
)
def test_clipping_stops_only_moves_away(
    advantage: float, log_ratio: float, has_gradient: bool
) -> None:
    log_prob = torch.tensor([log_ratio], requires_grad=True)
    loss, statistics = clipped_policy_loss(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.2)
    loss.backward()
    expected = -advantage * math.exp(log_ratio) if has_gradient else 0.0
    assert log_prob.grad is not None
    assert log_prob.grad.item() == pytest.approx(expected, rel=1e-6)
    assert statistics.clip_fraction.item() == (abs(math.exp(log_ratio) - 1) > 0.2)


def test_statistics_of_an_untouched_policy_are_exact() -> None:
    log_prob = torch.randn(8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    _, statistics = clipped_policy_loss(log_prob, log_prob, torch.ones(8), 1e-4)
    assert statistics.mean.item() == 1.0
    assert statistics.max_deviation.item() == 0.0
    assert statistics.clip_fraction.item() == 0.0
    assert statistics.kl.item() == 0.0
    assert not any(value.requires_grad for value in vars(statistics).values())


def test_the_kl_estimate_keeps_small_numbers() -> None:
    shift = torch.full((4,), 1e-5)
    _, statistics = clipped_policy_loss(shift, torch.zeros(4), torch.ones(4), 1e-2)
    assert 0 <= statistics.kl.item() < 2e-10


def test_half_precision_is_widened_and_shapes_must_agree() -> None:
    half = torch.zeros(3, dtype=torch.bfloat16)
    loss, _ = clipped_policy_loss(half, half, torch.ones(3), 0.1)
    assert loss.dtype == torch.float32
    with pytest.raises(ValueError, match="shapes differ"):
        clipped_policy_loss(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3), 0.1)


@given(
    st.lists(st.tuples(st.floats(-25, 25), st.floats(0, 1)), min_size=1, max_size=12),
)
def test_the_preference_loss_is_the_cross_entropy_of_a_choice(
    rows: list[tuple[float, float]],
) -> None:
    margin, label = (torch.tensor(column, dtype=torch.float64) for column in zip(*rows))
    margin.requires_grad_()
    loss = logistic_preference_loss(margin, label)
    # Written out with probabilities, which float64 still holds at these margins.
    chances = [1 / (1 + math.exp(-m)) for m, _ in rows]
    others = [1 / (1 + math.exp(m)) for m, _ in rows]
    expected = [
        -y * math.log(p) - (1 - y) * math.log(q) for p, q, (_, y) in zip(chances, others, rows)
    ]
    assert loss.tolist() == pytest.approx(expected, abs=1e-12)
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient.tolist() == pytest.approx(
        [p - y for p, (_, y) in zip(chances, rows)], abs=1e-12
    )


@pytest.mark.parametrize("label", [0.0, 0.3, 0.5, 1.0])
def test_an_untouched_margin_costs_ln_2_and_a_far_one_stays_finite(label: float) -> None:
    margin = torch.tensor([0.0, 1e4, -1e4], requires_grad=True)
    loss = logistic_preference_loss(margin, label)
    assert loss.tolist() == pytest.approx([math.log(2), (1 - label) * 1e4, label * 1e4])
    (gradient,) = torch.autograd.grad(loss.sum(), margin)
    assert gradient.tolist() == pytest.approx([0.5 - label, 1 - label, -label])


def test_swapping_the_two_and_the_label_changes_nothing() -> None:
    margin, label = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    label = label.sigmoid()
    swapped = logistic_preference_loss(-margin, 1 - label)
    torch.testing.assert_close(logistic_preference_loss(margin, label), swapped)


def test_the_preference_loss_keeps_its_precision_and_refuses_what_does_not_fit() -> None:
    assert logistic_preference_loss(torch.zeros(2, dtype=torch.bfloat16)).dtype == torch.float32
    assert logistic_preference_loss(torch.zeros(2, 3).double()).dtype == torch.float64
    with pytest.raises(ValueError, match="shapes differ"):
        logistic_preference_loss(torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="probability"):
        logistic_preference_loss(torch.zeros(3), 1.1)
