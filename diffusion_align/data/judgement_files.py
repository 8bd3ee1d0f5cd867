"""Reading judgements from files: pairs and ratings as JSONL, JSON or CSV.

Pairs come in these layouts (other keys are ignored):

    {"prompt", "chosen", "rejected"}                    chosen is preferred for "overall"
    {"prompt", "first", "second", "preferred"}          number | "first" | "second" | "tie" | null
                                                        | {attribute: any of these}
    {"prompt", "file_path": [..], "human_preference"}   HPD v2's train.json
    {"prompt", "image_path": [..], "rank": [..]}        HPD v2's test.json; rank 1 is best

and ratings as {"path", "prompt"?, "rating": number | {attribute: number}}. A row may carry a
"weight". In CSV (of the first two layouts, and ratings) an attribute has its own column,
`preferred.NAME` or `rating.NAME`; an empty cell (in JSON null) is unlabelled. Pictures lie below
the file's folder, or below `folder`.

Every problem of a file is reported at once, with its line.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from diffusion_align.data.judgement_layouts import Place, Row, pairs_of, ratings_of
from diffusion_align.data.judgements import Judgements, Pair, Rating
from diffusion_align.data.prompts import SHOWN_PROBLEMS, decode_text, kind_of
from diffusion_align.errors import UserError

# What to do about rows that cannot be used: refuse the file, or go on without them and say so.
Unusable = Literal["refuse", "skip"]

AnyRow = TypeVar("AnyRow", bound=Pair | Rating)

# Columns of a CSV file that hold labels, alone or as `column.attribute`.
_LABELS = ("preferred", "rating")


@dataclass(frozen=True)
class RawRow:
    """A decoded row, or the error that stands in its place; `item` counts those of a JSON list."""

    line: int
    value: Any
    item: int = 0


@dataclass(frozen=True)
class Damage:
    """What is wrong with a row."""

    line: int
    what: str


def read_pairs(
    path: str | Path,
    *,
    folder: str | Path | None = None,
    missing: Unusable = "refuse",
    damaged: Unusable = "refuse",
) -> Judgements:
    """Preferences between two pictures, from a `.jsonl`, `.json` or `.csv` file.

    A row with k > 2 files makes several pairs: the preferred file with each other one (of those
    nothing is known), or of a rank every two files (equal ranks are a tie). Each counts fully, as
    in ImageReward; give "weight" for another share.

    Args:
        path: the file.
        folder: where relative paths of pictures start; default the file's own folder.
        missing: what to do with rows whose picture files are not there.
        damaged: what to do with rows that are malformed.

    Returns:
        Judgements of kind "pairs" whose `notes` say how many rows were skipped and why.

    Raises:
        UserError: no such file, malformed rows (all of them, with their lines), picture files that
            are not there (together, with their number), or nothing left.
    """
    return _read(path, folder, pairs_of, missing, damaged)


def read_ratings(
    path: str | Path,
    *,
    folder: str | Path | None = None,
    missing: Unusable = "refuse",
    damaged: Unusable = "refuse",
) -> Judgements:
    """Ratings of single pictures, from a `.jsonl`, `.json` or `.csv` file; see `read_pairs`."""
    return _read(path, folder, ratings_of, missing, damaged)


def gather(
    rows: Sequence[AnyRow],
    damage: Sequence[Damage],
    *,
    where: str,
    missing: Unusable = "refuse",
    damaged: Unusable = "refuse",
) -> Judgements:
    """Judgements of what a reader found, or one error that names every problem.

    Args:
        rows: the sound rows.
        damage: what is wrong with the others.
        where: the file.
        missing, damaged: as in `read_pairs`.
    """
    for name, choice in (("missing", missing), ("damaged", damaged)):
        if choice not in get_args(Unusable):
            raise UserError(f"{name} is {choice!r}", fix="write refuse or skip")
    notes = []
    if damage:
        first = min(item.line for item in damage)
        if damaged == "refuse":
            lines = _shown([f"line {item.line}: {item.what}" for item in damage])
            raise UserError(f"damaged rows ({len(damage)})", where=f"{where}:{first}", fix=lines)
        notes.append(f"left out {len(damage)} damaged rows of {where}, the first on line {first}")
    pictures = dict.fromkeys(p for row in rows for p in row.pictures if isinstance(p, Path))
    # os.path answers False where pathlib raises: names that are too long.
    absent = {picture for picture in pictures if not os.path.isfile(picture)}
    if absent:
        if missing == "refuse":
            names = _shown([str(picture) for picture in pictures if picture in absent], 5)
            raise UserError(
                f"{len(absent)} of {len(pictures)} picture files are not there",
                where=where,
                fix=f"{names}\ncheck the folder, or go on without their rows: missing=skip",
            )
        kept = [row for row in rows if not any(picture in absent for picture in row.pictures)]
        notes.append(
            f"left out {len(rows) - len(kept)} of {len(rows)} judgements of {where}: "
            f"{len(absent)} picture files are not there"
        )
        rows = kept
    if not rows:
        raise UserError("there is no judgement in it", where=where, fix="\n".join(notes))
    return Judgements.of(rows, notes)


def _read(
    path: str | Path,
    folder: str | Path | None,
    rows_of: Callable[[Row, Place, str], list[AnyRow]],
    missing: Unusable,
    damaged: Unusable,
) -> Judgements:
    source = Path(path).expanduser()
    base = source.parent if folder is None else Path(folder).expanduser()
    rows: list[AnyRow] = []
    damage: list[Damage] = []
    for raw in _raw_rows(source):
        try:
            if isinstance(raw.value, UserError):
                raise raw.value
            if not isinstance(raw.value, dict):
                raise UserError(f"expected an object, found {kind_of(raw.value)}")
            rows += rows_of(raw.value, lambda name: base / name, f"{source}:{raw.line}")
        except UserError as fault:
            item = f"item {raw.item}: " if raw.item else ""
            damage.append(Damage(raw.line, item + "; ".join([fault.what, *fault.fix.splitlines()])))
    return gather(rows, damage, where=str(source), missing=missing, damaged=damaged)


def _raw_rows(path: Path) -> Iterator[RawRow]:
    """The rows of a `.jsonl`, `.json` (a list, or lines) or `.csv` file.

    Raises UserError where the file is missing, of another kind, or not UTF-8.
    """
    if not path.is_file():
        what = "this is a folder, not a file" if path.is_dir() else "no such file"
        raise UserError(what, where=str(path))
    readers = {".jsonl": _json_lines, ".json": _json_list, ".csv": _csv_rows}
    if path.suffix.lower() not in readers:
        raise UserError(
            f"judgements are read from .jsonl, .json or .csv, not {path.suffix or 'nothing'!r}",
            where=str(path),
        )
    return readers[path.suffix.lower()](decode_text(path.read_bytes(), str(path)))


def _json_lines(text: str) -> Iterator[RawRow]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield RawRow(number, _json(line))


def _json_list(text: str) -> Iterator[RawRow]:
    """The items of one JSON list, each with its line; a damaged list has no items."""
    if not text.lstrip().startswith("["):
        yield from _json_lines(text)
        return
    try:
        json.loads(text)
    except json.JSONDecodeError as error:
        yield RawRow(error.lineno, UserError(f"not JSON: {error.msg} at column {error.colno}"))
        return
    except (RecursionError, ValueError) as error:
        yield RawRow(1, UserError(f"not readable as JSON: {error}"))
        return
    # The list is sound; decoding it item by item tells where each one starts.
    decoder, position, line, item = json.JSONDecoder(), text.index("[") + 1, 1, 0
    line += text.count("\n", 0, position)
    while True:
        start = position
        while text[position] in ", \t\n":
            position += 1
        line += text.count("\n", start, position)
        if text[position] == "]":
            return
        value, end = decoder.raw_decode(text, position)
        item += 1
        yield RawRow(line, value, item)
        line += text.count("\n", position, end)
        position = end


def _json(text: str) -> Any:
    """One JSON value, or the UserError that says why it is none."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        return UserError(f"not JSON: {error.msg} at column {error.colno}")
    except (RecursionError, ValueError) as error:
        return UserError(f"not readable as JSON: {error}")


def _csv_rows(text: str) -> Iterator[RawRow]:
    """Rows of a CSV file as JSON would give them: `name.attribute` columns become one mapping."""
    reader = csv.reader(io.StringIO(text), strict=True)
    line = 1
    try:
        header = [name.strip() for name in next(reader, [])]
        if fault := _header_fault(header):
            yield RawRow(1, UserError(fault))
            return
        line = reader.line_num + 1
        for cells in reader:
            if cells and len(cells) != len(header):
                what = f"{len(cells)} cells under {len(header)} columns"
                yield RawRow(line, UserError(what))
            elif cells:
                yield RawRow(line, _csv_row(dict(zip(header, cells, strict=True))))
            line = reader.line_num + 1
    except csv.Error as fault_of_csv:
        yield RawRow(line, UserError(f"not CSV: {fault_of_csv}"))


def _header_fault(header: Sequence[str]) -> str:
    if len(set(header)) != len(header):
        return f"two columns have one name: {', '.join(header)}"
    for key in _LABELS:
        parts = [name for name in header if name.startswith(f"{key}.")]
        if key in header and parts:
            return f"a file has the column {key!r} or columns such as {parts[0]!r}, not both"
    return ""


def _csv_row(cells: Mapping[str, str]) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for name, cell in cells.items():
        key, dot, attribute = name.partition(".")
        if key in _LABELS and dot:
            row.setdefault(key, {})[attribute] = _csv_value(cell)
        elif key in _LABELS:
            row[key] = _csv_value(cell)
        elif name == "weight":
            # An empty weight is none; an empty label is unlabelled.
            row.update({} if not cell.strip() else {name: _csv_value(cell)})
        else:
            row[name] = cell
    return row


def _csv_value(cell: str) -> Any:
    """A number where the cell reads as one, None where it is empty, else its text."""
    cell = cell.strip()
    try:
        return float(cell) if cell else None
    except ValueError:
        return cell


def _shown(lines: Sequence[str], most: int = SHOWN_PROBLEMS) -> str:
    more = [f"... and {len(lines) - most} more"] if len(lines) > most else []
    return "\n".join([*lines[:most], *more])
