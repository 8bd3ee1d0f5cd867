"""README does what it says: its command lines are understood, in order, and its Python runs."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

from diffusion_align.cli import app
from diffusion_align.config import load_config
from diffusion_align.data.prompts import load_prompts
from diffusion_align.policy.catalogue import resolve
from reward_models.catalogue import ROWS, check_name

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def commands() -> Iterator[list[str]]:
    """The words after `diffusion-align` of every command line, in order."""
    for block in blocks("bash"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            while "&&" in words:
                words = words[words.index("&&") + 1 :]
            if words[:1] == ["diffusion-align"]:
                yield words[1:]


def understood(words: list[str]) -> dict[str, object]:
    """The parameters of a command line as the command would get them; it is not run."""
    group: object = typer.main.get_command(app)
    with group.make_context("diffusion-align", list(words)) as above:  # type: ignore[attr-defined]
        name, command, rest = group.resolve_command(above, list(words))  # type: ignore[attr-defined]
        return dict(command.make_context(name, rest, parent=above).params)


def test_the_resumed_run_has_steps_left() -> None:
    runs = [understood(words) for words in commands() if words[0] == "train"]
    (resumed,) = (given for given in runs if given["resume"])
    (begun,) = (g for g in runs if g["config"] == resumed["config"] and not g["resume"])
    before = load_config(str(begun["config"]), begun["overrides"] or ())  # type: ignore[arg-type]
    after = load_config(str(resumed["config"]), resumed["overrides"] or ())  # type: ignore[arg-type]
    assert before.output == after.output
    assert before.train.steps < after.train.steps


def test_there_are_command_lines() -> None:
    assert {words[0] for words in commands()} >= {"demo", "train", "sample", "score", "compare"}


@pytest.mark.parametrize("words", list(commands()), ids=lambda words: " ".join(words[:3]))
def test_every_command_line_is_understood(words: list[str]) -> None:
    given = understood(words)
    if words[0] in ("demo", "train"):
        load_config(str(given.get("config", "demo")), given["overrides"] or ())  # type: ignore[arg-type]
    if "model" in given:
        resolve(str(given["model"]))
        load_prompts(str(given["prompts"]))
    for name in str(given.get("reward") or "compressibility").split(","):
        check_name(name)


def test_every_command_finds_what_those_before_it_left() -> None:
    made: set[str] = set()
    for words in commands():
        given = understood(words)
        if words[0] in ("demo", "train"):
            config = load_config(str(given.get("config", "demo")), given["overrides"] or ())  # type: ignore[arg-type]
            folder = str(config.output)
            # a run goes on where there is one, and begins where there is none
            assert (folder in made) == bool(given.get("resume")), words
        needed = [given.get("lora"), given.get("tuned"), *given.get("paths", ())]  # type: ignore[misc]
        assert {str(path) for path in needed if path} <= made, words
        made |= {str(config.output)} if words[0] in ("demo", "train") else {str(given.get("out"))}


@pytest.mark.slow
@pytest.mark.skipif(not ROWS["tiny-aesthetic"].installed, reason="tiny-aesthetic is not here yet")
def test_the_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("python")
    assert "steps=50" in code
    names: dict[str, object] = {}
    exec(compile(code.replace("steps=50", "steps=1"), "README.md", "exec"), names)
    result = names["result"]
    assert (tmp_path / result.folder / "final").is_dir()  # type: ignore[attr-defined]
