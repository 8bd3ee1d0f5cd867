"""Named normalisations: the published maps, and no other."""

from __future__ import annotations

import pytest

from reward_models.base import RewardError
from reward_models.catalogue import ROWS
from reward_models.presets import PRESETS, Normalisation, check_preset, describe, normalisation


# Score as published -> what the source makes of it, computed by its own formula.
@pytest.mark.parametrize(
    ("preset", "reward", "score", "published"),
    [
        ("percent", "hpsv2.1", 0.2876, 28.76),  # HPSv2's tables
        ("percent", "clip", 0.25, 25.0),  # torchmetrics
        ("clipscore", "clip", 0.3, 0.75),  # w = 2.5
        ("unit", "aesthetic", 1.0, 0.0),
        ("unit", "aesthetic", 5.5, 0.5),
        ("unit", "aesthetic", 10.0, 1.0),
        ("unit", "tiny-aesthetic", 1.0, 0.0),
        ("unit", "aesthetic-v1", 7.0, 0.7),
        ("vbench", "aesthetic-v1", 7.0, 0.7),
        ("flow_grpo", "pickscore", 26.0, 1.0),
        ("flow_grpo", "clip", 0.30, 1.0),
        ("flow_grpo", "compressibility", -250.0, -0.5),
        ("flow_grpo", "incompressibility", 250.0, 250.0),
    ],
)
def test_a_preset_is_its_sources_formula(
    preset: str, reward: str, score: float, published: float
) -> None:
    rule = normalisation(preset, reward)
    assert rule.scale * score + rule.offset == pytest.approx(published, rel=1e-12, abs=1e-12)


def test_every_row_names_a_reward_and_a_source_and_keeps_the_order() -> None:
    for preset, reward, formula, source in describe():
        assert reward in ROWS, f"{preset}({reward})"
        assert len(source) > 10 and "score" in formula
        assert PRESETS[preset][reward].scale > 0


def test_the_description_is_the_whole_table() -> None:
    assert {(p, r) for p, r, _, _ in describe()} == {(p, r) for p in PRESETS for r in PRESETS[p]}


def test_a_preset_that_does_not_know_the_reward_says_which_it_knows() -> None:
    with pytest.raises(RewardError, match="preset vbench does not know clip") as caught:
        normalisation("vbench", "clip")
    assert "it knows aesthetic-v1" in caught.value.fix
    assert "clip has percent, clipscore, flow_grpo" in caught.value.fix


def test_an_unknown_preset_gets_the_nearest_one() -> None:
    with pytest.raises(RewardError, match="unknown preset 'flowgrpo'") as caught:
        check_preset("flowgrpo")
    assert "did you mean flow_grpo ?" in caught.value.fix
    assert check_preset(" Flow-GRPO ") == "flow_grpo"


@pytest.mark.parametrize(
    ("scale", "offset"), [(0.0, 1.0), (float("nan"), 0.0), (1.0, float("inf"))]
)
def test_a_map_that_loses_the_score_is_refused(scale: float, offset: float) -> None:
    with pytest.raises(RewardError, match="make no normalisation"):
        Normalisation("mine", scale, offset)


def test_formulas_are_readable() -> None:
    assert normalisation("percent", "clip").formula == "100 * score"
    assert Normalisation("x", 0.5, -2.0).formula == "0.5 * score - 2"
    assert Normalisation("x", 0.5, 2.0).formula == "0.5 * score + 2"
