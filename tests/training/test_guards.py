"""Guards: when nothing can be learnt, and which advice goes with it."""

from __future__ import annotations

import pytest
import torch

from diffusion_align.errors import UserError
from diffusion_align.training.guards import Guards


def test_equal_rewards_and_equal_advantages_have_their_own_advice() -> None:
    equal = {"reward/mean": 1.0, "reward/std": 0.0, "advantage/std": 0.0}
    zero = {"reward/mean": 0.5, "reward/std": 0.5, "advantage/std": 0.0}
    for metrics, where, advice in (
        (equal, "reward", "saturated"),
        (zero, "algorithm.advantages", "algorithm.advantages=global"),
    ):
        guards = Guards()
        guards.rewards(metrics)
        guards.rewards(metrics)
        with pytest.raises(UserError, match="3 iterations in a row") as caught:
            guards.rewards(metrics)
        assert caught.value.where == where and advice in caught.value.fix


def test_a_spread_in_between_starts_the_count_again() -> None:
    guards = Guards()
    for spread in (0.0, 0.0, 1.0, 0.0, 0.0):
        guards.rewards({"reward/std": 1.0, "advantage/std": spread})
    # Equal rewards that differ from what is remembered of their prompts do teach something.
    for _ in range(5):
        guards.rewards({"reward/std": 0.0, "advantage/std": 1.0})


def test_zero_advantages_are_no_severed_gradient() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    parameter.grad = torch.zeros(1)
    zero = {"reward/std": 0.5, "advantage/std": 0.0}
    Guards().gradient(0.0, {}, zero, [parameter], 1)
    with pytest.raises(UserError, match="no gradient reached"):
        Guards().gradient(0.0, {}, {**zero, "advantage/std": 1.0}, [parameter], 1)
    with pytest.raises(UserError, match="no gradient reached"):
        Guards().gradient(0.0, {}, {}, [parameter], 1)
