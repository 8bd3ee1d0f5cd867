"""Prompts from the user's own function, named or given."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest

from diffusion_align.config import load_config
from diffusion_align.data.prompt_functions import names_function, rows_of_name
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.errors import UserError

SOURCE = """
import itertools
from diffusion_align.data import Prompt
CALLS = []
WORDS = ["not", "callable"]

def good():
    CALLS.append(1)
    return ["a cat", Prompt("a dog", "blurry"), {"prompt": "a cow", "count": 2}]

def lazily():
    yield from (f"{colour} {thing}" for colour in ("red", "blue") for thing in ("cat", "dog"))

def asking(epoch):
    return []

def defaulted(count=2):
    return [f"prompt {n}" for n in range(count)]

def one_text():
    return "a cat"

def broken():
    raise KeyError("colours")

def nothing():
    return None

def endless():
    return (f"prompt {n}" for n in itertools.count())

def odd():
    return ["a cat", 7, {"promt": "a dog"}, "a cat"]
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A module of the working folder, under a name that no other test has imported."""
    name = f"prompts_of_{abs(hash(tmp_path))}"
    (tmp_path / f"{name}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield name
    rows_of_name.cache_clear()


def test_a_named_function_is_told_first_called_once_and_may_say_all_of_a_prompt(
    module: str, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = [Prompt("a cat"), Prompt("a dog", "blurry"), Prompt("a cow", "", {"count": 2})]
    assert load_prompts(f"{module}:good") == expected
    assert f"running your own code: module {module} (good is used" in capsys.readouterr().err
    again = load_prompts(f"{module}:good")
    assert again == expected and again[2].metadata == {"count": 2}
    import importlib

    assert importlib.import_module(module).CALLS == [1]


def test_generators_defaults_and_functions_of_python_will_do(module: str) -> None:
    texts = ["red cat", "red dog", "blue cat", "blue dog"]
    assert [p.text for p in load_prompts(f"{module}:lazily")] == texts
    assert len(load_prompts(f"{module}:defaulted")) == 2
    assert load_prompts(lambda: (word for word in ("a", "b"))) == [Prompt("a"), Prompt("b")]
    assert load_prompts([{"prompt": "a", "negative_prompt": "b"}]) == [Prompt("a", "b")]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("asking", "cannot be called without arguments: missing a required argument: 'epoch'"),
        ("one_text", "returned one text"),
        ("broken", "raised KeyError: 'colours'"),
        ("nothing", "raised TypeError: 'NoneType' object is not iterable"),
        ("endless", "more than 100000 prompts"),
        ("odd", r"malformed rows and duplicate prompts \(3\)"),
        ("WORDS", "is list, not a function"),
        ("missing", "has no missing"),
    ],
)
def test_what_is_wrong_with_a_function_is_told_with_its_name(
    module: str, name: str, message: str
) -> None:
    with pytest.raises(UserError, match=message) as found:
        load_prompts(f"{module}:{name}")
    assert found.value.where == f"{module}:{name}"


def test_an_error_inside_names_its_line(module: str) -> None:
    with pytest.raises(UserError) as found:
        load_prompts(f"{module}:broken")
    line = SOURCE.splitlines().index('    raise KeyError("colours")') + 1
    assert f"{module}.py:{line}" in found.value.fix
    with pytest.raises(UserError, match="cannot be imported"):
        load_prompts("no_such_module_anywhere:prompts")


@pytest.mark.parametrize(
    ("source", "is_one"),
    [
        ("my_module:prompts", True),
        ("pkg.module:prompts", True),
        ("small-world:heldout", False),
        ("small-world:12", False),
        ("prompts.txt", False),
        ("C:\\prompts.txt", False),
        ("a cat: large", False),
        (["a:b"], False),
    ],
)
def test_which_sources_name_a_function(source: object, is_one: bool) -> None:
    assert names_function(source) is is_one


def test_a_look_at_a_config_runs_nobodys_code(module: str, tmp_path: Path) -> None:
    config = load_config("demo", [f"prompts.source={module}:broken"])
    assert config.prompts.source == f"{module}:broken"


def test_endless_python_functions_are_cut_off() -> None:
    with pytest.raises(UserError, match="without an end"):
        load_prompts(lambda: (str(n) for n in itertools.count()))
