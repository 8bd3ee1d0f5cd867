"""Every command's answers, good and bad, called as from a shell but in this process."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_align import assemble
from diffusion_align.assemble import run as loading_home
from diffusion_align.errors import UserError

Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in a folder of their own, far from the checkout."""
    monkeypatch.chdir(tmp_path)


def pictures(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    noise = np.random.default_rng(0)
    for number in range(count):
        pixels = noise.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return folder


def test_config_lists_shows_copies_and_states_its_schema(call: Call, tmp_path: Path) -> None:
    assert "demo" in call("config").stdout.split()
    shown = call("config", "--show", "demo", "train.steps=7")
    assert "\n  steps: 7  #" in shown.stdout
    schema = json.loads(call("config", "--schema").stdout)
    assert schema["$defs"]["policy_config"]["properties"]["train"]
    copied = call("config", "--copy", "demo", "mine.yaml")
    assert copied.exit_code == 0
    assert "train mine.yaml" in copied.stdout
    again = call("config", "--copy", "demo", "mine.yaml")
    assert again.exit_code == 2
    assert "mine.yaml: exists already and is left as it is" in again.stderr
    assert call("config", "--show", "mine.yaml").exit_code == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("config", "--show", "dmeo"), "did you mean  demo ?"),
        (("config", "--schema", "--show", "demo"), "choose one"),
        (("config", "--schema", "left-over"), "what is 'left-over' ?"),
        (("train", "demo", "--resume", "--new"), "exclude each other"),
        (("train", "demo", "--resume"), "there is no run to resume"),
        (("train", "demo", "output=file.txt"), "this is a file"),
        (("sample", "tinysd", "--prompts", "animals", "--out", "o"), "did you mean tiny-sd"),
        (("sample", "tiny-sd", "--prompts", "animols", "--out", "o"), "did you mean animals ?"),
        (
            ("sample", "tiny-sd", "--prompts", "animals", "--out", "o", "--lora", "nowhere"),
            "nowhere: no such LoRA or model",
        ),
        (("score", "nowhere", "--reward", "taste"), "nowhere: no such file or folder"),
        (("score", "file.txt", "--reward", "tast"), "did you mean taste"),
        (("score", "file.txt", "--reward", ","), "no reward is named"),
        (("score", "file.txt", "--reward", "taste,taste"), "named twice"),
        (
            ("score", "file.txt", "--reward", "taste", "--prompt", "a", "--prompts", "file.txt"),
            "not both",
        ),
        (
            (
                *("compare", "tiny-sd", "--tuned", ".", "--prompts", "animals"),
                *("--reward", "tast", "--out", "o"),
            ),
            "did you mean taste",
        ),
    ],
)
def test_a_mistake_is_answered_with_exit_code_2(
    call: Call, tmp_path: Path, words: tuple[str, ...], said: str
) -> None:
    (tmp_path / "file.txt").write_text("a cat\n", encoding="utf-8")
    done = call(*words)
    assert done.exit_code == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "o").exists()


def test_an_unknown_command_or_option_is_shown_the_nearest(call: Call) -> None:
    assert "train" in call("trian").stderr
    assert call("trian").exit_code == 2
    assert call("train").exit_code == 2


def test_a_bug_keeps_its_traceback(call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(assemble, "train_run", broken)
    done = call("train", "demo")
    assert isinstance(done.exception, RuntimeError)


def test_an_existing_run_is_answered_with_both_commands(call: Call, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = call("train", "demo")
    assert done.exit_code == 2
    assert "--resume" in done.stderr
    assert "--new" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", [("train", "demo", "--new"), ("demo",)])
def test_an_old_run_stays_where_it_is_when_the_new_one_cannot_be_loaded(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: tuple[str, ...]
) -> None:
    def unloadable(*args: object, **options: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(loading_home, "load_policy", unloadable)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    before = sorted(tmp_path.rglob("*"))
    done = call(*command)
    assert done.exit_code == 2
    assert "far enough" in done.stderr
    assert sorted(tmp_path.rglob("*")) == before


def test_a_new_run_puts_the_old_one_aside(call: Call, tmp_path: Path) -> None:
    from diffusion_align.assemble.run import begin_run
    from diffusion_align.config import load_config

    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    assert begin_run(load_config("demo"), {}, new=True).path.resolve() == run
    assert "steps: " in (run / "config.yaml").read_text(encoding="utf-8")
    kept = [path.parent for path in tmp_path.rglob("metrics.jsonl")]
    assert len(kept) == 1
    assert kept[0] != run


def test_resuming_tells_what_was_changed(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*args: object, **options: object) -> None:
        raise UserError("far enough")

    monkeypatch.setattr(assemble, "train_run", stopped)
    run = tmp_path / "runs" / "demo"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text(call("config", "--show", "demo").stdout, encoding="utf-8")
    (run / "metrics.jsonl").write_text('{"step": 3}\n', encoding="utf-8")
    same = call("train", run / "config.yaml", "--resume")
    assert "changed" not in same.stderr
    done = call("train", "demo", "--resume", "train.steps=7", "evaluation.seeds=3")
    assert "changed since this run began: train.steps: " in done.stderr
    assert " -> 7" in done.stderr
    assert "evaluation.seeds: 4 -> 3" in done.stderr
    recorded = (run / "config.yaml").read_bytes()
    done = call("train", "demo", "--resume", "train.steps=9", "seed=3")
    assert done.exit_code == 2
    assert "changed: seed: 0 -> 3" in done.stderr
    assert (run / "config.yaml").read_bytes() == recorded


def test_an_output_that_cannot_be_written_is_refused_before_anything_is_loaded(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pictures").mkdir()
    (tmp_path / "runs" / "demo" / "config.yaml").mkdir(parents=True)
    done = call("train", "demo")
    assert done.exit_code == 2
    assert "runs/demo/config.yaml: this is a folder; a file is needed" in done.stderr
    # Permissions do not bind the superuser, whom tests may run as.
    monkeypatch.setattr(os, "access", lambda place, mode: not mode & os.W_OK)
    for words in (
        ("sample", "tiny-sd", "--prompts", "animals", "--out", "pictures/new"),
        ("score", "pictures", "--reward", "taste", "--out", "pictures/new/scores.jsonl"),
    ):
        done = call(*words)
        assert done.exit_code == 2
        assert "pictures: cannot write here" in done.stderr


def test_ctrl_c_while_loading_promises_nothing_of_the_run_that_was_there(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "train_run", interrupted)
    run = tmp_path / "runs" / "demo"
    (run / "checkpoints" / "step_000004").mkdir(parents=True)
    done = call("train", "demo", "--new")
    assert done.exit_code == 130
    assert "before the first checkpoint" in done.stderr


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_ends_with_a_word_on_what_was_saved(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, saved: bool
) -> None:
    def interrupted(*args: object, **options: object) -> None:
        if saved:
            (tmp_path / "runs" / "demo" / "checkpoints" / "step_000004").mkdir(parents=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(assemble, "train_run", interrupted)
    done = call("train", "demo")
    assert done.exit_code == 130
    assert "Traceback" not in done.stderr
    if saved:
        assert "step_000004" in done.stderr
        assert "diffusion-align train runs/demo/config.yaml --resume" in done.stderr
    else:
        assert "before the first checkpoint" in done.stderr


def test_score_writes_rows_and_goes_on_where_it_stopped(call: Call, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures")
    (folder / "broken.png").write_bytes(b"not a picture")
    words = ("score", folder, "--reward", "compressibility", "--out", "s.jsonl")
    done = call(*words)
    assert done.exit_code == 0
    assert "3 of 4 scored" in done.stdout
    assert "broken.png" in done.stderr
    rows = [json.loads(line) for line in Path("s.jsonl").read_text().splitlines()]
    assert {"path", "prompt", "scores", "error"} == set(rows[0])
    assert sum(row["scores"]["compressibility"] is None for row in rows) == 1
    before = Path("s.jsonl").read_bytes()
    assert call(*words).exit_code == 0
    assert Path("s.jsonl").read_bytes() == before


def test_score_needs_prompts_where_the_reward_does(call: Call, tmp_path: Path) -> None:
    folder = pictures(tmp_path / "pictures", 1)
    done = call("score", folder, "--reward", "verifier", "--out", "s.jsonl")
    assert done.exit_code == 2
    assert "needs a prompt" in done.stderr
    prompt = "a large red circle at the top left on a white background"
    done = call("score", folder, "--reward", "verifier", "--out", "s.jsonl", "--prompt", prompt)
    assert done.exit_code == 0
