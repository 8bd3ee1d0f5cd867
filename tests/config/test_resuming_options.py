"""Which options of an algorithm may change on resume: said of each, none by accident."""

from __future__ import annotations

from dataclasses import fields

import pytest

from diffusion_align.algorithms import catalogue
from diffusion_align.config import changes_on_resume, load_config
from diffusion_align.config.resuming import FIXED, FREE
from diffusion_align.errors import UserError

OPTIONS = {
    name: {field.name for field in fields(catalogue.load(catalogue.resolve(name).options))}
    for name in catalogue.names()
}


def test_what_may_change_exists() -> None:
    for key in FREE:
        section, _, name = key.partition(".")
        if section == "algorithm":
            assert any(name in options for options in OPTIONS.values()), key
        assert any(key.startswith(f"{fixed}.") for fixed in FIXED), f"{key} need not be named"


@pytest.mark.parametrize(
    "change",
    [
        "algorithm.prompts_per_iteration=8",
        "algorithm.samples_per_prompt=4",
        "algorithm.train_batch_size=32",
        "algorithm.advantages=global",
        "algorithm.buffer_size=64",
        "algorithm.timesteps_per_loss=5",
        "algorithm.train_guidance=false",
        "algorithm.old_log_probs=replayed",
        "algorithm.clip_unit=nats",
        "train.mixed_precision=bf16",
        "train.ema_decay=0.5",
    ],
)
def test_what_a_checkpoint_depends_on_may_not_change(change: str) -> None:
    """The data cursor, remembered rewards, the finding of the replay check, the average."""
    key = change.partition("=")[0]
    before, after = load_config("demo"), load_config("demo", [change])
    with pytest.raises(UserError, match=rf"changed: {key}"):
        changes_on_resume(before, after)
