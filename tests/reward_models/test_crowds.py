"""Crowds: their answers follow Bradley and Terry, repeat, and differ; their pictures vary."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from reward_models.small_world import (
    AESTHETIC_CROWD,
    HPS_CROWD,
    MPS_CROWD,
    Crowd,
    JudgedPairs,
    Taste,
    captions,
    judged_pairs,
    judged_ratings,
    parse_caption,
    random_caption,
    random_scene,
    realised_ceiling,
    render,
    taste,
)
from reward_models.small_world.corrupt import corrupt
from reward_models.small_world.grammar import is_heldout

CROWDS = [HPS_CROWD, MPS_CROWD]


@cache
def pairs(crowd: Crowd, count: int = 500) -> JudgedPairs:
    return judged_pairs(count, 5, "train", crowd)


def opinions(crowd: Crowd, judged: JudgedPairs) -> tuple[np.ndarray, np.ndarray]:
    return (
        np.array([crowd.opinion(item) for item in judged.tasted_first]),
        np.array([crowd.opinion(item) for item in judged.tasted_second]),
    )


def test_the_aesthetic_crowd_is_the_one_that_the_shipped_weights_learnt_from() -> None:
    assert vars(AESTHETIC_CROWD) == vars(Crowd("aesthetic", 0.0, 0.5, 0.5, noise=1.0, seed=11))
    # numpy's own stream of that key: what rate() has always drawn.
    noise = np.random.default_rng(np.random.Philox(key=11)).normal(0, 1.0, 50)
    np.testing.assert_array_equal(
        AESTHETIC_CROWD.rate(np.full(50, 5.5)), np.clip(5.5 + noise, 1, 10)
    )


@pytest.mark.parametrize("crowd", [AESTHETIC_CROWD, *CROWDS], ids=lambda crowd: crowd.name)
def test_weights_add_up_and_opinions_span_1_to_10(crowd: Crowd) -> None:
    assert crowd.claims + crowd.neatness + crowd.palette == pytest.approx(1)
    assert crowd.opinion(Taste(1.0, 1.0, 1.0)) == pytest.approx(10)
    assert crowd.opinion(Taste(0.0, 0.0, 0.0)) == 1


def test_the_crowds_are_different_people() -> None:
    everyone = [AESTHETIC_CROWD, *CROWDS]
    assert len({crowd.seed for crowd in everyone}) == len({crowd.noise for crowd in everyone}) == 3
    equal = np.zeros(2000)
    first, second = (crowd.choose(equal, equal) for crowd in CROWDS)
    # Independent coins agree half the time: 2000 tosses, five standard deviations.
    assert abs((first == second).mean() - 0.5) < 0.056


@pytest.mark.parametrize("crowd", CROWDS, ids=lambda crowd: crowd.name)
@pytest.mark.parametrize("lead", [-2.0, -0.5, 0.0, 0.3, 1.0])
def test_choices_follow_the_logistic_law(crowd: Crowd, lead: float) -> None:
    n = 20_000
    chosen = crowd.choose(np.full(n, 6.0 + lead * crowd.noise), np.full(n, 6.0))
    expected = 1 / (1 + np.exp(-lead))
    assert chosen.mean() == pytest.approx(expected, abs=5 * 0.5 / np.sqrt(n))


def test_the_same_question_has_the_same_answer_and_another_draw_asks_other_people() -> None:
    a, b = np.random.default_rng(0).uniform(4, 6, (2, 2000))
    first = HPS_CROWD.choose(a, b, draw=3)
    np.testing.assert_array_equal(first, HPS_CROWD.choose(a, b, draw=3))
    np.testing.assert_array_equal(first[:500], HPS_CROWD.choose(a[:500], b[:500], draw=3))
    equal = np.zeros(2000)
    same = HPS_CROWD.choose(equal, equal, 3) == HPS_CROWD.choose(equal, equal, 4)
    assert abs(same.mean() - 0.5) < 0.056
    rated, again = (AESTHETIC_CROWD.rate(np.full(2000, 5.5), draw=d) for d in (0, 1))
    assert abs(np.corrcoef(rated, again)[0, 1]) < 0.12


def test_the_ceiling_is_what_true_opinions_reach_on_many_choices() -> None:
    a, b = np.random.default_rng(1).uniform(4, 6, (2, 400))
    realised = [realised_ceiling(a, b, HPS_CROWD.choose(a, b, draw)) for draw in range(100)]
    # 40,000 choices: the mean's standard deviation is below 0.0025.
    assert np.mean(realised) == pytest.approx(HPS_CROWD.agreement_ceiling(a, b), abs=0.01)
    assert HPS_CROWD.agreement_ceiling(a, a) == 0.5
    assert realised_ceiling(a, a, np.ones(400, bool)) == 0.5


@pytest.mark.parametrize("crowd", CROWDS, ids=lambda crowd: crowd.name)
def test_people_agree_about_as_much_as_those_of_the_real_data(crowd: Crowd) -> None:
    judged = pairs(crowd)
    assert 0.80 <= judged.ceiling <= 0.85
    assert realised_ceiling(
        judged.opinion_first, judged.opinion_second, judged.preferred
    ) == pytest.approx(judged.ceiling, abs=0.06)
    assert judged.preferred.mean() == pytest.approx(0.5, abs=0.08)  # the sides tell nothing


@pytest.mark.parametrize("crowd", CROWDS, ids=lambda crowd: crowd.name)
def test_claims_neatness_and_palette_all_differ_within_pairs(crowd: Crowd) -> None:
    judged = pairs(crowd)
    for part in ("claims", "neatness", "palette"):
        gap = np.array(
            [
                getattr(a, part) - getattr(b, part)
                for a, b in zip(judged.tasted_first, judged.tasted_second)
            ]
        )
        assert (abs(gap) > 0.05).mean() > 0.4
        alone = realised_ceiling(np.sign(gap), np.zeros(len(gap)), judged.preferred)
        # Each part moves the crowd, and none is all it sees.
        assert 0.55 < alone < judged.ceiling - 0.03


def test_mps_judges_otherwise_than_hps_and_both_mind_the_caption() -> None:
    judged = pairs(MPS_CROWD)
    own = realised_ceiling(judged.opinion_first, judged.opinion_second, judged.preferred)
    orders = [np.subtract(*opinions(crowd, judged)) > 0 for crowd in CROWDS]
    assert 0.05 < (orders[0] != orders[1]).mean() < 0.2
    blind = realised_ceiling(*opinions(AESTHETIC_CROWD, judged), judged.preferred)
    assert blind < own - 0.03


def test_pairs_are_reproducible_of_their_split_and_one_caption() -> None:
    first, again = (judged_pairs(12, 9, "heldout", MPS_CROWD) for _ in range(2))
    for name in ("first", "second", "preferred", "opinion_first", "opinion_second"):
        np.testing.assert_array_equal(getattr(first, name), getattr(again, name))
    assert first.captions == again.captions and all(map(is_heldout, first.captions))
    assert first.first.dtype == np.uint8 and first.first.shape == (12, 3, 64, 64)
    for i, caption in enumerate(first.captions):
        assert first.opinion_second[i] == MPS_CROWD.opinion(taste(first.second[i] / 255, caption))
    others = [
        judged_pairs(12, *rest) for rest in ((9, "heldout", HPS_CROWD), (8, "heldout", MPS_CROWD))
    ]
    assert all(set(other.captions) != set(first.captions) for other in others)


def samples(count: int, each: int, split: str = "train") -> tuple[torch.Tensor, list[str]]:
    texts = [text for text in captions(count, 4, split) for _ in range(each)]  # type: ignore[arg-type]
    return torch.rand(len(texts), 3, 64, 64, generator=torch.Generator().manual_seed(0)), texts


def test_samples_of_a_generator_are_paired_with_others_of_their_caption() -> None:
    images, texts = samples(4, 3)
    judged = judged_pairs(2, 9, "train", HPS_CROWD, (images, texts))
    assert len(judged) == 2 + 4
    levels = (images * 255).round().to(torch.uint8).numpy()
    seen = []
    for i in range(2, 6):
        sides = [
            next(n for n, level in enumerate(levels) if np.array_equal(level, side[i]))
            for side in (judged.first, judged.second)
        ]
        assert {texts[n] for n in sides} == {judged.captions[i]}
        seen += sides
    assert len(set(seen)) == 8  # nobody is in two pairs
    alone = judged_pairs(0, 9, "train", HPS_CROWD, (levels, texts))
    assert len(alone) == 4


def test_samples_that_do_not_fit_are_refused() -> None:
    images, texts = samples(2, 2)
    with pytest.raises(ValueError, match="split 'heldout'"):
        judged_pairs(1, 9, "heldout", HPS_CROWD, (images, texts))
    with pytest.raises(ValueError, match="one sample only"):
        judged_pairs(1, 9, "train", HPS_CROWD, (images[:3], texts[:3]))
    with pytest.raises(ValueError, match="4 captions for pictures"):
        judged_pairs(1, 9, "train", HPS_CROWD, (images[:3], texts))
    with pytest.raises(ValueError, match="no pairs"):
        judged_pairs(0, 9, "train", HPS_CROWD)
    with pytest.raises(ValueError, match="no pictures"):
        judged_ratings(0, 9, "train")


def test_rated_pictures_are_those_that_the_shipped_weights_learnt_from() -> None:
    """The recipe written out: every other render spoiled, one stream for all, ratings of draw 0."""
    rng = np.random.default_rng(np.random.Philox(key=31))
    images, rated = [], []
    for i in range(16):
        caption = random_caption(rng, "train")
        picture = render(random_scene(caption, rng))
        images.append(
            np.round((corrupt(picture, rng) if i % 2 else picture) * 255).astype(np.uint8)
        )
        rated.append(AESTHETIC_CROWD.opinion(taste(images[-1] / 255, caption)))
    extra, texts = samples(2, 1)
    judged = judged_ratings(16, 31, "train", samples=(extra, texts), draw=0)
    np.testing.assert_array_equal(judged.images[:16], np.stack(images))
    np.testing.assert_array_equal(judged.opinions[:16], rated)
    np.testing.assert_array_equal(judged.ratings, AESTHETIC_CROWD.rate(judged.opinions))
    assert judged.captions[16:] == texts
    own = judged_ratings(16, 31, "train", samples=(extra, texts))
    np.testing.assert_array_equal(own.opinions, judged.opinions)
    assert not np.array_equal(own.ratings, judged.ratings)
    assert all(parse_caption(text) for text in own.captions)


def test_many_raters_give_the_share_that_the_crowd_would() -> None:
    judged = judged_pairs(40, 5, "train", HPS_CROWD)
    assert np.array_equal(judged.votes(1), judged.preferred)
    share = judged.votes(400)
    expected = HPS_CROWD.preference(judged.opinion_first, judged.opinion_second)
    # 400 answers scatter by at most 0.025; four times that in 40 pairs is next to impossible.
    assert abs(share - expected).max() < 0.1
    assert len(set(share)) > 10
