"""Which frames are looked at, and how their scores are pooled."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import scipy.special
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward_models.base import RewardError
from reward_models.video.frames import FrameChoice, parse_pool, pool

COUNTS = st.integers(1, 400)


def test_uniform_takes_the_centres_of_equal_parts() -> None:
    assert FrameChoice.parse("uniform:4").indices(8) == [1, 3, 5, 7]
    assert FrameChoice.parse("uniform:1").indices(9) == [4]
    assert FrameChoice.parse("uniform:3").indices(10) == [1, 5, 8]  # centres 1.67, 5, 8.33


@given(st.integers(1, 40), COUNTS)
def test_uniform_is_even_and_without_repeats(n: int, count: int) -> None:
    chosen = FrameChoice.parse(f"uniform:{n}").indices(count)
    assert len(chosen) == min(n, count) == len(set(chosen)) and chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < count
    if n < count:
        gaps = {after - before for before, after in itertools.pairwise(chosen)}
        assert not gaps or max(gaps) - min(gaps) <= 1
        # as far from the start as from the end, to a frame
        assert abs(chosen[0] - (count - 1 - chosen[-1])) <= 1


@given(st.integers(1, 40), COUNTS, st.integers(0, 9), st.one_of(st.integers(), st.text()))
def test_random_draws_without_replacement(n: int, count: int, seed: int, key: int | str) -> None:
    chosen = FrameChoice.parse(f"random:{n}").indices(count, seed=seed, key=key)
    assert len(chosen) == min(n, count) == len(set(chosen)) and chosen == sorted(chosen)
    assert chosen[0] >= 0 and chosen[-1] < count
    assert chosen == FrameChoice.parse(f"random:{n}").indices(count, seed=seed, key=key)


def test_random_depends_on_seed_key_and_length() -> None:
    choice = FrameChoice.parse("random:4")
    base = choice.indices(1000, seed=1, key="a")
    assert base != choice.indices(1000, seed=2, key="a")
    assert base != choice.indices(1000, seed=1, key="b")
    assert base != choice.indices(1001, seed=1, key="a")
    assert choice.indices(1000, key=1) != choice.indices(1000, key="1")


def test_random_draws_every_frame_equally_often() -> None:
    choice, clips = FrameChoice.parse("random:3"), 4000
    seen = torch.zeros(12)
    for key in range(clips):
        seen[choice.indices(12, key=key)] += 1
    expected = clips * 3 / 12
    deviation = math.sqrt(clips * (3 / 12) * (9 / 12))
    assert (seen - expected).abs().max() < 4.5 * deviation


def test_random_draws_are_those_of_every_machine_and_version() -> None:
    """Recorded: a score that a run reports must not change with NumPy."""
    assert FrameChoice.parse("random:4").indices(16, seed=3, key="clip") == [2, 9, 11, 14]


def test_all_and_first() -> None:
    assert FrameChoice.parse("all").indices(3) == [0, 1, 2]
    assert FrameChoice.parse("first").indices(3) == [0]
    with pytest.raises(ValueError, match="a clip of 0 frames"):
        FrameChoice.parse("all").indices(0)


@pytest.mark.parametrize("word", ["all", "first", "uniform:8", "random:4"])
def test_a_choice_is_written_as_it_is_read(word: str) -> None:
    assert str(FrameChoice.parse(word)) == word
    assert FrameChoice.parse(f" {word.upper()} ") == FrameChoice.parse(word)


@pytest.mark.parametrize(
    "word",
    [
        *("", "uniform", "uniform:", "uniform:0", "uniform:-1", "uniform:2.5", "uniform:x"),
        *("first:2", "all:", "last", "random:²", "8", "uniform:8:2"),
    ],
)
def test_other_words_are_refused_with_what_is_known(word: str) -> None:
    with pytest.raises(RewardError, match="no choice of frames") as caught:
        FrameChoice.parse(word)
    assert "uniform:8" in str(caught.value)


# --- pooling


VALUES = torch.tensor([[1.0, 2.0, 4.0], [-3.0, 0.5, 0.5]], dtype=torch.float64)


def test_mean_and_min() -> None:
    assert pool(VALUES, "mean").tolist() == pytest.approx([7 / 3, -2 / 3])
    assert pool(VALUES, "min").tolist() == [1.0, -3.0]


def test_softmin_is_its_formula() -> None:
    tau = 0.7
    terms = [[math.exp(-v / tau) for v in row] for row in VALUES.tolist()]
    expected = [-tau * math.log(sum(row) / len(row)) for row in terms]
    assert pool(VALUES, "softmin:0.7").tolist() == pytest.approx(expected)


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=9), st.floats(0.01, 100))
def test_softmin_lies_between_min_and_mean(row: list[float], tau: float) -> None:
    values = torch.tensor([row], dtype=torch.float64)
    soft = pool(values, f"softmin:{tau}").item()
    assert min(row) - 1e-9 <= soft <= sum(row) / len(row) + 1e-9


def test_softmin_goes_from_min_to_mean() -> None:
    assert torch.allclose(pool(VALUES, "softmin:0.001"), pool(VALUES, "min"), atol=0.01)
    assert torch.allclose(pool(VALUES, "softmin:100000"), pool(VALUES, "mean"), atol=1e-3)


@pytest.mark.parametrize("tau", [1e-3, 1.0, 1e3, 1e6])
def test_softmin_keeps_its_digits_at_every_temperature(tau: float) -> None:
    values = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) * 3 + 20
    exact = values.double().numpy() / tau
    expected = -tau * (scipy.special.logsumexp(-exact, axis=1) - np.log(7))
    assert pool(values, f"softmin:{tau}").numpy() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["mean", "min", "softmin:0.3"])
def test_the_gradient_is_that_of_finite_differences(kind: str) -> None:
    values = VALUES[:1].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: pool(v, kind), values)


def test_softmin_gives_every_frame_its_share_of_the_gradient() -> None:
    values = VALUES.clone().requires_grad_()
    pool(values, "softmin:0.5").sum().backward()
    assert values.grad is not None
    assert torch.allclose(values.grad, torch.softmax(-VALUES / 0.5, dim=1))


@pytest.mark.parametrize("kind", ["mean", "min", "softmin:0.1"])
@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_a_broken_frame_makes_its_clip_nan_and_no_other(kind: str, broken: float) -> None:
    values = VALUES.clone()
    values[1, 2] = broken
    values.requires_grad_()
    pooled = pool(values, kind)
    assert pooled[0] == pool(VALUES, kind)[0] and pooled[1].isnan()
    pooled[0].backward()
    assert values.grad is not None
    assert values.grad.isfinite().all() and not values.grad[1].any()


@pytest.mark.parametrize(
    "word",
    [
        *("", "max", "mean:2", "softmin", "softmin:", "softmin:0", "softmin:-1"),
        *("softmin:x", "softmin:inf", "softmin:nan"),
    ],
)
def test_other_poolings_are_refused_with_what_is_known(word: str) -> None:
    for refuse in (parse_pool, lambda w: pool(VALUES, w)):
        with pytest.raises(RewardError, match="no way to pool") as caught:
            refuse(word)
        assert "softmin:0.1" in str(caught.value)
