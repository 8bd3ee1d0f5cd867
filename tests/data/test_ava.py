"""AVA.txt: means and deviations of vote counts, on lines made by hand."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusion_align.data.ava import parse_votes, read_ava
from diffusion_align.errors import UserError

Write = Callable[..., Path]


def line(counts: list[int], image: int = 7, number: int = 1) -> str:
    return " ".join(map(str, [number, image, *counts, 1, 22, 1396]))


FOUR = line([0, 0, 1, 2, 1, 0, 0, 0, 0, 0], image=7)  # by hand: mean 4, deviation sqrt(1/2)
ENDS = line([3, 0, 0, 0, 0, 0, 0, 0, 0, 1], image=8)  # by hand: mean 13/4, deviation sqrt(243)/4


@pytest.fixture
def ava(tmp_path: Path) -> Write:
    for image in (7, 8):
        (tmp_path / f"{image}.jpg").write_bytes(b"")

    def write(*lines: str) -> Path:
        path = tmp_path / "AVA.txt"
        path.write_text("\n".join(lines) + "\n")
        return path

    return write


def test_the_mean_and_deviation_are_those_worked_out_by_hand() -> None:
    assert parse_votes(FOUR).mean == 4.0
    assert parse_votes(FOUR).deviation == pytest.approx(0.5**0.5)
    assert parse_votes(ENDS).mean == 3.25
    assert parse_votes(ENDS).deviation == pytest.approx(243**0.5 / 4)


@given(st.lists(st.integers(0, 300), min_size=10, max_size=10).filter(any))
def test_they_are_those_of_the_single_votes(counts: list[int]) -> None:
    votes = np.repeat(np.arange(1, 11), counts)
    parsed = parse_votes(line(counts, image=123))
    assert parsed.image == 123
    assert parsed.mean == pytest.approx(votes.mean())
    assert parsed.deviation == pytest.approx(votes.std(), abs=1e-9)


def test_the_file_becomes_ratings_of_its_pictures(ava: Write, tmp_path: Path) -> None:
    read = read_ava(ava(FOUR, "", ENDS), tmp_path)
    assert read.kind == "ratings" and read.attributes == ("overall",)
    assert read.labels().tolist() == [[4.0], [3.25]]
    assert [row.pictures for row in read.rows] == [(tmp_path / "7.jpg",), (tmp_path / "8.jpg",)]
    assert read.rows[1].where == f"{tmp_path / 'AVA.txt'}:3"


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (FOUR + " 9", "16 fields instead of 15"),
        (FOUR.rsplit(" ", 1)[0], "14 fields instead of 15"),
        (FOUR.replace(" 2 ", " two ", 1), "'two' is not a whole number"),
        (FOUR.replace(" 2 ", " -2 ", 1), "'-2' is not a whole number"),
        (FOUR.replace(" 2 ", " 2.5 ", 1), "'2.5' is not a whole number"),
        (line([0] * 10, image=9), "nobody voted on image 9"),
        (ENDS, "image 8 is on line 1 already"),
    ],
)
def test_a_damaged_line_is_named(ava: Write, tmp_path: Path, bad: str, message: str) -> None:
    path = ava(ENDS, bad)
    with pytest.raises(UserError) as caught:
        read_ava(path, tmp_path)
    assert str(caught.value).startswith(f"{path}:2: damaged rows (1)\n    line 2: ")
    assert message in str(caught.value)
    assert len(read_ava(path, tmp_path, damaged="skip")) == 1


def test_missing_pictures_are_counted(ava: Write, tmp_path: Path) -> None:
    path = ava(FOUR, ENDS, line([1] * 10, image=9))
    with pytest.raises(UserError, match="1 of 3 picture files are not there"):
        read_ava(path, tmp_path)
    read = read_ava(path, tmp_path, missing="skip")
    assert len(read) == 2 and "left out 1 of 3" in read.notes[0]
    with pytest.raises(UserError, match="no such file"):
        read_ava(tmp_path / "AVA", tmp_path)
