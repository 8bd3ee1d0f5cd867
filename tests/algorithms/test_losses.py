"""The clipped policy loss against its formula in NumPy, its signs and its units."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.algorithms.losses import clipped_policy_loss


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
