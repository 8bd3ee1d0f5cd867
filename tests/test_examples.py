"""Every `>>>` example in a docstring gives what it says."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def modules() -> list[str]:
    return sorted(
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for package in ("diffusion_align", "reward_models")
        for path in (ROOT / package).rglob("*.py")
        if ">>> " in path.read_text(encoding="utf-8")
    )


def test_there_are_examples() -> None:
    assert "diffusion_align.errors" in modules()


@pytest.mark.parametrize("name", modules())
def test_the_examples_of_a_module_hold(name: str) -> None:
    module = importlib.import_module(name)
    # Examples of one module write nothing that another one of it reads.
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    finder = doctest.DocTestFinder(exclude_empty=True)
    said: list[str] = []
    for example in finder.find(module, name, globs=dict(vars(module))):
        runner.run(example, out=said.append)
    assert runner.tries > 0, f"{name} shows examples that doctest does not find"
    assert runner.failures == 0, "".join(said)
