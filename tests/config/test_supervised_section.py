"""The section `supervised`: read, checked, and kept to the methods that take it."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_align.algorithms.supervised_options import SupervisedOptions
from diffusion_align.config import ConfigError, changes_on_resume, load_config, to_yaml
from diffusion_align.errors import UserError

DRAFT = """\
model:
  id: tiny-sd
prompts:
  source: animals
reward: tiny-hps
algorithm:
  name: draft
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_it_is_read_and_written_back(tmp_path: Path) -> None:
    path = written(tmp_path, f"{DRAFT}supervised:\n  pictures: small-world\n  weight: 1e-1\n")
    config = load_config(path, ["supervised.every=4"])
    assert config.supervised == SupervisedOptions("small-world", every=4, weight=0.1)  # type: ignore[union-attr]
    assert (
        load_config(written(tmp_path, to_yaml(config)), stored=True).supervised == config.supervised
    )  # type: ignore[union-attr]


def test_there_is_none_unless_it_is_asked_for(tmp_path: Path) -> None:
    assert load_config(written(tmp_path, DRAFT)).supervised is None  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["supervised.pictures=nowhere"], "no such folder or table of pictures: nowhere"),
        (["supervised.pictures=small-world:x"], "unknown prompt list"),
        (["supervised.every=3"], "supervised.pictures  missing"),
        (["supervised.pictures=small-world", "supervised.every=0"], "must be at least 1, not 0"),
        (["supervised.pictures=small-world", "supervised.wieght=1"], "supervised.weight"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, words: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(written(tmp_path, DRAFT), words)
    assert said in str(raised.value)


def test_a_method_that_takes_none_refuses_it(tmp_path: Path) -> None:
    text = DRAFT.replace("draft", "ddpo")
    with pytest.raises(ConfigError, match="ddpo takes no supervised step"):
        load_config(written(tmp_path, text), ["supervised.pictures=small-world"])


def test_a_resumed_run_may_weigh_it_otherwise_but_not_learn_from_other_pictures(
    tmp_path: Path,
) -> None:
    path = written(tmp_path, f"{DRAFT}supervised:\n  pictures: small-world\n")
    before = load_config(path)
    assert len(changes_on_resume(before, load_config(path, ["supervised.weight=0.5"]))) == 1
    for change in ("supervised.pictures=small-world:9", "supervised.every=2"):
        with pytest.raises(UserError, match="changed: supervised"):
            changes_on_resume(before, load_config(path, [change]))
