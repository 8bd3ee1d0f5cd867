"""Tables on disk: JSON lines, CSV and parquet, read row by row and written whole or not at all.

    for row in read_table("pictures.csv"):
        row.where, row.values            # "pictures.csv:2", {"path": "0.png", "prompt": "a cat"}

A row knows where it stands, so that whoever reads it can name it. Rows of a parquet file have no
line; theirs is the number of the row, counted from 1. pyarrow is imported for parquet only.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models.base import RewardError

Kind = str
"""json | csv | parquet"""

_KINDS: dict[str, Kind] = {
    ".jsonl": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}
TABLE_SUFFIXES = frozenset(_KINDS)

# csv refuses cells above 131072 characters; a prompt may be a page.
_LONGEST_CELL = 2**31 - 1


@dataclass(frozen=True)
class TableRow:
    """One row.

    Args:
        where: "file:line" (parquet: "file:row").
        values: by column; None or no key where the cell is empty.
        problem: why the row has no values; "" when it is in order.
    """

    where: str
    values: Mapping[str, Any]
    problem: str = ""


def kind_of(path: Path) -> Kind | None:
    """json, csv or parquet by the ending of a path; None of any other."""
    return _KINDS.get(path.suffix.lower())


def read_table(path: Path, columns: Collection[str] | None = None) -> Iterator[TableRow]:
    """The rows of a table, in order; a malformed one carries its problem, so that all can be named.

    Args:
        path: ending in .jsonl, .ndjson, .csv or .parquet.
        columns: the only ones that matter; others of a parquet file are not read from disk.

    Raises:
        RewardError: the file cannot be read or is no such table.
    """
    kind = kind_of(path)
    if kind == "csv":
        return _read_csv(path)
    if kind == "parquet":
        return _read_parquet(path, columns)
    return read_json_lines(read_bytes(path), path)


def write_table(
    path: Path, columns: Sequence[str], numbers: Collection[str], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Write a CSV or parquet file, whole or not at all.

    Args:
        columns: in their order; a value that a row lacks is an empty cell (parquet: null).
        numbers: the columns of float64; all others are text.

    Raises:
        RewardError: the file cannot be written, or pyarrow is missing.
    """
    if kind_of(path) == "parquet":
        write_whole(path, _as_parquet(columns, numbers, rows))
        return
    write_whole(path, "".join(_csv_lines(columns, rows)).encode("utf-8"))


def read_bytes(path: Path) -> bytes:
    """The file's content; RewardError naming it where it cannot be had."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardError(f"cannot be read: {error.strerror}", where=str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Put `content` in the place of what a file holds, whole or not at all; makes its folder.

    A link stays one, and permissions stay as they were.
    """
    path = path.resolve()
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                stream.flush()
                os.fsync(stream.fileno())
            if path.exists():
                temporary.chmod(path.stat().st_mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error


def read_json_lines(content: bytes, path: Path) -> Iterator[TableRow]:
    """The object of every line that is not blank.

    Raises:
        RewardError: the content is not UTF-8.
    """
    # Not splitlines(): it also cuts at characters that JSON allows inside a prompt.
    for number, line in enumerate(_decoded(content, path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield TableRow(where, {}, f"is not JSON: {error}")
            continue
        if isinstance(entry, dict):
            yield TableRow(where, entry)
        else:
            yield TableRow(where, {}, "is not a JSON object")


def pyarrow_parquet() -> Any:
    """pyarrow's parquet module.

    Raises:
        RewardError: it is not installed.
    """
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise RewardError(
            f"parquet files need pyarrow ({error})",
            fix="pip install pyarrow, or use .csv or .jsonl",
        ) from error
    return pyarrow.parquet


def _decoded(content: bytes, path: Path) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise RewardError(
            f"is not UTF-8 (byte {error.start})",
            where=f"{path}:{line}",
            fix="save the file as UTF-8",
        ) from error


def _read_csv(path: Path) -> Iterator[TableRow]:
    text = io.StringIO(_decoded(read_bytes(path), path), newline="")
    csv.field_size_limit(_LONGEST_CELL)
    reader = csv.reader(text, strict=True)
    head: list[str] = []
    line = 1
    while True:
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise RewardError(f"is not CSV: {error}", where=f"{path}:{line}") from error
        # A quoted prompt may hold line breaks: a row is called by its first line.
        line, where = reader.line_num + 1, f"{path}:{line}"
        if not cells:
            continue
        if not head:
            head = [cell.strip() for cell in cells]
            _check_head(head, where)
            continue
        if len(cells) == len(head):
            yield TableRow(where, {name: cell or None for name, cell in zip(head, cells)})
        else:
            problem = f"has {len(cells)} cells under {len(head)} headings"
            yield TableRow(where, {}, f"{problem}; a cell with a comma in it stands in quotes")


def _check_head(head: Sequence[str], where: str) -> None:
    twice = [name for name in dict.fromkeys(head) if name and head.count(name) > 1]
    if twice:
        raise RewardError(f"two columns are called {twice[0]!r}", where=where)
    if len(head) == 1 and any(sign in head[0] for sign in ";\t"):
        raise RewardError("cells are not separated by commas", where=where, fix="save it as CSV")


def _csv_lines(columns: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for cells in (columns, *([row.get(name) for name in columns] for row in rows)):
        buffer = io.StringIO()
        # Only what the terminator holds is quoted by every Python, and a prompt may hold "\r".
        csv.writer(buffer, lineterminator="\r\n").writerow(
            [cell if isinstance(cell, float) else printable(cell) for cell in cells]
        )
        yield buffer.getvalue()[:-2] + "\n"


def _read_parquet(path: Path, columns: Collection[str] | None) -> Iterator[TableRow]:
    parquet = pyarrow_parquet()
    if not path.is_file():
        raise RewardError("cannot be read: no such file", where=str(path))
    from pyarrow import ArrowException

    number = 0
    try:
        with parquet.ParquetFile(path) as table:
            there = table.schema_arrow.names
            wanted = there if columns is None else [name for name in there if name in columns]
            if not wanted:  # every row lacks what matters; its columns are named in the error
                for index in range(table.metadata.num_rows):
                    yield TableRow(f"{path}:{index + 1}", dict.fromkeys(there))
                return
            for batch in table.iter_batches(columns=wanted):
                for values in batch.to_pylist():
                    number += 1
                    yield TableRow(f"{path}:{number}", values)
    except (ArrowException, OSError, ValueError) as error:
        raise RewardError(
            f"is not a parquet file that can be read: {str(error).splitlines()[0]}", where=str(path)
        ) from error


def _as_parquet(
    columns: Sequence[str], numbers: Collection[str], rows: Sequence[Mapping[str, Any]]
) -> bytes:
    parquet = pyarrow_parquet()
    import pyarrow

    arrays = [
        pyarrow.array([row.get(name) for row in rows], pyarrow.float64())
        if name in numbers
        else pyarrow.array([printable(row.get(name)) for row in rows], pyarrow.string())
        for name in columns
    ]
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.table(arrays, names=list(columns)), buffer)
    return buffer.getvalue()


def printable(text: str | None) -> str | None:
    """A text that UTF-8 can hold: bytes of a file name that are not UTF-8 become \\udcff."""
    return None if text is None else text.encode("utf-8", "backslashreplace").decode("utf-8")
