"""The contact sheet: the right pictures in the right places, labels that fit."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFont

from reward_models.base import RewardError
from reward_models.rows import ScoredFile
from reward_models.sheet import (
    best_and_worst,
    check_sheet,
    draw_sheet,
    ellipsis,
    short_path,
    wrapped,
)

FONT = ImageFont.load_default(size=14)

# Colours that the sheet itself does not use, far from each other.
COLOURS = [(255, 0, 0), (0, 0, 255), (255, 255, 0), (255, 0, 255), (0, 255, 255)]


@pytest.fixture
def rows(tmp_path: Path) -> list[ScoredFile]:
    """Five pictures of one colour each, scored 0..4; two without a score."""
    found = []
    for index, colour in enumerate(COLOURS):
        path = tmp_path / f"{index}.png"
        Image.new("RGB", (40, 20), colour).save(path)
        found.append(ScoredFile(str(path), f"prompt {index}", {"a": float(index), "b": None}))
    gone = ScoredFile(str(tmp_path / "gone.png"), "", {"a": None, "b": None}, "no such file")
    return [gone, *found, gone]


def places(sheet: Path) -> list[tuple[int, int, int]]:
    """(top, left, which colour) of every picture on a sheet, line by line."""
    with Image.open(sheet) as image:
        pixels = np.asarray(image.convert("RGB"))
    found = []
    for index, colour in enumerate(COLOURS):
        ys, xs = np.nonzero((pixels == colour).all(axis=-1))
        if len(ys):
            found.append((int(ys.min()), int(xs.min()), index))
    return sorted(found)


def test_the_best_stand_above_the_worst_in_order(tmp_path: Path, rows: list[ScoredFile]) -> None:
    draw_sheet(rows, ["a"], tmp_path / "s.png", count=2)
    (y1, x1, best), (y2, x2, second), (y3, x3, worst), (y4, x4, last) = places(tmp_path / "s.png")
    assert [best, second, worst, last] == [4, 3, 0, 1]
    assert y1 == y2 < y3 == y4 and x1 == x3 < x2 == x4


def test_the_format_follows_the_ending(tmp_path: Path, rows: list[ScoredFile]) -> None:
    draw_sheet(rows, ["a"], tmp_path / "s.JPG", count=1)
    assert Image.open(tmp_path / "s.JPG").format == "JPEG"


def test_with_few_scores_none_is_shown_twice(tmp_path: Path, rows: list[ScoredFile]) -> None:
    draw_sheet(rows, ["a"], tmp_path / "s.png", count=50)
    assert [index for _, _, index in places(tmp_path / "s.png")] == [4, 3, 2, 0, 1]
    draw_sheet(rows[:2], ["a"], tmp_path / "s.png")
    assert [index for _, _, index in places(tmp_path / "s.png")] == [0]


def test_every_reward_with_scores_has_a_block(tmp_path: Path, rows: list[ScoredFile]) -> None:
    both = [ScoredFile(r.path, r.prompt, {**r.scores, "c": r.scores["a"]}, r.error) for r in rows]
    heights = []
    for names in (["a"], ["a", "b"], ["a", "c"]):
        draw_sheet(both, names, tmp_path / "s.png", count=2)
        heights.append(Image.open(tmp_path / "s.png").height)
    assert heights[0] == heights[1] and heights[2] > 1.8 * heights[0]
    with pytest.raises(RewardError, match="nothing has a score"):
        draw_sheet(both, ["b"], tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_picture_that_is_gone_leaves_its_place(tmp_path: Path, rows: list[ScoredFile]) -> None:
    Path(rows[5].path).unlink()
    draw_sheet(rows, ["a"], tmp_path / "s.png", count=2)
    assert [index for _, _, index in places(tmp_path / "s.png")] == [3, 0, 1]


def test_prompts_of_any_kind_are_drawn(tmp_path: Path, rows: list[ScoredFile]) -> None:
    prompts = ["x" * 5000, "word " * 3000, "猫 \u2028\udcff\x00", "", "\n\t "]
    odd = [ScoredFile(r.path, p, r.scores) for r, p in zip(rows[1:6], prompts, strict=True)]
    draw_sheet(odd, ["a"], tmp_path / "s.png", count=2)
    assert len(places(tmp_path / "s.png")) == 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.integers(-3, 3).map(float)), max_size=12), st.integers(1, 8)
)
def test_best_and_worst_are_the_ends_of_the_order(values: list[float | None], count: int) -> None:
    table = [ScoredFile(str(index), "", {"a": value}) for index, value in enumerate(values)]
    best, worst = best_and_worst(table, "a", count)
    known = sorted(value for value in values if value is not None)
    assert [value for value, _ in best] == known[::-1][: len(best)]
    assert [value for value, _ in worst] == known[: len(worst)]
    assert len(best) + len(worst) == min(2 * count, len(known))
    assert len(best) - len(worst) in (0, 1)
    assert len({row.path for _, row in best + worst}) == len(best) + len(worst)


@settings(max_examples=60, deadline=None)
@given(st.text(st.characters(codec="utf-8"), max_size=60), st.integers(40, 300))
def test_labels_fit_their_room(text: str, room: int) -> None:
    cut = ellipsis(text, FONT, room)
    assert FONT.getlength(cut) <= room
    assert cut == text or (cut.endswith("…") and text.startswith(cut[:-1]))
    lines = wrapped(text, FONT, room, lines=3)
    assert len(lines) <= 3 and all(FONT.getlength(line) <= room for line in lines)
    if lines and not any("…" in line for line in lines):
        assert " ".join(lines).split() == text.split()


def test_the_end_of_a_path_is_kept() -> None:
    path = "/home/somebody/pictures/cats/0001.png"
    assert short_path(path, FONT, 1000) == path
    assert short_path(path, FONT, 120) == "cats/0001.png"
    cut = short_path("/home/" + "x" * 50 + "0001.png", FONT, 120)
    assert cut.startswith("…") and cut.endswith("0001.png") and FONT.getlength(cut) <= 120


@pytest.mark.parametrize("name", ["sheet.gif", "sheet", "sheet.pdf"])
def test_an_unknown_format_is_refused(name: str) -> None:
    with pytest.raises(RewardError, match="a sheet is not written as") as caught:
        check_sheet(Path(name))
    assert ".png" in str(caught.value)
