"""Canaries: secrets planted where a run may meet them are nowhere in what it leaves behind."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
Call = Callable[..., Any]

# One for each way in: an environment variable that a prompt repeats, a URL in a config value, its
# query, a token that is known by its shape alone, and one in an exception's message.
OF_ENVIRONMENT = "cAnary1&\"e<nv'é9z8y7"
OF_LOGIN, OF_QUERY = "cAnary2login77", "cAnary3query77"
OF_SHAPE = "hf_cAnary4ShapeabcdefghiJ0123456789"
OF_ERROR = "cAnary5error1234567"
CANARIES = [OF_ENVIRONMENT, OF_LOGIN, OF_QUERY, OF_SHAPE, OF_ERROR]
TRACKERS = ["tensorboard"] if importlib.util.find_spec("tensorboard") else []

PLUGIN = """\
import os, sys, warnings
import torch
from reward_models.base import RewardError

calls = 0

def loud(media, prompts):
    global calls
    calls += 1
    secret = os.environ["MY_SECRET"]
    print("the plug-in says", secret)
    warnings.warn("the plug-in warns of " + secret)
    if calls > int(os.environ.get("ALLOWED_CALLS", "1000")):
        raise RuntimeError("the server at " + secret + " is gone")
    return media.mean(dim=(1, 2, 3)) + torch.arange(len(prompts)) / 100
"""


def write_config(folder: Path, model: Path) -> Path:
    (folder / "loud_plugin.py").write_text(PLUGIN)
    path = folder / "mine.yaml"
    path.write_text(
        f"""\
model: {{id: {model}, device: cpu}}
lora: {{rank: 2}}
prompts:
  source: ["a cat ${{MY_TOKEN}}", a dog {OF_SHAPE}, a cow, a fox]
  negative: see https://joe:{OF_LOGIN}@host/x?token={OF_QUERY}&n=2
sampling: {{steps: 3, batch_size: 4}}
reward: loud_plugin:loud
algorithm:
  name: ddpo
  prompts_per_iteration: 4
  samples_per_prompt: 2
  train_batch_size: 8
  advantages: prompt
train:
  steps: 2
  checkpoint_every: 1
  sample_every: 1
  trackers: {json.dumps(TRACKERS)}
evaluation:
  prompts: ["a bird ${{MY_TOKEN}}", a fish {OF_SHAPE}]
  seeds: 2
  sample_prompts: 2
  rewards: [compressibility]
""",
        encoding="utf-8",
    )
    return path


def leaks(place: Path | str) -> list[str]:
    """Where canaries stand in a text, or in the names and bytes of all files of a folder."""
    if isinstance(place, str):
        files = [("the text", place.encode())]
    else:
        paths = [path for path in place.rglob("*") if path.is_file()]
        assert len(paths) > 10
        files = [(str(path.relative_to(place)), path.read_bytes()) for path in paths]
    found = []
    for canary in CANARIES:
        forms = {
            canary.encode(),
            json.dumps(canary)[1:-1].encode(),
            base64.b64encode(canary.encode()),
            # what is left of it under any escaping
            canary.encode()[:7],
        }
        found += [
            f"{canary} in {name}"
            for name, data in files
            if canary in name or any(form in data for form in forms)
        ]
    return found


@pytest.fixture
def planted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("MY_TOKEN", OF_ENVIRONMENT)
    monkeypatch.setenv("MY_SECRET", OF_ERROR)
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def test_the_grep_sees_a_canary_in_every_disguise(tmp_path: Path) -> None:
    for number in range(30):
        (tmp_path / f"{number}.txt").write_text("nothing")
    assert leaks(tmp_path) == [] and leaks("nothing") == []
    (tmp_path / "1.txt").write_text(json.dumps(OF_ENVIRONMENT))
    (tmp_path / "2.txt").write_bytes(b"\0" + base64.b64encode(OF_SHAPE.encode()))
    (tmp_path / OF_LOGIN).write_text("")
    assert len(leaks(tmp_path)) == 3
    assert leaks(f"a {OF_ERROR} b")


@pytest.mark.filterwarnings("ignore:the plug-in warns")
def test_a_run_leaves_no_secret_and_can_be_resumed_from_its_own_config(
    planted: Path, model: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, run = write_config(planted, model), planted / "run"
    with pytest.warns(UserWarning, match="take it from the environment") as warned:
        done = call("train", config, "--output", run)
    assert done.exit_code == 0, (done.stderr, done.exception)
    said = [str(w.message) for w in warned if "take it from" in str(w.message)]
    # Of the prompts two hold a token as it is, and the negative prompt a login.
    assert [text.split("  ")[1] for text in said] == [
        "prompts.source",
        "prompts.negative",
        "evaluation.prompts",
    ]
    assert leaks(run) == [] and leaks("\n".join(said)) == []
    ours = [line for line in done.output.splitlines() if not line.startswith("the plug-in says")]
    assert leaks("\n".join(ours)) == []
    record = (run / "config.yaml").read_text(encoding="utf-8")
    assert "a cat ${MY_TOKEN}" in record and "***huggingface-token***" in record
    rows = (run / "samples/step_000001/prompts.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(rows[0])["prompt"] == "a bird ***MY_TOKEN***"

    # The config that it was begun with goes on, secrets and all.
    with pytest.warns(UserWarning, match="take it from the environment"):
        on = call("train", config, "train.steps=3", "--output", run, "--resume", "--no-compare")
    assert on.exit_code == 0, (on.stderr, on.exception)
    assert leaks(run) == []
    # Its own record does not: the secrets that came from nowhere are lost, and it says so.
    refused = call("train", run / "config.yaml", "--resume")
    assert refused.exit_code == 2
    assert "prompts.negative  a secret stood here (url-credentials)" in refused.stderr
    assert "MY_TOKEN" not in refused.stderr  # this one is known
    monkeypatch.delenv("MY_TOKEN")
    refused = call("train", run / "config.yaml", "--resume")
    assert "the environment variable MY_TOKEN is not set" in refused.stderr


def run_command(config: Path, run: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diffusion_align.cli", "train", str(config), "--output", str(run)],
        cwd=config.parent,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{config.parent}", **variables},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.mark.slow
def test_a_process_shows_no_secret_not_even_in_a_traceback(planted: Path, model: Path) -> None:
    config = write_config(planted, model)
    done = run_command(config, planted / "run")
    assert done.returncode == 0, done.stderr
    assert "the plug-in says ***MY_SECRET***" in done.stdout
    assert leaks(done.stdout + done.stderr) == [] and leaks(planted / "run") == []
    broken = run_command(config, planted / "broken", ALLOWED_CALLS="3")
    assert broken.returncode != 0 and "***MY_SECRET***" in broken.stderr
    assert "is gone" in broken.stderr
    assert leaks(broken.stdout + broken.stderr) == [] and leaks(planted / "broken") == []
