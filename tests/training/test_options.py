"""The loop's options: ranges, and the one place that divides minibatches into updates."""

from __future__ import annotations

import math
from typing import Any

import pytest

from diffusion_align.errors import OptionError
from diffusion_align.training.options import TrainOptions


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": 0}, "must be at least 1, not 0"),
        ({"accumulation": 0}, "must be at least 1"),
        ({"keep_checkpoints": 0}, "must be at least 1"),
        ({"log_every": 0}, "must be at least 1"),
        ({"checkpoint_every": -1}, "must be at least 0"),
        ({"sample_every": -1}, "must be at least 0"),
        ({"learning_rate": -1e-4}, "must be above 0, not -0.0001"),
        ({"learning_rate": 0.0}, "must be above 0"),
        ({"learning_rate": math.inf}, "must be above 0, not inf"),
        ({"weight_decay": -0.1}, "must be at least 0"),
        ({"adam_beta1": 1.0}, "must lie in [0, 1), not 1.0"),
        ({"adam_beta2": -0.1}, "must lie in [0, 1)"),
        ({"adam_epsilon": 0.0}, "must be above 0"),
        ({"max_grad_norm": -1.0}, "must be at least 0"),
        ({"mixed_precision": "bf61"}, "did you mean bf16 ?"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        TrainOptions(**change)
    assert str(caught.value).startswith(f"{next(iter(change))}: must")
    assert said in str(caught.value)


@pytest.mark.parametrize("group", range(1, 14))
def test_an_accumulation_is_refused_exactly_where_it_does_not_divide(group: int) -> None:
    options = TrainOptions(accumulation=group)
    if group in (1, 2, 3, 4, 6, 12):
        options.check_accumulation(12, "= 12 minibatches")
        return
    with pytest.raises(OptionError, match=f"= 12 minibatches do not split into updates of {group}"):
        options.check_accumulation(12, "= 12 minibatches")
