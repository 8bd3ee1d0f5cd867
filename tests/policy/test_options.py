"""Options of model and LoRA: ranges and words, known without torch."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from diffusion_align.policy.loading import dtype_of
from diffusion_align.policy.options import Dtype, LoRAOptions, ModelOptions


@pytest.mark.parametrize(
    ("options", "change", "said"),
    [
        (LoRAOptions, {"rank": 0}, "rank: must be at least 1, not 0"),
        (LoRAOptions, {"alpha": 0.0}, "alpha: must be above 0"),
        (LoRAOptions, {"dropout": 1.0}, "dropout: must lie in [0, 1), not 1.0"),
        (LoRAOptions, {"dropout": -0.1}, "dropout: must lie in [0, 1)"),
        (LoRAOptions, {"targets": ()}, "targets: names no layer"),
        (LoRAOptions, {"path": "x", "alpha": 4.0}, "alpha: is that of the LoRA in x"),
        (LoRAOptions, {"path": "x", "init": "gaussian"}, "init: is that of the LoRA in x"),
        (LoRAOptions, {"init": "normal"}, "init: "),
        (LoRAOptions, {"path": "x", "targets": ("to_k",)}, "targets: is that of the LoRA in x"),
        (ModelOptions, {"dtype": "flaot32"}, "did you mean float32 ?"),
    ],
)
def test_values_out_of_range_are_named(options: type, change: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError) as caught:
        options(**change)
    assert said in str(caught.value)


def test_every_dtype_that_may_be_written_can_be_loaded() -> None:
    for name in get_args(Dtype):
        assert str(dtype_of(name)) == f"torch.{name}"
