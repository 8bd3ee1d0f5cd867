"""What a config of reward backpropagation is refused for, before anything is loaded."""

from __future__ import annotations

import pytest

from diffusion_align.config import load_config
from diffusion_align.errors import UserError


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward=incompressibility"], ["incompressibility has no gradient", "tiny-hps"]),
        (
            ["reward=0.5*tiny-hps + 0.5*incompressibility"],
            ["incompressibility has no gradient", "ddpo"],
        ),
        (
            ["algorithm.preset=draft-k", "algorithm.active_steps=20"],
            ["algorithm.active_steps", "20 of 12 steps"],
        ),
        (["train.mixed_precision=fp16"], ["train.mixed_precision", "use no, or bf16"]),
        (["model.dtype=float16"], ["model.dtype", "use bfloat16 or float32"]),
        (["lora.dropout=0.1"], ["lora.dropout", "set lora.dropout=0"]),
        (["algorithm.train_batch_size=8"], ["one update of an iteration", "accumulation=3"]),
        (["algorithm.coupling=2"], ["algorithm.coupling", "lie in [0, 1]"]),
        (["algorithm.preset=draft-kk"], ["algorithm.preset", "draft-k"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_what_to_do(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("draft_tiny", words)
    for part in said:
        assert part in str(caught.value)


def test_minibatches_of_one_update_are_accumulated() -> None:
    words = ["algorithm.train_batch_size=8", "train.accumulation=3"]
    assert load_config("draft_tiny", words).algorithm.options.minibatches == 3
