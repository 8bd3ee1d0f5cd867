"""The small world's two rewards keep the contract; their truth is tested beside the world."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reward_models.base import RewardError
from reward_models.catalogue import load
from reward_models.small_world import parse_caption, random_scene, render, taste

CAPTION = "a large red circle at the top left on a white background"
OTHER = "a small blue square at the bottom right on a black background"


def drawn(caption: str) -> torch.Tensor:
    scene = random_scene(parse_caption(caption), np.random.default_rng(0))
    return torch.as_tensor(np.asarray(render(scene)), dtype=torch.float32)


def test_a_true_picture_holds_every_claim_and_a_wrong_one_few() -> None:
    media = torch.stack([drawn(CAPTION), drawn(OTHER)])
    scores = load("verifier").score(media, [CAPTION, CAPTION])
    assert scores.values[0] == 1 and scores.parts["strict"].tolist() == [1, 0]
    assert scores.values[1] < 0.5
    assert torch.equal(scores.values, scores.parts["per_claim"])


def test_taste_is_the_small_worlds() -> None:
    picture = drawn(CAPTION)
    scores = load("taste").score(picture[None], [CAPTION])
    expected = taste(picture, CAPTION)
    assert scores.values.item() == pytest.approx(expected.total, abs=1e-6)
    assert scores.parts["neatness"].item() == pytest.approx(expected.neatness, abs=1e-6)


@pytest.mark.parametrize("name", ["verifier", "taste"])
def test_a_nan_picture_scores_nan_alone(name: str) -> None:
    media = torch.stack([drawn(CAPTION)] * 3)
    media[1, 0, 5, 5] = float("nan")
    values = load(name).score(media, [CAPTION] * 3).values
    assert values.isnan().tolist() == [False, True, False]
    assert load(name).score(media[1:2], [CAPTION]).values.isnan().all()


@pytest.mark.parametrize("name", ["verifier", "taste"])
def test_a_prompt_outside_the_language_is_refused(name: str) -> None:
    with pytest.raises(RewardError, match=rf"reward {name}: 'a dog' is not"):
        load(name).score(drawn(CAPTION)[None], ["a dog"])
