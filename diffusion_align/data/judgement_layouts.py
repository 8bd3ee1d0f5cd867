"""How a row of a file says which picture was preferred, or how one was rated.

The layouts are told by their keys (`LAYOUTS`; other keys of a row are ignored); `judgement_files`
finds the rows. A layout of another data set is one more entry.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from diffusion_align.data.judgements import OVERALL, Pair, Rating
from diffusion_align.data.prompts import kind_of
from diffusion_align.errors import UserError, did_you_mean

WORDS: Mapping[str, float] = {"first": 1.0, "second": 0.0, "tie": 0.5}

Row = Mapping[str, Any]
Place = Callable[[str], Path]


@dataclass(frozen=True)
class Layout:
    """A way to write pairs: the keys that tell it, and how a row becomes pairs."""

    keys: tuple[str, ...]
    pairs: Callable[[Row, Place, str], list[Pair]]


def _chosen(row: Row, place: Place, where: str) -> list[Pair]:
    chosen, rejected = (place(_text(row, key)) for key in ("chosen", "rejected"))
    return [Pair(_prompt(row), chosen, rejected, {OVERALL: 1.0}, _weight(row), where)]


def _first_second(row: Row, place: Place, where: str) -> list[Pair]:
    preferred = _labels(row, "preferred", _preference)
    first, second = (place(_text(row, key)) for key in ("first", "second"))
    return [Pair(_prompt(row), first, second, preferred, _weight(row), where)]


def _human_preference(row: Row, place: Place, where: str) -> list[Pair]:
    """One of the files is preferred: a list with 1 in its place (HPD v2), or its number from 0."""
    files, given = _files(row, "file_path", place), row["human_preference"]
    if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < len(files):
        given = [float(i == given) for i in range(len(files))]
    votes = _numbers(given, "human_preference", len(files))
    if min(votes) < 0 or abs(sum(votes) - 1) > 1e-6:
        raise UserError(f"'human_preference' must be shares that add up to 1, not {given}")
    if len(files) == 2:
        first, second = files
        return [Pair(_prompt(row), first, second, {OVERALL: votes[0]}, _weight(row), where)]
    if max(votes) != 1:
        raise UserError(f"of {len(files)} files exactly one must be preferred, not {given}")
    best = votes.index(1)
    others = [file for index, file in enumerate(files) if index != best]
    return [
        Pair(_prompt(row), files[best], other, {OVERALL: 1.0}, _weight(row), where)
        for other in others
    ]


def _rank(row: Row, place: Place, where: str) -> list[Pair]:
    """Every two of the files; the lower rank is preferred (HPD v2's test set)."""
    files = _files(row, "image_path", place)
    ranked = list(zip(files, _numbers(row["rank"], "rank", len(files)), strict=True))
    return [
        Pair(_prompt(row), a, b, {OVERALL: 0.5 + 0.5 * ((i < j) - (i > j))}, _weight(row), where)
        for (a, i), (b, j) in combinations(ranked, 2)
    ]


# Tried in this order. Layouts of other data sets are added here.
LAYOUTS: tuple[Layout, ...] = (
    Layout(("prompt", "chosen", "rejected"), _chosen),
    Layout(("prompt", "first", "second", "preferred"), _first_second),
    Layout(("prompt", "file_path", "human_preference"), _human_preference),
    Layout(("prompt", "image_path", "rank"), _rank),
)


def pairs_of(row: Row, place: Place, where: str) -> list[Pair]:
    """The pairs of one row.

    Args:
        row: decoded; place: from a path as written to a file; where: "file:line", for messages.

    Raises:
        UserError: what is wrong with the row.
    """
    for layout in LAYOUTS:
        if all(key in row for key in layout.keys):
            return layout.pairs(row, place, where)
    # The layout that the row comes nearest to tells which keys it lacks.
    nearest = max(LAYOUTS, key=lambda layout: sum(key in row for key in layout.keys))
    raise _lacking(row, nearest.keys)


def ratings_of(row: Row, place: Place, where: str) -> list[Rating]:
    """The rating of one row; see `pairs_of`."""
    if not {"path", "rating"} <= set(row):
        raise _lacking(row, ("path", "rating"))
    prompt = "" if row.get("prompt") is None else _prompt(row)
    ratings = _labels(row, "rating", _rating)
    return [Rating(prompt, place(_text(row, "path")), ratings, _weight(row), where)]


def _lacking(row: Row, keys: Sequence[str]) -> UserError:
    lacks = [key for key in keys if key not in row]
    near = did_you_mean(lacks[0], row)
    hint = f"; did you mean it by {near!r} ?" if near else ""
    return UserError(f"no key {lacks[0]!r} (a row has {', '.join(keys)}){hint}")


def _labels(row: Row, key: str, label: Callable[[Any], float]) -> dict[str, float]:
    """Attribute -> label of a value that is one label, or an object of them; null is unlabelled."""
    given = row[key] if isinstance(row[key], dict) else {OVERALL: row[key]}
    return {name: label(value) for name, value in given.items() if value is not None}


def _preference(value: Any) -> float:
    if isinstance(value, str):
        word = value.strip().lower()
        if word in WORDS:
            return WORDS[word]
        near = did_you_mean(word, WORDS)
        hint = f"; did you mean {near!r} ?" if near else ""
        raise UserError(f"'preferred' is {value!r}, not a number or {', '.join(WORDS)}{hint}")
    return _number(value, "'preferred' must be a number, first, second or tie")


def _rating(value: Any) -> float:
    return _number(value, "'rating' must be a number")


def _weight(row: Row) -> float:
    return _number(row.get("weight", 1.0), "'weight' must be a number")


def _number(value: Any, expected: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{expected}, not {kind_of(value)}")
    try:
        return float(value)
    except OverflowError:
        raise UserError(f"{expected}; this one has {len(str(value))} digits") from None


def _prompt(row: Row) -> str:
    if not isinstance(row["prompt"], str):
        raise UserError(f"'prompt' must be text, found {kind_of(row['prompt'])}")
    prompt = row["prompt"].strip()
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("'prompt' contains half of a character (a lone surrogate)")
    return prompt


def _text(row: Row, key: str) -> str:
    if not isinstance(row[key], str) or not row[key].strip():
        raise UserError(f"{key!r} must be the path of a picture")
    return row[key].strip()


def _files(row: Row, key: str, place: Place) -> list[Path]:
    names = row[key]
    if not isinstance(names, list) or len(names) < 2:
        raise UserError(f"{key!r} must be a list of at least two paths")
    return [place(_text({key: name}, key)) for name in names]


def _numbers(values: Any, key: str, count: int) -> list[float]:
    expected = f"{key!r} must be {count} numbers, one for each file"
    if not isinstance(values, list) or len(values) != count:
        raise UserError(expected)
    numbers = [_number(value, expected) for value in values]
    if not all(math.isfinite(number) for number in numbers):
        raise UserError(expected)
    return numbers
