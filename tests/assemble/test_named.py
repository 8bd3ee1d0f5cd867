"""Names as others read them: no path of a machine in a card or a report."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffusion_align.assemble.card_facts import card_of
from diffusion_align.assemble.named import run_name, shown_name, shown_names
from diffusion_align.config import load_config
from diffusion_align.policy.tuned import Tuned


@pytest.mark.parametrize(
    ("words", "shown"),
    [
        ("0.7*aesthetic + 0.3*/home/me/runs/mine", "0.7*aesthetic + 0.3*mine"),
        ("percent(/home/me/a) - 2*unit(~/b/c)", "percent(a) - 2*unit(c)"),
        ("/home/me/a.txt", "a.txt"),
        ("runs/my reward", "my reward"),
        (r"C:\Users\me\runs\mine", "mine"),
        (r"0.5*aesthetic + 0.5*C:\Users\me\mine", "0.5*aesthetic + 0.5*mine"),
        ("0.5*my_package.module:Reward + 0.5*taste", "0.5*my_package.module:Reward + 0.5*taste"),
        ("hpsv2.1", "hpsv2.1"),
        (["a cat", "a dog"], "a list in the config"),
    ],
)
def test_of_a_path_only_the_last_part_is_shown(words: str | list[str], shown: str) -> None:
    assert shown_name(words) == shown


def test_no_two_names_are_read_alike() -> None:
    names = ["/a/mine", "/b/mine", "mine", "/a/mine", "taste"]
    assert shown_names(names) == {
        "/a/mine": "mine",
        "/b/mine": "mine (2)",
        "mine": "mine (3)",
        "taste": "taste",
    }


def test_a_run_is_called_after_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine" / "final").mkdir(parents=True)
    assert run_name(tmp_path / "mine") == run_name(tmp_path / "mine" / "final") == "mine"
    monkeypatch.chdir(tmp_path / "mine")
    assert run_name(Path(".")) == run_name(Path("final")) == "mine"


def test_the_settings_of_a_card_are_those_of_learning(tmp_path: Path) -> None:
    config = load_config("rwr_tiny", ["train.trackers=[tensorboard]", f"output={tmp_path}/mine"])
    card = card_of(config, Tuned(tmp_path / "lora.safetensors", whole=False), "lora", "")
    keys = {key for key, _ in card.settings}
    assert {"train.learning_rate", "train.steps", "lora.rank", "algorithm.name"} <= keys
    assert not keys & {"train.trackers", "train.log_every", "train.keep_checkpoints"}
