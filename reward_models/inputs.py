"""What to score: files, folders, patterns and tables become one list of items.

    find_items(["pictures/", "more/**/*.png", "clips/a.mp4", "pairs.csv"])

A folder gives the images and videos in it and below it, in the order of their names; hidden ones
(their name begins with a dot) are left out. A pattern that the shell did not expand gives what it
matches, media only (the other files are `Found.left_out`); `**` stands for any number of folders. A
table gives a row per item: a column `path` (also file, file_name, image, video) and, if it has one,
`prompt` (also caption, text). Paths in a table count from the table's own folder, or else from the
working folder.

Nothing is read but the tables, and torch is not needed for files, patterns and tables.
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from reward_models.base import RewardError
from reward_models.table_files import TABLE_SUFFIXES, TableRow, kind_of, read_table

FilePath = str | os.PathLike[str]

PATH_COLUMNS = ("path", "file", "file_name", "image", "video")
PROMPT_COLUMNS = ("prompt", "caption", "text")

_NAMED_PROBLEMS = 20
_NAMED_ENDINGS = 4


@dataclass(frozen=True)
class Item:
    """One thing to score.

    Args:
        path: an image or a video.
        prompt: None where nothing was said about it.
        where: "table:line" where a table named it.
    """

    path: Path
    prompt: str | None = None
    where: str = ""


@dataclass(frozen=True)
class Found:
    """What there is to score.

    Args:
        items: each (path, prompt) once.
        left_out: visible files of folders and patterns that are no image or video by their ending.
    """

    items: list[Item]
    left_out: list[Path]

    def left_out_in_words(self, but: Iterable[Path | None] = ()) -> str:
        """How many files of which endings were left out; "" if none.

        Args:
            but: files that are known, such as a table of prompts.
        """
        known = {path.resolve() for path in but if path is not None}
        left = [path for path in self.left_out if path.resolve() not in known]
        if not left:
            return ""
        endings = Counter(path.suffix.lower() or "no ending" for path in left).most_common()
        named = [f"{ending} {count}" for ending, count in endings[:_NAMED_ENDINGS]]
        if len(endings) > _NAMED_ENDINGS:
            named.append("others")
        what = "1 file that is" if len(left) == 1 else f"{len(left)} files that are"
        return f"left out: {what} no image or video by the ending ({', '.join(named)})"


def find_items(paths: Iterable[FilePath]) -> list[Item]:
    """The items of `look`."""
    return look(paths).items


def look(paths: Iterable[FilePath]) -> Found:
    """The images and videos of files, folders, patterns and tables, each (path, prompt) once.

    Files are taken as they are given, whatever their ending.

    Raises:
        RewardError: a path that does not exist, a pattern that matches nothing, rows of a table
            without a path (all of them are named), or nothing to score at all.
    """
    suffixes, given = _Suffixes(), [str(path) for path in paths]
    found = [item for path in given for item in _items_of(path, suffixes)]
    if not found:
        raise RewardError("there are no images or videos to score", fix=suffixes.advice())
    asked_for = set(map(Path, given))  # a table, or a picture without an ending
    return Found(_once(found), [path for path in suffixes.others if path not in asked_for])


def find_images(paths: Iterable[FilePath]) -> list[Path]:
    """As `find_items`, but of folders and patterns the images alone, and without prompts.

    Raises:
        RewardError: as `look`.
    """
    suffixes = _Suffixes(videos=False)
    found = [item.path for path in paths for item in _items_of(str(path), suffixes)]
    if not found:
        raise RewardError("there are no images to score", fix=suffixes.advice())
    return list(dict.fromkeys(found))


def is_video(path: Path) -> bool:
    """Whether a file is read as a video, by its ending."""
    from reward_models.video.files import VIDEO_SUFFIXES

    return path.suffix.lower() in VIDEO_SUFFIXES


def read_prompts(path: FilePath, files: Sequence[Path]) -> dict[Path, str]:
    """Prompts of files from a table with the columns `path` and `prompt` (or their other names).

    Any other ending than .csv and .parquet is read as JSON lines. Rows about other files are
    allowed, files without a row too: whether that matters, the rewards decide.

    Returns:
        file -> prompt, for those files that have one.

    Raises:
        RewardError: naming file and line, when it is unreadable or contradicts itself.
    """
    source = Path(path)
    wanted = {file.resolve(): file for file in files}
    prompts: dict[Path, str] = {}
    problems: list[tuple[str, str]] = []
    for row in _rows(source):
        written, prompt, problem = _path_and_prompt(row)
        if problem or prompt is None:
            problems.append(
                (row.where, problem or f'a line needs the texts "path" and "prompt", {_has(row)}')
            )
            continue
        for place in _places(written, source):
            file = wanted.get(place.resolve())
            if file is None:
                continue
            if prompts.setdefault(file, prompt) != prompt:
                problems.append((row.where, f"a second prompt for {file}"))
            break
    _refuse(
        problems, source, "a file that has several prompts is scored by giving the table as PATH"
    )
    return prompts


def with_prompts(items: Iterable[Item], prompts: Mapping[Path, str] | str) -> list[Item]:
    """Items with a prompt, "" where there is none; one that a table gave stays."""

    def text(item: Item) -> str:
        if item.prompt is not None:
            return item.prompt
        return prompts if isinstance(prompts, str) else prompts.get(item.path, "")

    return _once(replace(item, prompt=text(item)) for item in items)


def _once(items: Iterable[Item]) -> list[Item]:
    """Each (path, prompt) where it stands first."""
    known: dict[tuple[Path, str | None], Item] = {}
    for item in items:
        known.setdefault((item.path, item.prompt), item)
    return list(known.values())


class _Suffixes:
    """The endings of media, looked up when a folder or pattern is met: their modules need torch.

    `others` are the files that have another, each once.
    """

    def __init__(self, *, videos: bool = True) -> None:
        self.videos = videos
        self.others: dict[Path, None] = {}

    def admit(self, file: Path) -> bool:
        """Whether a file that was found has such an ending; one that has not is remembered."""
        admitted = file.suffix.lower() in self.known
        if not admitted:
            self.others[file] = None
        return admitted

    @cached_property
    def known(self) -> frozenset[str]:
        from reward_models.media import IMAGE_SUFFIXES

        if not self.videos:
            return IMAGE_SUFFIXES
        from reward_models.video.files import VIDEO_SUFFIXES

        return IMAGE_SUFFIXES | frozenset(VIDEO_SUFFIXES)

    def advice(self) -> str:
        return f"known endings: {' '.join(sorted(self.known))}"


def _items_of(given: str, suffixes: _Suffixes) -> Iterator[Item]:
    path = Path(given)
    if path.is_dir():
        yield from map(Item, _media_below(path, suffixes))
    elif path.is_file():
        yield from _items_of_table(path) if kind_of(path) else [Item(path)]
    elif glob.has_magic(given):
        yield from _items_of_pattern(given, suffixes)
    else:
        raise RewardError("no such file or folder", where=given)


def _media_below(folder: Path, suffixes: _Suffixes) -> list[Path]:
    visible = (
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
    )
    return [path for path in visible if path.is_file() and suffixes.admit(path)]


def _items_of_pattern(pattern: str, suffixes: _Suffixes) -> Iterator[Item]:
    """A table that a pattern for pictures happens to match is not meant, unless it says .csv."""
    matches = sorted(map(Path, glob.glob(os.path.expanduser(pattern), recursive=True)))
    wants_tables = Path(pattern).suffix.lower() in TABLE_SUFFIXES
    any_item = False
    for path in matches:
        if path.is_dir():
            items: Iterable[Item] = map(Item, _media_below(path, suffixes))
        elif wants_tables:
            items = _items_of_table(path)
        else:
            items = [Item(path)] if suffixes.admit(path) else []
        for item in items:
            any_item = True
            yield item
    if not any_item:
        what = "no image or video" if matches else "nothing"
        raise RewardError(f"this pattern matches {what}", where=pattern, fix=suffixes.advice())


def _items_of_table(source: Path) -> list[Item]:
    items: list[Item] = []
    problems: list[tuple[str, str]] = []
    for row in _rows(source):
        written, prompt, problem = _path_and_prompt(row)
        if problem:
            problems.append((row.where, problem))
            continue
        places = _places(written, source)
        # What is nowhere stays in the list under its written name, and is reported as unreadable.
        there = next((place for place in places if place.is_file()), Path(written))
        items.append(Item(there, prompt, row.where))
    _refuse(problems, source)
    if not items:
        raise RewardError("there is no row in this table", where=str(source))
    return items


def _rows(source: Path) -> Iterator[TableRow]:
    return read_table(source, (*PATH_COLUMNS, *PROMPT_COLUMNS))


def _path_and_prompt(row: TableRow) -> tuple[str, str | None, str]:
    """(path, prompt or None, problem or "") of a row."""
    if row.problem:
        return "", None, row.problem
    texts: list[str | None] = []
    for columns in (PATH_COLUMNS, PROMPT_COLUMNS):
        named = [(name, row.values[name]) for name in columns if _filled(row.values.get(name))]
        name, value = named[0] if named else ("", None)
        if value is not None and not isinstance(value, str):
            return "", None, f'a line needs texts, "{name}" is {type(value).__name__}'
        texts.append(value)
    path, prompt = texts
    if path is None:
        return (
            "",
            None,
            f'a line needs the text "path" ({", ".join(PATH_COLUMNS[1:])}), {_has(row)}',
        )
    return path, prompt, ""


def _filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, str) and not value.strip())


def _has(row: TableRow) -> str:
    return f"it has {', '.join(map(repr, row.values)) or 'nothing'}"


def _places(written: str, source: Path) -> list[Path]:
    """Where a path in a table may point: its own folder first, then the working folder."""
    return list(dict.fromkeys([source.parent / written, Path(written)]))


def _refuse(problems: Sequence[tuple[str, str]], source: Path, fix: str = "") -> None:
    """All rows that cannot be used, each with its line."""
    if not problems:
        return
    if len(problems) == 1:
        where, what = problems[0]
        raise RewardError(what, where=where, fix=fix)
    lines = [f"{where}: {what}" for where, what in problems[:_NAMED_PROBLEMS]]
    if len(problems) > _NAMED_PROBLEMS:
        lines.append(f"and {len(problems) - _NAMED_PROBLEMS} more")
    raise RewardError(
        f"{len(problems)} rows cannot be used",
        where=str(source),
        fix="\n".join([*lines, *filter(None, [fix])]),
    )
