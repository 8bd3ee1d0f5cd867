"""What may change when a run is resumed."""

from __future__ import annotations

import pytest

from diffusion_align.config import changes_on_resume, load_config
from diffusion_align.errors import UserError


@pytest.mark.parametrize(
    "change",
    [
        "train.steps=7",
        "train.learning_rate=1e-5",
        "train.log_every=3",
        "evaluation.seeds=3",
        "evaluation.rewards=[taste]",
        "algorithm.clip_range=0.1",
        "model.device=cpu",
        "sampling.batch_size=4",
    ],
)
def test_what_leaves_the_run_the_same_run_is_allowed_and_listed(change: str) -> None:
    key = change.partition("=")[0]
    (line,) = changes_on_resume(load_config("demo"), load_config("demo", [change]))
    assert line.startswith(f"{key}: ")


@pytest.mark.parametrize(
    "change",
    [
        "model.id=sd15",
        "model.dtype=bfloat16",
        "lora.rank=5",
        "lora.alpha=7",
        "lora=null",
        "prompts.source=animals",
        "prompts.negative=blurred",
        "evaluation.prompts=animals",
        "evaluation.eta=0.5",
        "evaluation.steps=9",
        "evaluation.guidance_scale=3",
        "sampling.steps=6",
        "sampling.eta=0.5",
        "reward=taste",
        "seed=1",
    ],
)
def test_what_would_make_it_another_run_is_refused(change: str) -> None:
    key = change.partition("=")[0]
    with pytest.raises(UserError, match=rf"changed: {key}[^$]*--new"):
        changes_on_resume(load_config("demo"), load_config("demo", [change]))


def test_all_refused_changes_are_listed_and_no_other() -> None:
    changed = load_config("demo", ["seed=1", "reward=taste", "train.steps=7"])
    with pytest.raises(UserError) as caught:
        changes_on_resume(load_config("demo"), changed)
    assert str(caught.value).count("changed: ") == 2
    assert "train.steps" not in str(caught.value)


def test_an_unchanged_config_has_no_changes() -> None:
    assert changes_on_resume(load_config("demo"), load_config("demo")) == []
