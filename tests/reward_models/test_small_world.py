"""The small world: captions round trip, renders are read back exactly, faults are noticed."""

from __future__ import annotations

import numpy as np
import pytest

from reward_models.small_world import (
    AESTHETIC_CROWD,
    Caption,
    captions,
    change_one_attribute,
    parse_caption,
    random_caption,
    random_scene,
    read_scene,
    render,
    taste,
    verify,
)
from reward_models.small_world.corrupt import corrupt
from reward_models.small_world.grammar import is_heldout
from reward_models.small_world.render import coverage

SHAPES = ["circle", "square", "triangle", "cross"]


def pairs(count: int, seed: int = 0) -> list[tuple[Caption, np.ndarray]]:
    rng = np.random.default_rng(seed)
    drawn = [random_caption(rng) for _ in range(count)]
    return [(caption, render(random_scene(caption, rng))) for caption in drawn]


def test_captions_survive_text_and_parsing() -> None:
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = random_caption(rng)
        assert parse_caption(str(caption)) == caption
        assert parse_caption("  " + str(caption).upper().replace(" ", "  ")) == caption


@pytest.mark.parametrize(
    "text", ["", "a cat", "a large red circle", "a huge red circle at the top"]
)
def test_text_outside_the_language_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match="one reads 'a large red circle at the top left"):
        parse_caption(text)


def test_every_claim_holds_on_every_render() -> None:
    failures = [(str(c), verify(p, c).held) for c, p in pairs(1500) if not verify(p, c).strict]
    assert failures == []


def test_the_verifier_notices_exactly_one_changed_word() -> None:
    rng = np.random.default_rng(2)
    for caption, picture in pairs(300, seed=3):
        claims = verify(picture, change_one_attribute(caption, rng))
        assert sum(not held for held in claims.held.values()) == 1


def test_a_blank_and_a_noisy_picture_hold_almost_no_claims() -> None:
    text = "a large red circle above a small blue square on a white background"
    blank = verify(np.ones((3, 64, 64), np.float32), text)
    assert blank.held["background"] and sum(blank.held.values()) == 1
    noise = np.random.default_rng(0).random((3, 64, 64))
    assert not verify(noise, text).strict


@pytest.mark.parametrize("size", [32, 48, 96, 128])
def test_reading_does_not_depend_on_the_canvas_size(size: int) -> None:
    rng = np.random.default_rng(4)
    drawn = [random_caption(rng) for _ in range(100)]
    held = [verify(render(random_scene(c, rng), size), c).strict for c in drawn]
    assert np.mean(held) >= (0.9 if size < 64 else 1.0)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_of_one_radius_cover_the_same_area(shape: str) -> None:
    # Numeric integral of the antialiased coverage against pi r^2.
    area = coverage(shape, 50.0, 50.0, 15.0, 100, 100).sum()
    assert area == pytest.approx(np.pi * 15**2, rel=0.01)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_centroid_is_where_it_was_asked_for(shape: str) -> None:
    cover = coverage(shape, 40.3, 52.7, 12.0, 100, 100)
    places = np.arange(100) + 0.5
    assert (cover.sum(0) * places).sum() / cover.sum() == pytest.approx(40.3, abs=0.05)
    assert (cover.sum(1) * places).sum() / cover.sum() == pytest.approx(52.7, abs=0.05)


def test_captions_are_different_seeded_and_splits_never_meet() -> None:
    train, held = captions(400, 5, "train"), captions(300, 5, "heldout")
    assert len(set(train)) == 400 and len(set(held)) == 300
    assert not set(train) & set(held)
    assert captions(400, 5, "train") == train
    assert all(is_heldout(text) for text in held)


def test_changing_one_attribute_changes_one_word_of_the_language() -> None:
    rng = np.random.default_rng(6)
    for _ in range(200):
        caption = random_caption(rng)
        changed = change_one_attribute(caption, rng)
        before = str(caption).replace(" of", "").split()
        after = str(changed).replace(" of", "").split()
        assert sum(a != b for a, b in zip(before, after, strict=True)) == 1


def test_renders_are_neat_and_spoiling_them_lowers_taste() -> None:
    rng = np.random.default_rng(7)
    clean, spoiled = [], []
    for caption, picture in pairs(200, seed=8):
        clean.append(taste(picture, caption))
        spoiled.append(taste(corrupt(picture, rng), caption))
    assert min(t.neatness for t in clean) > 0.95
    assert all(t.claims == 1 for t in clean)
    assert np.mean([t.neatness for t in spoiled]) < 0.85
    lower = [s.total < c.total for s, c in zip(spoiled, clean, strict=True)]
    assert np.mean(lower) > 0.9


def test_taste_prefers_the_deep_shade_of_a_colour_word() -> None:
    from reward_models.small_world.grammar import COLOURS
    from reward_models.small_world.render import Drawn, Scene, shade

    text = "a large blue circle at the middle center on a white background"
    scores = []
    for pale in (0.0, 0.15, 0.3):
        rgb = shade(COLOURS["blue"], 0.0, pale)
        scene = Scene((Drawn("circle", 32, 32, 10, rgb),), (0.97, 0.97, 0.96))
        scores.append(taste(render(scene), text).palette)
    assert scores[0] > 0.99
    assert scores == sorted(scores, reverse=True)


def test_an_empty_canvas_is_not_tasteful() -> None:
    empty = taste(
        np.full((3, 64, 64), 0.97), "a large blue circle at the middle center on a white background"
    )
    assert empty.neatness == 0 and empty.palette == 0


def test_the_crowd_rates_from_1_to_10_with_its_own_noise() -> None:
    opinions = np.linspace(1, 10, 5000)
    ratings = AESTHETIC_CROWD.rate(opinions)
    assert ratings.min() >= 1 and ratings.max() <= 10
    middle = (opinions > 4) & (opinions < 7)
    assert (ratings - opinions)[middle].std() == pytest.approx(AESTHETIC_CROWD.noise, rel=0.08)
    assert np.array_equal(ratings, AESTHETIC_CROWD.rate(opinions))


@pytest.mark.parametrize("shape", [(64, 64), (1, 64, 64), (2, 3, 64, 64)])
def test_malformed_pictures_are_refused_by_shape(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        read_scene(np.zeros(shape))


def test_nan_pixels_are_refused() -> None:
    with pytest.raises(ValueError, match="NaN"):
        read_scene(np.full((3, 64, 64), np.nan))
