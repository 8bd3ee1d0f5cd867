"""Who was trained on, when the reward is a sum."""

from __future__ import annotations

import numpy as np

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.comparison import arranged, find_notes

SUM = "0.5*tiny-hps + 0.5*tiny-aesthetic"


def scores(*names: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    rng = np.random.default_rng(0)
    return {name: (rng.random((30, 2)), rng.random((30, 2))) for name in names}


def roles(*names: str, trained_on: list[str]) -> dict[str, str]:
    units = {name: "" for name in names if not name.startswith(f"{SUM}/")}
    return {r.name: r.role for r in arranged(scores(*names), units, trained_on)}


def test_the_terms_of_a_trained_sum_are_not_held_out() -> None:
    found = roles(SUM, "tiny-hps", "taste", trained_on=[SUM, "tiny-hps", "tiny-aesthetic"])
    assert found == {SUM: "trained", "tiny-hps": "trained", "taste": "held-out"}


def test_a_sum_with_a_trained_term_is_not_held_out() -> None:
    found = roles(SUM, "tiny-mps", trained_on=["tiny-hps"])
    assert found == {SUM: "trained", "tiny-mps": "held-out"}


def test_terms_that_stand_as_parts_are_not_missed() -> None:
    names = (SUM, f"{SUM}/tiny-hps", "taste")
    results = arranged(scores(*names), {SUM: "", "taste": ""}, [SUM, "tiny-hps", "clip"])
    notes = find_notes(
        results,
        trained_on=[SUM, "tiny-hps", "clip"],
        prompts=[Prompt(str(n)) for n in range(30)],
        training_prompts=[],
        seeds=2,
    )
    assert "Trained on, but not scored here: clip." in notes
