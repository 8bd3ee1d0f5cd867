"""What the package promises on its front page, with the weights that travel in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.mark.slow
def test_the_demo_proves_that_its_pictures_became_better(
    call: Callable[..., Any], tmp_path: Path
) -> None:
    done = call("demo", "--out", tmp_path / "demo")
    assert done.exit_code == 0, (done.stderr, done.exception)
    summary = json.loads((tmp_path / "demo" / "final" / "summary.json").read_text())
    assert summary["pairs"] >= 512
    assert summary["trained_on"] == ["tiny-aesthetic"]
    # The trained reward rose, and the pictures still show what their captions say.
    assert summary["rewards"]["tiny-aesthetic"]["ci95"][0] > 0
    assert summary["rewards"]["verifier"]["ci95"][0] > -0.05


@pytest.mark.parametrize(
    ("words", "trained", "heldout"),
    [
        ((), "tiny-aesthetic", ["verifier", "taste"]),
        (("--reward", "tiny-hps"), "tiny-hps", ["tiny-mps", "taste", "verifier"]),
        (("--reward", "tiny-mps"), "tiny-mps", ["tiny-hps", "taste", "verifier"]),
        (
            ("--reward", "tiny-hps", "evaluation.rewards=[taste]"),
            "tiny-hps",
            ["taste"],
        ),
    ],
)
def test_the_demo_holds_out_what_it_does_not_train_on(
    call: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    trained: str,
    heldout: list[str],
) -> None:
    from diffusion_align.commands import training

    asked: list[Any] = []
    monkeypatch.setattr(training, "_run", lambda config, **_: asked.append(config))
    assert call("demo", *words).exit_code == 0
    (config,) = asked
    assert config.reward == trained
    assert list(config.evaluation.rewards) == heldout


def test_the_demo_answers_a_mistyped_reward(call: Callable[..., Any]) -> None:
    done = call("demo", "--reward", "tiny-hsp")
    assert done.exit_code == 2 and "did you mean tiny-hps" in done.stderr
