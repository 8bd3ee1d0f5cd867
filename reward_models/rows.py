"""The file of scores: one JSON line per picture, continued and mended but never guessed at.

Only a file whose every whole line is a row of the same rewards is touched. A last line without its
newline is what a killed run leaves; it goes only where it cannot be anything else.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_models.base import RewardError

RowKey = tuple[str, str]  # path and prompt

# How a row of ours begins, by which one that was cut off is known.
_ROW_START = b'{"path":'


@dataclass(frozen=True)
class ScoredFile:
    """One file's scores by reward name; None where there is no score, and then `error` says why."""

    path: str
    prompt: str
    scores: Mapping[str, float | None]
    error: str | None = None

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


def read_rows(path: Path, names: set[str]) -> dict[RowKey, ScoredFile]:
    """The rows that an earlier run left; a last one that was cut off is taken out of the file.

    Raises:
        RewardError: the file is not a result of these rewards; not a byte of it is changed.
    """
    if not path.exists():
        return {}
    content = read_bytes(path)
    end = content.rfind(b"\n") + 1
    rows: dict[RowKey, ScoredFile] = {}
    for number, entry in json_lines(content[:end], path):
        row = _as_row(entry, names, f"{path}:{number}")
        rows[(row.path, row.prompt)] = row
    if end < len(content):
        _refuse_foreign_tail(content[end:], names, path, certain=bool(rows))
        try:
            with path.open("r+b") as stream:
                stream.truncate(end)
        except OSError as error:
            raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error
    return rows


def _refuse_foreign_tail(tail: bytes, names: set[str], path: Path, *, certain: bool) -> None:
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
    _as_row(entry if isinstance(entry, dict) else {}, names, str(path))


def _as_row(entry: Mapping[str, Any], names: set[str], where: str) -> ScoredFile:
    path, prompt, scores = entry.get("path"), entry.get("prompt"), entry.get("scores")
    fix = "name another file for the result, or remove this one"
    if not (isinstance(path, str) and isinstance(prompt, str) and isinstance(scores, dict)):
        raise RewardError("is not a row of scores", where=where, fix=fix)
    if set(scores) != names:
        raise RewardError(
            f"holds scores of {', '.join(sorted(scores)) or 'nothing'}, "
            f"not of {', '.join(sorted(names))}",
            where=where,
            fix=fix,
        )
    return ScoredFile(path, prompt, scores, entry.get("error"))


def replace_rows(path: Path, rows: Mapping[RowKey, ScoredFile]) -> None:
    """Put new rows in the places of old ones, whole or not at all; other lines keep their bytes."""
    lines = read_bytes(path).decode("utf-8").split("\n")
    for index, line in enumerate(lines):
        if line.strip():
            entry = json.loads(line.removeprefix("\ufeff"))
            new = rows.get((entry["path"], entry["prompt"]))
            lines[index] = line if new is None else new.as_json()
    path = path.resolve()  # a link stays one
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as stream:
                stream.write("\n".join(lines))
            temporary.chmod(path.stat().st_mode)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error


def append_rows(path: Path, rows: Sequence[ScoredFile]) -> None:
    """Write rows behind those that are there; makes the file and its folder."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a", encoding="utf-8", newline="\n") as stream:
            stream.writelines(row.as_json() + "\n" for row in rows)
    except OSError as error:
        raise RewardError(f"cannot be written: {error.strerror}", where=str(path)) from error


def read_bytes(path: Path) -> bytes:
    """The file's content; RewardError naming it where it cannot be had."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise RewardError(f"cannot be read: {error.strerror}", where=str(path)) from error


def json_lines(content: bytes, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of every line that is not blank.

    Raises:
        RewardError: naming the line that is no JSON object.
    """
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RewardError(f"is not UTF-8 (byte {error.start})", where=str(path)) from error
    # Not splitlines(): it also cuts at characters that JSON allows inside a prompt.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise RewardError(f"is not JSON: {error}", where=f"{path}:{number}") from error
        if not isinstance(entry, dict):
            raise RewardError("is not a JSON object", where=f"{path}:{number}")
        yield number, entry
