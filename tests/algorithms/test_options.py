"""DDPO's options: their ranges, their arithmetic, the clip range and its unit."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.algorithms.clipping import clip_bounds
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import OptionError

SMALL: dict[str, Any] = {
    "prompts_per_iteration": 4,
    "samples_per_prompt": 3,
    "train_batch_size": 4,
}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompts_per_iteration": 0}, "prompts_per_iteration: must be at least 1, not 0"),
        ({"samples_per_prompt": -1}, "samples_per_prompt: must be at least 1, not -1"),
        ({"train_batch_size": 0}, "train_batch_size: must be at least 1"),
        ({"timesteps_per_loss": 0}, "timesteps_per_loss: must be at least 1"),
        ({"inner_epochs": 0}, "inner_epochs: must be at least 1"),
        ({"buffer_size": 0}, "buffer_size: must be at least 1"),
        ({"buffer_min_count": 0}, "buffer_min_count: must be at least 1"),
        ({"buffer_min_count": 64}, "buffer_min_count: 64 rewards never fit a buffer of 32"),
        ({"timestep_fraction": 0.0}, "timestep_fraction: must lie in (0, 1], not 0.0"),
        ({"timestep_fraction": math.nan}, "timestep_fraction: must lie in (0, 1], not nan"),
        ({"advantage_clip": 0.0}, "advantage_clip: must be above 0"),
        ({"kl_weight": -1.0}, "kl_weight: must be at least 0"),
        ({"clip_range": 0.0}, "clip_range: must be above 0"),
        ({"clip_range": 1e-7}, "clip_range: 1e-07 (mean) is under ten float32 steps from 1"),
        ({"clip_range": 1.6}, "for a range in nats set clip_unit"),
        ({"clip_unit": "meen"}, "clip_unit: must be one of mean, nats, not 'meen'"),
        ({"samples_per_prompt": 1, "advantages": "group"}, "or global"),
        ({"advantages": "groups"}, "did you mean group ?"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        DDPOOptions(**{**SMALL, **change})
    assert isinstance(caught.value, OptionError)
    assert caught.value.where == next(iter(change))
    assert said in str(caught.value)


@pytest.mark.parametrize(("size", "near"), [(5, "4, 6"), (24, "12"), (7, "6, 12")])
def test_batches_that_do_not_divide_show_the_arithmetic_and_the_nearest_that_do(
    size: int, near: str
) -> None:
    with pytest.raises(OptionError) as caught:
        DDPOOptions(**{**SMALL, "train_batch_size": size})
    assert str(caught.value) == (
        f"train_batch_size: 4 prompts x 3 samples = 12 samples do not split into batches of {size}"
        f"\n    nearest that do: {near}"
    )


def test_one_sample_alone_is_compared_with_nothing() -> None:
    alone: dict[str, Any] = {
        "prompts_per_iteration": 1,
        "samples_per_prompt": 1,
        "train_batch_size": 1,
    }
    for kind in ("group", "global"):
        with pytest.raises(OptionError, match="nothing to compare") as caught:
            DDPOOptions(**alone, advantages=kind)
        assert "or global" not in caught.value.fix and "advantages" in caught.value.reads
    DDPOOptions(**alone, advantages="prompt")
    DDPOOptions(**{**SMALL, "samples_per_prompt": 1}, advantages="global")


counts = st.integers(min_value=1, max_value=6)


@given(prompts=counts, each=counts, parts=counts, epochs=counts)
def test_minibatches_are_counted_as_they_are_cut(
    prompts: int, each: int, parts: int, epochs: int
) -> None:
    options = DDPOOptions(
        prompts_per_iteration=prompts * parts,
        samples_per_prompt=each,
        train_batch_size=prompts * each,
        inner_epochs=epochs,
    )
    assert options.minibatches == parts * epochs
    assert options.arithmetic.endswith(f"= {parts * epochs} minibatches")


def test_nats_bounds_stay_positive_beyond_one() -> None:
    low, high = clip_bounds(1.6, "nats")
    assert 0 < low < 1 < high
    assert low == pytest.approx(1 / high)
    assert clip_bounds(1e-4, "mean") == (1 - 1e-4, 1 + 1e-4)


@pytest.mark.parametrize("unit", ["mean", "nats"])
@pytest.mark.parametrize("clip", [0.0, -1.0, math.nan, math.inf, 1e-6])
def test_a_range_under_ten_float32_steps_is_refused(clip: float, unit: str) -> None:
    with pytest.raises(OptionError, match="clip_range"):
        clip_bounds(clip, unit)  # type: ignore[arg-type]
