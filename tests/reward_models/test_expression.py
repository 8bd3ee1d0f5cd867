"""Sums of rewards as text: what is read, what is refused, and where the caret stands."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from reward_models.base import RewardError
from reward_models.expression import (
    Expression,
    Term,
    is_expression,
    parse_expression,
    read_expression,
)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("0.7*hpsv2.1 + 0.3*aesthetic", [(0.7, "", "hpsv2.1"), (0.3, "", "aesthetic")]),
        ("7e-1*hpsv2.1-x + .5*clip", [(0.7, "", "hpsv2.1-x"), (0.5, "", "clip")]),
        ("-clip - 2*a", [(-1.0, "", "clip"), (-2.0, "", "a")]),
        ("- 1.5 * clip+a", [(-1.5, "", "clip"), (1.0, "", "a")]),
        ("percent(hpsv2.1)", [(1.0, "percent", "hpsv2.1")]),
        ("2 * percent ( clip ) - a", [(2.0, "percent", "clip"), (-1.0, "", "a")]),
        ("0.5*pkg.mod:Name + a", [(0.5, "", "pkg.mod:Name"), (1.0, "", "a")]),
        ("3*runs/7/reward.safetensors + a", [(3.0, "", "runs/7/reward.safetensors"), (1, "", "a")]),
        ("2024/r.safetensors - ~/x/y", [(1, "", "2024/r.safetensors"), (-1, "", "~/x/y")]),
        ("0.7*a\n  + 0.3*b", [(0.7, "", "a"), (0.3, "", "b")]),
    ],
)
def test_terms_are_read(text: str, terms: list[tuple[float, str, str]]) -> None:
    read = read_expression(text)
    assert [(term.weight, term.preset, term.name) for term in read.terms] == terms


MISTAKES = [
    # text, column of the caret, what was expected or wrong, what helps
    ("0.7* + clip", 5, "expected a reward's name, found '+'", ""),
    ("0.7*", 4, "expected a reward's name, found the end", ""),
    ("clip + ", 6, "expected a reward's name, found the end", ""),
    ("clip + + mps", 7, "expected a reward's name, found '+'", "one sign"),
    ("0.7 clip", 4, "expected * after the weight 0.7, found 'clip'", "0.7*name"),
    ("0.7clip + mps", 3, "expected * after the weight 0.7, found 'clip'", "0.7*name"),
    ("clip + 3", 8, "expected * after the weight 3, found the end", "3*name"),
    ("0.5*2*clip", 4, "expected a reward's name, found '2'", ""),
    ("clip*0.7", 4, "expected + or - between two rewards, found '*'", "in front"),
    ("clip- mps", 6, "expected + or - between two rewards, found 'mps'", "with blanks"),
    ("clip, mps", 4, "expected + or - between two rewards, found ','", ""),
    ("(clip + mps)*2", 0, "expected a reward's name, found '('", "percent("),
    ("percent(clip", 12, "expected ) after percent(clip, found the end", ""),
    ("percent()", 8, "expected a reward's name, found ')'", ""),
    ("percent(clip, mps)", 12, "expected ) after percent(clip, found ','", "one reward"),
    ("0*clip + mps", 0, "the weight 0 is zero", "other than 0"),
    ("mps - 0.0*clip", 6, "the weight 0.0 is zero", "other than 0"),
    ("1e999*clip", 0, "the weight 1e999 is too large", "finite"),
    ("hsp2.1 + clip", 0, "unknown reward 'hsp2.1'", "did you mean hpsv2.1 ?"),
    ("0.5*clip + aestetic", 11, "unknown reward 'aestetic'", "did you mean aesthetic ?"),
    ("pickscore/26 + clip", 0, "unknown reward", "write 0.0384615*pickscore"),
    ("hpsv2.1-clip + mps", 0, "unknown reward", "hpsv2.1 - clip"),
    ("clip + no/such.safetensors", 7, "no such reward file", ""),
    ("perzent(clip)", 8, "unknown preset 'perzent'", "did you mean percent ?"),
    ("mps + percent(pickscore)", 14, "preset percent does not know pickscore", "flow_grpo"),
    ("0.1*clip + 0.2*clip", 15, "clip is named twice", "write 0.3*clip instead"),
    ("clip - 3*clip", 9, "clip is named twice", "write -2*clip instead"),
    ("clip - clip", 7, "clip is named twice", "cancel"),
    ("clip + clip-score", 7, "clip is named twice", "write 2*clip instead"),
    ("percent(clip) + clip", 16, "clip is named twice", "one preset"),
]


@pytest.mark.parametrize(("text", "column", "what", "helps"), MISTAKES)
def test_a_mistake_is_shown_with_its_place_and_an_example(
    text: str, column: int, what: str, helps: str
) -> None:
    with pytest.raises(RewardError) as caught:
        parse_expression(text)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("reward expression: ") and what in lines[0]
    assert lines[1] == f"    {text}" and lines[2] == "    " + " " * column + "^"
    assert helps in str(caught.value)
    assert "example: 0.7*hpsv2.1 + 0.3*aesthetic" in lines[-1]


@pytest.mark.parametrize("text", ["", "   "])
def test_an_empty_expression_is_refused(text: str) -> None:
    with pytest.raises(RewardError, match="expected a reward's name, found nothing"):
        parse_expression(text)


def test_the_example_is_one() -> None:
    with pytest.raises(RewardError) as caught:
        parse_expression("0.7*")
    example = str(caught.value).partition("example: ")[2]
    for text in re.split(", or ", example):
        assert parse_expression(text)


def test_names_come_back_as_the_catalogue_writes_them() -> None:
    found = parse_expression("0.5*Percent(HPSv2.1) + aesthetic_v2 - pkg.mod:Name + Flow-GRPO(clip)")
    assert str(found) == "0.5*percent(hpsv2.1) + aesthetic - pkg.mod:Name + flow_grpo(clip)"


@pytest.mark.parametrize(
    "text",
    [
        "0.7*hpsv2.1 + 0.3*aesthetic",
        "clip+mps",
        "clip - mps",
        "-clip",
        "2*clip",
        "percent(clip)",
        "0.7 clip",
        "clip- mps",
        "(clip + mps)",
        "hps*",
    ],
)
def test_an_expression_is_told_from_a_name(text: str) -> None:
    assert is_expression(text)


@pytest.mark.parametrize(
    "text",
    [
        "hpsv2.1",
        "aesthetic-v1",
        " clip ",
        "package.module:Name",
        "a-b.c:d",
        "runs/a-b_c.d/reward.safetensors",
        "../x",
        "~/x",
        "2024/x.safetensors",
        "two words",
        "",
    ],
)
def test_names_plugins_and_paths_are_no_expressions(text: str) -> None:
    assert not is_expression(text)


def test_an_existing_file_is_no_expression_whatever_it_is_called(tmp_path: Path) -> None:
    path = tmp_path / "0.7*a + (b) - c.safetensors"
    assert is_expression(str(path))
    path.touch()
    assert not is_expression(str(path))


NAMES = st.from_regex(r"[A-Za-z_~.][\w.~-]{0,6}([:/][\w.~-]{1,6}){0,2}", fullmatch=True).filter(
    lambda name: not re.match(r"\.\d", name)
)
WEIGHTS = st.floats(allow_nan=False, allow_infinity=False).filter(bool)
PRESETS = st.one_of(st.just(""), st.from_regex(r"[A-Za-z_][A-Za-z0-9_-]{0,6}", fullmatch=True))
TERMS = st.lists(
    st.builds(Term, WEIGHTS, PRESETS, NAMES), min_size=1, max_size=5, unique_by=lambda t: t.name
)


@settings(deadline=None)
@given(TERMS)
def test_the_canonical_text_reads_back_the_same(terms: list[Term]) -> None:
    expression = Expression(tuple(terms))
    assert read_expression(str(expression)) == expression
    assert len(terms) == 1 or is_expression(str(expression))


@settings(deadline=None)
@example("0%:")
@given(st.text(alphabet="ab1.0*+-() :/e\t,%", max_size=25))
def test_any_text_is_read_or_refused_with_a_caret(text: str) -> None:
    try:
        again = str(read_expression(text))
    except RewardError as error:
        assert "^" in error.fix or not text.strip()
    else:
        assert str(read_expression(again)) == again


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_term_has_a_finite_weight_other_than_zero(weight: float) -> None:
    with pytest.raises(RewardError, match="finite number other than 0"):
        Term(weight, "", "clip")


def test_a_name_that_could_not_be_read_back_makes_no_term() -> None:
    with pytest.raises(RewardError, match="cannot be written"):
        Term(1.0, "", "two words")


def test_checking_an_expression_needs_no_torch() -> None:
    code = (
        "import sys; from reward_models.composite import is_expression\n"
        "from reward_models.catalogue import check_name\n"
        "check_name('0.7*percent(hpsv2.1) + unit(aesthetic)')\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
