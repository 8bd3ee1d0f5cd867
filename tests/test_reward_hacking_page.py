"""The page on reward hacking: its commands are ones that the program takes."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_align.config import RunConfig, load_config

PAGE = Path(__file__).resolve().parent.parent / "docs" / "reward_hacking.md"


def commands(name: str) -> list[list[str]]:
    """The words behind `diffusion-align NAME` of every such line of the page."""
    lines = re.findall(rf"^diffusion-align {name} (.*)$", PAGE.read_text("utf-8"), re.MULTILINE)
    return [shlex.split(line) for line in lines]


@pytest.mark.parametrize("words", commands("train"), ids=lambda words: words[-1])
def test_a_training_of_the_page_is_a_config(words: list[str]) -> None:
    config = load_config(words[0], words[1:])
    assert isinstance(config, RunConfig)
    assert config.evaluation.rewards and config.reward not in config.evaluation.rewards


def test_every_defence_is_switched_on_by_one_of_them() -> None:
    found = [load_config(words[0], words[1:]) for words in commands("train")]
    configs = [config for config in found if isinstance(config, RunConfig)]
    assert len(configs) == len({config.output for config in configs}) == 6
    for switched_on in (
        lambda c: c.guards.stop_when_heldout_turns == c.guards.stop_when_heldout_falls == "stop",
        lambda c: c.algorithm.options.kl_weight > 0,
        lambda c: c.supervised is not None,
        lambda c: c.algorithm.options.loss == "relu",
        lambda c: bool(c.evaluation.scale_sweep),
    ):
        assert sum(map(switched_on, configs)) == 1


@pytest.mark.parametrize("name", ["sweep", "compare"])
def test_its_other_commands_name_options_that_there_are(name: str) -> None:
    from diffusion_align.commands import pictures, sweep

    command: Callable[..., None] = sweep.sweep if name == "sweep" else pictures.compare
    known = inspect.signature(command).parameters
    found = commands(name)
    assert found
    for words in found:
        options = [word[2:].replace("-", "_") for word in words if word.startswith("--")]
        assert set(options) <= set(known)
