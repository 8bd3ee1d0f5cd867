"""Advantages against slow, plain Python."""

from __future__ import annotations

import statistics as plain

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.algorithms.advantages import (
    EPSILON,
    PromptStatistics,
    global_advantages,
    group_advantages,
)

NAN = float("nan")


def normalised(value: float, basis: list[float]) -> float:
    spread = plain.pstdev(basis)
    return 0.0 if spread == 0 else (value - plain.fmean(basis)) / (spread + EPSILON)


def agree(result: torch.Tensor, expected: list[float]) -> None:
    assert result.dtype == torch.float32
    torch.testing.assert_close(
        result, torch.tensor(expected, dtype=torch.float32), equal_nan=True, atol=1e-5, rtol=1e-5
    )


def test_a_prompt_with_history_uses_it_and_a_new_one_uses_the_batch() -> None:
    tracker = PromptStatistics(buffer_size=4, min_count=3)
    first = [1.0, 2.0, 6.0, 3.0]
    agree(
        tracker.update(["a", "a", "b", "b"], torch.tensor(first)),
        [normalised(value, first) for value in first],
    )
    second = [4.0, 0.0, 5.0]
    result = tracker.update(["a", "a", "b"], torch.tensor(second))
    a_buffer = [1.0, 2.0, 4.0, 0.0]
    b_buffer = [6.0, 3.0, 5.0]
    agree(
        result,
        [normalised(4.0, a_buffer), normalised(0.0, a_buffer), normalised(5.0, b_buffer)],
    )
    tracker.update(["a"], torch.tensor([9.0]))
    assert tracker.state_dict()["a"] == [2.0, 4.0, 0.0, 9.0]


def test_integers_do_not_truncate() -> None:
    tracker = PromptStatistics(buffer_size=8, min_count=1)
    rewards = torch.tensor([0, 1, 1, 0, 1])
    agree(
        tracker.update(["a"] * 5, rewards),
        [normalised(value, [0, 1, 1, 0, 1]) for value in (0, 1, 1, 0, 1)],
    )
    agree(
        global_advantages(rewards.bool()), [normalised(v, [0, 1, 1, 0, 1]) for v in (0, 1, 1, 0, 1)]
    )


def test_failed_rewards_take_no_part() -> None:
    rewards = torch.tensor([1.0, NAN, 3.0, float("inf"), 8.0])
    valid = [1.0, 3.0, 8.0]
    expected = [normalised(1.0, valid), NAN, normalised(3.0, valid), NAN, normalised(8.0, valid)]
    agree(global_advantages(rewards), expected)
    agree(group_advantages(rewards, ["x"] * 5), expected)
    tracker = PromptStatistics(buffer_size=8, min_count=8)
    agree(tracker.update(["a"] * 5, rewards), expected)
    assert tracker.state_dict() == {"a": valid}


@pytest.mark.parametrize("value", [0.1, 1e8, -3.7])
def test_no_spread_gives_zero_and_not_rounding(value: float) -> None:
    rewards = torch.full((7,), value)
    agree(global_advantages(rewards), [0.0] * 7)
    agree(group_advantages(rewards, range(7)), [0.0] * 7)
    agree(PromptStatistics().update(["a"] * 7, rewards), [0.0] * 7)


def test_groups_are_normalised_apart() -> None:
    rewards = torch.tensor([1.0, 2.0, 10.0, 30.0, 3.0])
    groups = ["a", "a", "b", "b", "a"]
    members = {"a": [1.0, 2.0, 3.0], "b": [10.0, 30.0]}
    agree(
        group_advantages(rewards, groups),
        [normalised(value, members[group]) for value, group in zip(rewards.tolist(), groups)],
    )


@given(st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=40))
def test_global_advantages_have_mean_zero_and_std_at_most_one(values: list[float]) -> None:
    result = global_advantages(torch.tensor(values)).double()
    assert abs(float(result.mean())) < 1e-5
    assert float(result.std(correction=0)) < 1 + 1e-5


def test_state_survives_a_round_trip() -> None:
    tracker = PromptStatistics(buffer_size=5, min_count=2)
    tracker.update(["a", "b", "a"], torch.tensor([1.0, 2.0, 3.0]))
    other = PromptStatistics(buffer_size=5, min_count=2)
    other.load_state_dict(tracker.state_dict())
    rewards = torch.tensor([0.5, 0.7])
    assert torch.equal(tracker.update(["a", "b"], rewards), other.update(["a", "b"], rewards))


def test_misuse_is_refused() -> None:
    with pytest.raises(ValueError, match="min_count"):
        PromptStatistics(buffer_size=4, min_count=5)
    with pytest.raises(ValueError, match="expected 2 rewards"):
        group_advantages(torch.zeros(3), ["a", "b"])
