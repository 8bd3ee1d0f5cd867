"""Sums of rewards as text: `0.7*hpsv2.1 + 0.3*aesthetic`. Read here, computed in `composite`.

    expression = ["-"] term {("+" | "-") term}
    term       = [number "*"] ( name | preset "(" name ")" )

A name is one that `reward_models.load` takes: a reward of the catalogue, a `package.module:Name`,
the path of a trained reward without blanks. Names may hold `-`, so a minus between two terms needs
blanks around it. Nothing is evaluated as Python, and a mistake is answered with a caret below it.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from reward_models.base import RewardError
from reward_models.names import check_single, row_of

EXAMPLE = "0.7*hpsv2.1 + 0.3*aesthetic, or percent(hpsv2.1) - 2*unit(aesthetic)"

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?"
# "12" and "0.7hps" are no names, "2024/reward.safetensors" is.
_NAME = rf"(?!(?:{_NUMBER})[\w.~-]*(?![\w.:/~-]))[\w.~/][\w.:/~-]*"
_PRESET = r"[A-Za-z_][\w-]*"
_WHOLE_NAME = re.compile(_NAME)
_TOKEN = re.compile(
    rf"(?P<preset>{_PRESET})(?=\s*\()|(?P<name>{_NAME})|(?P<number>{_NUMBER})"
    r"|(?P<sign>[+-])|(?P<star>\*)|(?P<open>\()|(?P<close>\))|(?P<other>\S)"
)

Kind = Literal["preset", "name", "number", "sign", "star", "open", "close", "other", "end"]


@dataclass(frozen=True)
class Term:
    """weight * preset(name); no preset: the raw score.

    Raises:
        RewardError: a weight that is zero or not finite, or what cannot be written as a name.
    """

    weight: float
    preset: str
    name: str

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight == 0:
            raise RewardError(
                f"weight {self.weight:g} of {self.name}",
                where="reward expression",
                fix="a weight is a finite number other than 0; leave the reward out instead",
            )
        if not _WHOLE_NAME.fullmatch(self.name):
            raise RewardError(
                f"{self.name!r} cannot be written in an expression", where="reward expression"
            )


@dataclass(frozen=True)
class Expression:
    """The terms of a sum; `str` writes it in the one canonical way, which reads back the same."""

    terms: tuple[Term, ...]

    def __str__(self) -> str:
        return write_sum([(term.weight, term.preset, term.name) for term in self.terms])


def write_sum(terms: Sequence[tuple[float, str, str]]) -> str:
    """(weight, preset or "", name) of each term as text, e.g. `0.7*percent(clip) - taste`."""
    words: list[str] = []
    for weight, preset, name in terms:
        size = repr(abs(float(weight))).removesuffix(".0")
        score = f"{preset}({name})" if preset else name
        sign = "-" if weight < 0 else "+"
        words += [sign, score if size == "1" else f"{size}*{score}"]
    # The first sign: no plus, and no blank behind a minus.
    return " ".join([words[0].replace("+", "") + words[1], *words[2:]])


def is_expression(text: str) -> bool:
    """Whether a reward's name is a sum, a weighted or a normalised reward.

    Names, `package.module:Name` and paths are not, existing files of any name included.
    """
    text = text.strip()
    if not text or _WHOLE_NAME.fullmatch(text) or os.path.exists(os.path.expanduser(text)):
        return False
    return bool(re.search(r"[+*()]|^-|\s-|-\s", text) or re.match(rf"{_NUMBER}\s", text))


def parse_expression(text: str) -> Expression:
    """Read an expression and check its names and presets; nothing is loaded.

    Names come back as the catalogue writes them.

    Raises:
        RewardError: the first mistake, with a caret below it and what is expected there.
    """
    from reward_models.presets import check_preset, normalisation

    places = _read(text)
    checked: list[tuple[Term, int]] = []
    for term, at in places:
        try:
            check_single(term.name)
        except RewardError as error:
            _refuse(text, at, error.what, _misread(term.name) or error.fix)
        if (row := row_of(term.name)) is not None:
            term = replace(term, name=row.info.name)
        if term.preset:
            try:
                term = replace(term, preset=check_preset(term.preset))
                normalisation(term.preset, term.name)
            except RewardError as error:
                _refuse(text, at, error.what, error.fix)
        checked.append((term, at))
    return _without_repeats(text, checked)


def read_expression(text: str) -> Expression:
    """Read an expression; whether its names and presets exist is not looked at.

    Raises:
        RewardError: the first mistake, with a caret below it and what is expected there.
    """
    return _without_repeats(text, _read(text))


@dataclass(frozen=True)
class _Token:
    kind: Kind
    text: str
    at: int


def _read(text: str) -> list[tuple[Term, int]]:
    """Every term and the place of its name."""
    tokens = _Tokens(text)
    terms = [tokens.term(tokens.leading_sign())]
    while tokens.now.kind != "end":
        terms.append(tokens.term(tokens.sign_between()))
    return terms


class _Tokens:
    """A cursor over the text; each method reads one part of the grammar and moves on."""

    def __init__(self, text: str) -> None:
        self.text = text
        self._rest = _split(text)
        self.now = next(self._rest)

    def leading_sign(self) -> int:
        if self.now.kind == "end":
            self._expected("a reward's name", "nothing")
        return self._sign() if self.now.kind == "sign" else 1

    def sign_between(self) -> int:
        token = self.now
        if token.kind != "sign":
            before = self.text[: token.at].rstrip()
            minus = before.endswith("-") or token.text.startswith("-")
            star = "the weight stands in front: 0.5*name" if token.kind == "star" else ""
            self._expected(
                "+ or - between two rewards", hint=star or ("a - b, with blanks" if minus else "")
            )
        return self._sign()

    def term(self, sign: int) -> tuple[Term, int]:
        weight, at = 1.0, self.now.at
        if self.now.kind == "number":
            number = self._take().text
            weight = float(number)
            if self.now.kind != "star":
                self._expected(f"* after the weight {number}", hint=f"{number}*name")
            self._take()
            if not math.isfinite(weight) or weight == 0:
                what = "is too large" if weight else "is zero"
                fix = "a weight is a finite number other than 0"
                _refuse(self.text, at, f"the weight {number} {what}", fix)
        preset = ""
        if self.now.kind == "preset":
            preset = self._take().text
            self._take()  # a preset is only one because "(" follows
        if self.now.kind != "name":
            hint = ""
            if self.now.kind == "sign":
                hint = "one sign between two rewards"
            elif self.now.kind == "open":
                hint = "parentheses belong to a preset: percent(hpsv2.1)"
            self._expected("a reward's name", hint=hint)
        name = self._take()
        if preset:
            if self.now.kind != "close":
                self._expected(f") after {preset}({name.text}", hint="a preset takes one reward")
            self._take()
        return Term(sign * weight, preset, name.text), name.at

    def _sign(self) -> int:
        return -1 if self._take().text == "-" else 1

    def _take(self) -> _Token:
        token = self.now
        self.now = next(self._rest, token)
        return token

    def _expected(self, what: str, found: str = "", hint: str = "") -> NoReturn:
        found = found or ("the end" if self.now.kind == "end" else repr(self.now.text))
        _refuse(self.text, self.now.at, f"expected {what}, found {found}", hint)


def _split(text: str) -> Iterator[_Token]:
    for match in _TOKEN.finditer(text):
        kind: Kind = match.lastgroup  # type: ignore[assignment]
        yield _Token(kind, match.group(), match.start())
    yield _Token("end", "", len(text.rstrip()))


def _without_repeats(text: str, places: Sequence[tuple[Term, int]]) -> Expression:
    seen: dict[str, Term] = {}
    for term, at in places:
        first = seen.setdefault(term.name, term)
        if first is term:
            continue
        total = first.weight + term.weight
        if first.preset != term.preset:
            fix = "name it once, with one preset"
        elif total == 0:
            fix = "its weights cancel out: leave it out"
        else:
            # Decimal weights add up to decimal ones: 0.1 + 0.2 is 0.3 to the reader.
            once = Expression((Term(float(f"{total:.12g}"), term.preset, term.name),))
            fix = f"write {once} instead"
        _refuse(text, at, f"{term.name} is named twice", fix)
    return Expression(tuple(term for term, _ in places))


def _misread(name: str) -> str:
    """What to write instead of `pickscore/26` and `hpsv2.1-clip`, which read as one name each."""
    whole, _, divisor = name.rpartition("/")
    if re.fullmatch(_NUMBER, divisor) and float(divisor) and row_of(whole):
        return f"there is no division: write {1 / float(divisor):.6g}*{whole}"
    for dash in re.finditer("-", name):
        left, right = name[: dash.start()], name[dash.end() :]
        if row_of(left) and row_of(right):
            return f"a minus needs blanks around it: {left} - {right}"
    return ""


def _refuse(text: str, at: int, what: str, fix: str = "") -> NoReturn:
    shown = [re.sub(r"\s", " ", text), " " * at + "^"] if text.strip() else []
    lines = [*shown, *([fix] if fix else []), f"example: {EXAMPLE}"]
    raise RewardError(what, where="reward expression", fix="\n".join(lines))
