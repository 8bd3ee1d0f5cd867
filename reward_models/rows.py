"""The file of scores: one row per picture or clip, continued and mended but never guessed at.

JSON lines grow as the work goes on. A table (.csv, .parquet) cannot: until the work is done its new
rows stand in a journal of JSON lines beside it, from which an interrupted run goes on; then the
table is written whole and the journal goes. Only a file whose every row is one of the same rewards
is touched. A last line without its newline is what a killed run leaves; it goes only where it
cannot be anything else. What rows do not show of how they were made stands in a record beside them
(`result_record`), and a result is not continued in another way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from reward_models.base import RewardError
from reward_models.result_record import FIX as _FIX
from reward_models.result_record import Making, read_record, reward_files, write_record
from reward_models.table_files import (
    kind_of,
    printable,
    pyarrow_parquet,
    read_bytes,
    read_json_lines,
    read_table,
    write_table,
    write_whole,
)

RowKey = tuple[str, str]  # path and prompt

# How a row of ours begins, by which one that was cut off is known.
_ROW_START = b'{"path":'
_TEXTS = ("path", "prompt", "error")
_JSON_SUFFIXES = ("", ".jsonl", ".ndjson", ".json", ".txt")


@dataclass(frozen=True)
class ScoredFile:
    """One file's scores by reward name; None where there is no score, and then `error` says why."""

    path: str
    prompt: str
    scores: Mapping[str, float | None]
    error: str | None = None

    @property
    def has_a_score(self) -> bool:
        return any(value is not None for value in self.scores.values())

    def as_json(self) -> str:
        """The row as one line of JSON."""
        row = {
            "path": self.path,
            "prompt": self.prompt,
            "scores": dict(self.scores),
            "error": self.error,
        }
        text = json.dumps(row, ensure_ascii=False)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a file name that is not UTF-8
            text = json.dumps(row)
        return text

    def as_cells(self) -> dict[str, Any]:
        """The row of a table."""
        texts = {"path": self.path, "prompt": self.prompt, "error": self.error}
        return {**texts, **self.scores}


class Results:
    """The rows of earlier runs, and the place of new ones.

    Args:
        path: .csv, .parquet, or JSON lines (.jsonl, .ndjson, .json, .txt, no ending).
        names: of the rewards, in the order of a table's columns.
        parts: whether rows hold sub-scores `name/part` as well.

    Raises:
        RewardError: another ending; the file, or the journal beside it, holds anything else than
            rows of these rewards, or rows made with other `parts` or reward files (not a byte of
            it is changed); pyarrow is missing for parquet.
    """

    def __init__(self, path: Path, names: Sequence[str], *, parts: bool = False) -> None:
        self.path, self.names, self.parts = path, list(names), parts
        self._kind = _kind_of_result(path)
        self._is_table = self._kind != "json"
        if clash := [name for name in names if self._is_table and name in _TEXTS]:
            raise RewardError(f"a reward cannot be called {clash[0]!r} in a table", where=str(path))
        if self._kind == "parquet":
            pyarrow_parquet()
        self._mended: dict[RowKey, ScoredFile] = {}
        self._rows: dict[RowKey, ScoredFile] = {}
        self._making: Making | None = None
        self._files = reward_files(self.names)
        self._recorded = read_record(path) if self._is_there() else None
        if self._recorded:
            self._refuse_difference(replace(self._recorded, parts=parts, files=self._files))
        if self._is_table:
            for row in _read_result_table(path, self._fits):
                self._rows[self._key(row)] = row
        rows, self._cut_off = read_rows(self.lines_path, self._fits)
        self._rows |= {self._key(row): row for row in rows}
        self._is_new = not self._rows
        if parts and not self._recorded:
            self._refuse_without_parts()

    @property
    def lines_path(self) -> Path:
        """The JSON lines that grow: the result itself, or the journal of a table."""
        return journal_of(self.path) if self._is_table else self.path

    def made_with(self, *, frames: str, pool: str) -> None:
        """Say how videos are looked at, before the first row is added.

        Raises:
            RewardError: the rows that are there were made in another way; nothing is changed.
        """
        self._making = Making(frames, pool, self.parts, self._files)
        self._refuse_difference(self._making)

    def get(self, path: str, prompt: str) -> ScoredFile | None:
        """The row of an earlier run."""
        return self._rows.get(self._key(ScoredFile(path, prompt, {})))

    def add(self, rows: Sequence[ScoredFile]) -> None:
        """Write new rows behind those that are there."""
        self._prepare()
        if rows and self._is_new and self._making:
            # Before the rows: none of them stands there without its record. Of older results
            # nobody knows how they were made, and nothing is claimed.
            write_record(self.path, self._making)
            self._is_new = False
        append_rows(self.lines_path, rows)
        self._rows |= {self._key(row): row for row in rows}

    def mend(self, rows: Sequence[ScoredFile]) -> None:
        """Rows that take the place of old ones; in JSON lines when the work ends."""
        self._prepare()
        mended = {self._key(row): row for row in rows}
        if self._is_table:
            append_rows(self.lines_path, rows)
        else:
            # Once, not batch by batch: the file may be long.
            self._mended |= mended
        self._rows |= mended

    def close(self, *, complete: bool) -> None:
        """The work has ended, with every row there (`complete`) or not."""
        self._prepare()
        if self._mended:
            replace_rows(self.path, self._mended)
            self._mended = {}
        if self._is_table and complete and self.lines_path.exists():
            rows = [row.as_cells() for row in self._rows.values()]
            scores = self._score_columns()
            write_table(self.path, ["path", "prompt", *scores, "error"], set(scores), rows)
            self.lines_path.unlink()

    def _key(self, row: ScoredFile) -> RowKey:
        if not self._is_table:
            return row.path, row.prompt
        # Tables hold UTF-8 only; a file name that is none is known by how it is written there.
        return printable(row.path) or "", printable(row.prompt) or ""

    def _score_columns(self) -> list[str]:
        columns: dict[str, list[str]] = {name: [] for name in self.names}
        keys = dict.fromkeys(key for row in self._rows.values() for key in row.scores)
        for key in keys:
            if key not in columns:
                columns[self._owner(key) or ""].append(key)
        return [column for name, parts in columns.items() for column in (name, *parts)]

    def _owner(self, key: str) -> str | None:
        """The reward that a name `reward/part` belongs to."""
        owners = [name for name in self.names if key.startswith(f"{name}/")]
        return max(owners, key=len, default=None)

    def _fits(self, entry: Mapping[str, Any], where: str) -> ScoredFile:
        """A row of a file, if it is one of these rewards."""
        path, prompt, scores = entry.get("path"), entry.get("prompt"), entry.get("scores")
        error = entry.get("error")
        if not (
            isinstance(path, str)
            and isinstance(prompt, str)
            and isinstance(scores, dict)
            and (error is None or isinstance(error, str))
            and all(value is None or type(value) in (int, float) for value in scores.values())
        ):
            raise RewardError("is not a row of scores", where=where, fix=_FIX)
        extra = set(scores).difference(self.names)
        foreign = [key for key in extra if not self.parts or self._owner(key) is None]
        if foreign or len(scores) - len(extra) != len(self.names):
            raise RewardError(
                f"holds scores of {', '.join(sorted(scores)) or 'nothing'}, "
                f"not of {', '.join(sorted(self.names))}",
                where=where,
                fix=_FIX,
            )
        return ScoredFile(path, prompt, scores, error)

    def _is_there(self) -> bool:
        places = (self.path, self.lines_path)
        return any(place.is_file() and place.stat().st_size for place in places)

    def _prepare(self) -> None:
        """Before the first change: what a killed run left unfinished goes."""
        if self._cut_off:
            cut_last_line(self.lines_path)
            self._cut_off = False

    def _refuse_difference(self, now: Making) -> None:
        if self._recorded and (difference := self._recorded.difference(now)):
            raise RewardError(difference, where=str(self.path), fix=_FIX)

    def _refuse_without_parts(self) -> None:
        """New rows with sub-scores do not go behind older ones that were kept without."""
        whole = [row for row in self._rows.values() if not row.error]
        if whole and all(set(row.scores) == set(self.names) for row in whole):
            raise RewardError(
                "its rows hold no sub-scores, and --parts asks for them",
                where=str(self.path),
                fix=f"leave --parts out, or {_FIX}",
            )


Fits = Callable[[Mapping[str, Any], str], ScoredFile]
"""(what stands in a row, where) -> the row, or RewardError if it is none of these rewards."""


def journal_of(path: Path) -> Path:
    """Where the rows of an unfinished table stand."""
    return path.with_name(f"{path.name}.partial.jsonl")


def read_rows(path: Path, fits: Fits) -> tuple[list[ScoredFile], bool]:
    """The JSON lines that an earlier run left, and whether one more was cut off at the end.

    Raises:
        RewardError: the file is not such a result; not a byte of it is changed.
    """
    if not path.exists():
        return [], False
    content = read_bytes(path)
    end = content.rfind(b"\n") + 1
    rows = []
    for line in read_json_lines(content[:end], path):
        if line.problem:
            raise RewardError(line.problem, where=line.where, fix=_FIX)
        rows.append(fits(line.values, line.where))
    if end < len(content):
        _refuse_foreign_tail(content[end:], fits, path, certain=bool(rows))
    return rows, end < len(content)


def cut_last_line(path: Path) -> None:
    """Take out what follows the last newline."""
    end = read_bytes(path).rfind(b"\n") + 1
    try:
        with path.open("r+b") as stream:
            stream.truncate(end)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error


def _refuse_foreign_tail(tail: bytes, fits: Fits, path: Path, *, certain: bool) -> None:
    """What follows the last newline may go only if it is what a killed run leaves.

    Args:
        certain: rows of ours stand before it.
    """
    try:
        entry = json.loads(tail.decode("utf-8"))
    except ValueError:
        if certain or tail.startswith(_ROW_START):
            return
        entry = None
    # Whole JSON was not cut off: unless it is a row that lacks its newline only, it is foreign.
    fits(entry if isinstance(entry, dict) else {}, str(path))


def _read_result_table(path: Path, fits: Fits) -> list[ScoredFile]:
    """The rows of a finished table.

    Raises:
        RewardError: it is not such a result.
    """
    if not path.exists() or not path.stat().st_size:
        return []
    rows = []
    for row in read_table(path):
        if row.problem or not set(_TEXTS) <= set(row.values):
            raise RewardError(row.problem or "is not a row of scores", where=row.where, fix=_FIX)
        scores = {name: value for name, value in row.values.items() if name not in _TEXTS}
        entry = {
            "path": row.values["path"],
            "prompt": row.values["prompt"] or "",
            "scores": {name: _number(value) for name, value in scores.items()},
            "error": row.values["error"],
        }
        rows.append(fits(entry, row.where))
    if not rows:
        raise RewardError("holds no row of scores", where=str(path), fix=_FIX)
    return rows


def _number(value: Any) -> Any:
    """A CSV cell as a number; what is none stays as it is and is refused."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value


def _kind_of_result(path: Path) -> str:
    kind = kind_of(path) or ("json" if path.suffix.lower() in _JSON_SUFFIXES else None)
    if kind is None:
        raise RewardError(
            f"scores are not written as {path.suffix}",
            where=str(path),
            fix="endings: .jsonl, .csv, .parquet",
        )
    return kind


def replace_rows(path: Path, rows: Mapping[RowKey, ScoredFile]) -> None:
    """Put new rows in the places of old ones, whole or not at all; other lines keep their bytes."""
    lines = read_bytes(path).decode("utf-8").split("\n")
    for index, line in enumerate(lines):
        if line.strip():
            entry = json.loads(line.removeprefix("\ufeff"))
            new = rows.get((entry["path"], entry["prompt"]))
            lines[index] = line if new is None else new.as_json()
    write_whole(path, "\n".join(lines).encode("utf-8"))


def append_rows(path: Path, rows: Sequence[ScoredFile]) -> None:
    """Write rows behind those that are there; makes the file and its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(row.as_json() + "\n" for row in rows)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error
