"""Errors that a person can act on, as opposed to bugs.

A `UserError` says what is wrong, where, and what to do about it. The command line prints it without
a traceback and exits with code 2; in Python it is an ordinary exception. Anything else that escapes
is a bug and keeps its traceback. This module is a leaf: of ours it imports only the redactor, so
that every room may use it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from diffusion_align.secrecy.redaction import redact


class UserError(Exception):
    """Something the person can put right: a wrong name, a missing file, numbers that do not fit.

    `str(error)` reads `where: what`, followed by an indented `fix` (every line of it) where one is
    given, all of it without secrets.

    Args:
        what: one sentence about what is wrong.
        where: the file, key or option it concerns, e.g. `prompts.txt:3`.
        fix: what to do about it; may have several lines.
    """

    def __init__(self, what: str, *, where: str = "", fix: str = "") -> None:
        self.what = what
        self.where = where
        self.fix = fix
        super().__init__(what)

    def __str__(self) -> str:
        head = f"{self.where}: {self.what}" if self.where else self.what
        return redact("\n".join([head, *(f"    {line}" for line in self.fix.splitlines())]))


class OptionError(UserError, ValueError):
    """An option that is out of range, raised by the dataclass that declares it.

    Args:
        name: the field.
        what: what is wrong, to be read after the name.
        fix: as in `UserError`.
        reads: the other fields on which the range of this one hangs.
    """

    def __init__(self, name: str, what: str, *, fix: str = "", reads: tuple[str, ...] = ()) -> None:
        super().__init__(what, where=name, fix=fix)
        self.reads = (name, *reads)


def did_you_mean(word: str, candidates: Iterable[str]) -> str | None:
    """The candidate closest to `word` (case ignored), or None where nothing is close.

    >>> did_you_mean("learning_rte", ["learning_rate", "steps"])
    'learning_rate'
    """
    by_folded: dict[str, str] = {}
    for candidate in candidates:
        by_folded.setdefault(candidate.lower(), candidate)
    close = difflib.get_close_matches(word.lower(), list(by_folded), n=1, cutoff=0.6)
    return by_folded[close[0]] if close else None
