"""What is wrong with a configuration: every problem with its place, all of them in one error."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.errors import UserError
from diffusion_align.secrecy.redaction import redact


@dataclass(frozen=True)
class Place:
    """Where a value was written: a line of a file, or the n-th override of the command line."""

    file: str
    line: int = 0

    @property
    def typed(self) -> bool:
        """Whether it was written on the command line."""
        return self.file == COMMAND_LINE

    def __str__(self) -> str:
        return f"{self.file}:{self.line}" if self.line and not self.typed else self.file


COMMAND_LINE = "command line"


@dataclass(frozen=True)
class Problem:
    """One thing to put right: its place, the dotted key, what is wrong, and hints (lines)."""

    place: Place
    key: str
    what: str
    hint: str = ""

    def __str__(self) -> str:
        head = "  ".join(part for part in (str(self.place), self.key, self.what) if part)
        return "\n".join([head, *(f"    {line}" for line in self.hint.splitlines())])


class ConfigError(UserError):
    """All problems of one configuration; `str()` is the whole report."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        # The order of the files as given (base first), then of the lines; the command line last.
        files = list(dict.fromkeys(problem.place.file for problem in problems))
        self.problems = sorted(
            problems,
            key=lambda p: (p.place.typed, files.index(p.place.file), p.place.line),
        )
        count = f"{len(problems)} problem{'s' if len(problems) != 1 else ''} found"
        super().__init__(f"{count}, nothing was loaded.")

    def __str__(self) -> str:
        closing = f"{self.what}   Schema: diffusion-align config --schema"
        return redact("\n".join([*map(str, self.problems), closing]))


def shown(path: Path) -> str:
    """`path` as a person types it: relative to the current folder where it lies inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd()))
    except ValueError:
        return str(path)
