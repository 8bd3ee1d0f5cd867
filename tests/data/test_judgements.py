"""Rows of judgements: what is refused, what the tensors hold, and splits that share nothing."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from diffusion_align.data.judgements import (
    Judgements,
    Pair,
    Rating,
    small_world_judgements,
)
from diffusion_align.errors import UserError
from reward_models.base import RewardError
from reward_models.small_world import HPS_CROWD, judged_pairs
from reward_models.small_world.grammar import is_heldout

A, B, C = Path("a.png"), Path("b.png"), Path("c.png")


def pair(prompt: str = "x", first: Path = A, second: Path = B, **preferred: float) -> Pair:
    return Pair(prompt, first, second, preferred or {"overall": 1.0})


def test_labels_are_nan_where_an_attribute_is_not_named_and_the_mask_says_so() -> None:
    rows = [pair(beauty=1.0), pair(truth=0.25, beauty=0.5), pair(truth=0.0)]
    judgements = Judgements.of(rows)
    assert judgements.attributes == ("beauty", "truth")
    expected = [[1.0, math.nan], [0.5, 0.25], [math.nan, 0.0]]
    np.testing.assert_array_equal(judgements.labels().numpy(), np.array(expected, np.float32))
    assert judgements.mask().tolist() == [[True, False], [True, True], [False, True]]
    assert judgements.labels().dtype == torch.float32
    assert judgements.pick([2]).mask().tolist() == [[False, True]]


def test_weights_prompts_and_length_follow_the_rows() -> None:
    rows = [Rating("p", A, {"overall": 3.0}), Rating("", B, {"overall": 4.5}, weight=0.25)]
    judgements = Judgements.of(rows)
    assert judgements.kind == "ratings" and len(judgements) == 2
    assert judgements.prompts == ["p", ""]
    assert judgements.weights().tolist() == [1.0, 0.25]


@pytest.mark.parametrize("value", [-0.01, 1.01, math.nan, math.inf])
def test_a_preference_out_of_range_is_refused_with_its_line(value: float) -> None:
    with pytest.raises(UserError, match=r"^f.jsonl:3: the preference for 'overall'"):
        Pair("p", A, B, {"overall": value}, where="f.jsonl:3")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_rating_that_is_no_number_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"^r.csv:2: the rating of 'overall'"):
        Rating("p", A, {"overall": value}, where="r.csv:2")


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_is_above_zero_and_finite(weight: float) -> None:
    with pytest.raises(UserError, match="weight"):
        Pair("p", A, B, {"overall": 1.0}, weight)


def test_a_picture_is_not_compared_with_itself() -> None:
    pixels = np.zeros((3, 4, 4), np.uint8)
    for first, second in ((A, Path("a.png")), (pixels, pixels)):
        with pytest.raises(UserError, match="with itself"):
            Pair("p", first, second, {"overall": 1.0})


@pytest.mark.parametrize(
    "pixels",
    [np.zeros((4, 4, 3), np.uint8), np.zeros((3, 4, 4), np.float32), torch.zeros(3, 4, 4)],
)
def test_pixels_that_are_not_uint8_planes_are_refused(pixels: np.ndarray) -> None:
    with pytest.raises(UserError, match="uint8"):
        Rating("p", pixels, {"overall": 1.0})


def test_empty_sets_unlabelled_rows_and_mixed_kinds_are_refused() -> None:
    with pytest.raises(UserError, match="no judgements"):
        Judgements.of([])
    with pytest.raises(UserError, match="no attribute is labelled"):
        Pair("p", A, B, {})
    with pytest.raises(UserError, match="Pair rows only"):
        Judgements.of([pair(), Rating("p", A, {"overall": 1.0})])
    with pytest.raises(UserError, match="did you mean 'beauty'"):
        Judgements("pairs", (pair(beuty=1.0),), ("beauty",))


def test_load_pixels_gives_the_first_ones_then_the_second_ones(tmp_path: Path) -> None:
    Image.new("RGB", (5, 4), (255, 0, 0)).save(tmp_path / "red.png")
    blue = torch.zeros(3, 2, 2, dtype=torch.uint8)
    blue[2] = 51
    green = np.zeros((3, 3, 3), np.uint8)
    green[1] = 255
    rows = [
        Pair("p", tmp_path / "red.png", blue, {"overall": 1.0}),
        Pair("q", green, tmp_path / "red.png", {"overall": 1.0}),
    ]
    loaded = Judgements.of(rows).load_pixels(torch.tensor([1, 0]))
    assert [tuple(pixels.shape) for pixels in loaded] == [
        *((3, 3, 3), (3, 4, 5)),
        *((3, 4, 5), (3, 2, 2)),
    ]
    assert all(pixels.dtype == torch.float32 for pixels in loaded)
    assert [pixels.mean((1, 2)).tolist() for pixels in loaded] == [
        *([0, 1, 0], [1, 0, 0]),
        *([1, 0, 0], pytest.approx([0, 0, 0.2])),
    ]
    with pytest.raises(RewardError, match=r"gone\.png"):
        Judgements.of([Rating("p", tmp_path / "gone.png", {"overall": 1.0})]).load_pixels([0])


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 12), st.integers(0, 30), st.integers(31, 60)), min_size=1),
    st.floats(0.05, 0.95),
    st.integers(0, 5),
)
def test_no_prompt_and_no_picture_is_on_both_sides(
    spec: list[tuple[int, int, int]], share: float, seed: int
) -> None:
    # Prompt 0 is the empty one, which ties nothing together.
    rows = [
        pair(f"prompt {p}" if p else "", Path(f"{a}.png"), Path(f"{b}.png")) for p, a, b in spec
    ]
    judgements = Judgements.of(rows)
    try:
        train, held = judgements.split(share, seed)
    except UserError as error:
        assert "share a prompt or a picture" in str(error)
        return
    assert len(train) and len(held) and len(train) + len(held) == len(rows)
    assert sorted(map(id, train.rows + held.rows)) == sorted(map(id, rows))
    sides = [
        {row.prompt for row in side.rows if row.prompt}
        | {p for row in side.rows for p in row.pictures}
        for side in (train, held)
    ]
    assert not sides[0] & sides[1]
    again = judgements.split(share, seed)
    assert [s.rows for s in again] == [train.rows, held.rows]


def test_a_split_of_many_prompts_comes_near_the_share_and_hangs_on_the_seed() -> None:
    rows = [pair(str(n % 100), Path(f"{n}.png"), Path(f"{n}b.png")) for n in range(1000)]
    train, held = Judgements.of(rows).split(0.2, seed=1)
    assert len(held) == 200 and train.attributes == held.attributes
    other = Judgements.of(rows).split(0.2, seed=2)[1]
    assert {row.prompt for row in held.rows} != {row.prompt for row in other.rows}
    # Ratings without prompts are split by picture: two ratings of one stay together.
    ratings = [Rating("", Path(f"{n % 50}.png"), {"overall": 1.0}) for n in range(100)]
    left, right = Judgements.of(ratings).split(0.3, seed=0)
    assert len(right) == 30
    pictures = [{row.pictures for row in side.rows} for side in (left, right)]
    assert not pictures[0] & pictures[1]


def test_a_split_that_cannot_be_made_is_refused() -> None:
    rows = [pair("one", A, B), pair("one", B, C)]
    with pytest.raises(UserError, match="cannot be split"):
        Judgements.of(rows).split(0.5, seed=0)
    for share in (0.0, 1.0, math.nan):
        with pytest.raises(UserError, match="share"):
            Judgements.of(rows).split(share, seed=0)


def test_small_world_judgements_are_what_the_crowd_said() -> None:
    judged = judged_pairs(6, 3, "heldout", HPS_CROWD)
    judgements = small_world_judgements("hps", 6, 3, "heldout")
    assert judgements.kind == "pairs" and judgements.attributes == ("overall",)
    assert judgements.prompts == judged.captions and all(map(is_heldout, judgements.prompts))
    assert judgements.labels()[:, 0].tolist() == judged.preferred.astype(float).tolist()
    pixels = torch.stack(judgements.load_pixels(range(6))).numpy()
    np.testing.assert_allclose(pixels[:6] * 255, judged.first, atol=1e-4)
    np.testing.assert_allclose(pixels[6:] * 255, judged.second, atol=1e-4)


def test_the_crowds_judge_different_pictures_and_beauty_is_rated() -> None:
    hps, mps = (small_world_judgements(name, 3, 3, "train") for name in ("hps", "mps"))
    assert not set(hps.prompts) & set(mps.prompts)
    rated = small_world_judgements("aesthetic", 5, 3, "train")
    assert rated.kind == "ratings"
    assert ((rated.labels() >= 1) & (rated.labels() <= 10)).all()
    with pytest.raises(UserError, match="did you mean hps"):
        small_world_judgements("hsp", 3, 3, "train")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="1 or more"):
        small_world_judgements("hps", 0, 3, "train")
