"""`sweep` and `evaluation.scale_sweep`: the comparison's numbers at parts of a LoRA's strength."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

Call = Callable[..., Any]

SIZES = """\
prompts:
  source: [a cat, a dog]
sampling:
  steps: 2
  batch_size: 4
reward: compressibility
algorithm:
  name: ddpo
  prompts_per_iteration: 2
  samples_per_prompt: 2
  train_batch_size: 4
  advantages: group
train:
  steps: 1
  learning_rate: 1e-1
evaluation:
  prompts: [a bird, a fish, a cow]
  seeds: 2
  batch_size: 4
  rewards: [incompressibility]
"""


@pytest.fixture(scope="module")
def run(model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run with a sweep at its end, and what it said."""
    from typer.testing import CliRunner

    from diffusion_align.cli import app

    folder = tmp_path_factory.mktemp("runs")
    config = folder / "mine.yaml"
    head = f"model:\n  id: {model}\n  device: cpu\nlora:\n  rank: 2\n"
    config.write_text(f"{head}{SIZES}  scale_sweep: [0, 0.5, 1]\n", encoding="utf-8")
    done = CliRunner().invoke(app, ["train", str(config), "--output", str(folder / "mine")])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return folder / "mine", done.stdout


def scales(folder: Path) -> dict[float, Any]:
    told = json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    return {entry["scale"]: entry["rewards"] for entry in told["scales"]}


def test_a_run_ends_with_it_and_scale_one_is_its_comparison(run: tuple[Path, str]) -> None:
    folder, said = run
    found = scales(folder / "sweep")
    summary = json.loads((folder / "final" / "summary.json").read_text(encoding="utf-8"))
    assert list(found) == [0, 0.5, 1]
    assert found[1] == summary["rewards"]
    assert summary["rewards"]["compressibility"]["difference"] != 0
    assert all(numbers["difference"] == 0 for numbers in found[0].values())
    rows = [line.split("\t") for line in said.splitlines() if "\t" in line]
    assert rows[0][:3] == ["scale", "compressibility (trained)", "incompressibility (held-out)"]
    assert [row[0] for row in rows[1:]] == ["0", "0.5", "1"]
    assert f"numbers: {folder / 'sweep' / 'sweep.json'}" in said
    with Image.open(folder / "sweep" / "sweep.png") as grid:
        assert grid.width > grid.height > 0


def test_the_command_finds_the_same_numbers_from_the_files(
    run: tuple[Path, str], call: Call, tmp_path: Path
) -> None:
    folder, _ = run
    before = (folder / "sweep" / "sweep.json").read_bytes()
    done = call("sweep", folder, "--scales", "1,0.25", "--out", tmp_path / "s", "--device", "cpu")
    assert done.exit_code == 0, (done.stderr, done.exception)
    found = scales(tmp_path / "s")
    assert list(found) == [1, 0.25]
    assert found[1] == scales(folder / "sweep")[1]
    assert (folder / "sweep" / "sweep.json").read_bytes() == before


def test_a_finished_run_that_lost_its_sweep_makes_it_again_and_nothing_else(
    run: tuple[Path, str], call: Call
) -> None:
    folder, _ = run
    (folder / "sweep" / "sweep.json").unlink()
    report = (folder / "final" / "report.html").stat().st_mtime_ns
    for again in (True, False):
        done = call("train", folder / "config.yaml", "--resume")
        assert done.exit_code == 0, (done.stderr, done.exception)
        assert ("difference to the base" in done.stdout) == again
    assert list(scales(folder / "sweep")) == [0, 0.5, 1]
    assert (folder / "final" / "report.html").stat().st_mtime_ns == report


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--scales", "a,1"], "'a,1' is no list of numbers"),
        (["--scales", ","], "--scales: is empty"),
        (["--scales", "-1"], "must be at least 0, not -1"),
        (["--scales", "1,1.0"], "1 comes twice"),
    ],
)
def test_scales_that_mean_nothing_are_refused(
    run: tuple[Path, str], call: Call, words: list[str], said: str
) -> None:
    done = call("sweep", run[0], *words)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_model_that_was_trained_in_full_is_refused_in_one_message(
    call: Call, tmp_path: Path, model: Path
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "final").symlink_to(model)
    done = call("sweep", tmp_path / "run")
    assert done.exit_code == 2
    assert "every weight of this model was trained, so there is no LoRA to scale" in done.stderr
    config = tmp_path / "mine.yaml"
    config.write_text(f"model:\n  id: {model}\nlora: null\n{SIZES}  scale_sweep: [1]\n")
    done = call("train", config, "--output", tmp_path / "other")
    assert done.exit_code == 2
    assert "only a LoRA can be scaled, and this config trains the whole denoiser" in done.stderr


def test_a_lora_without_a_run_is_refused(run: tuple[Path, str], call: Call, tmp_path: Path) -> None:
    name = "pytorch_lora_weights.safetensors"
    alone = tmp_path / "a" / "b" / "c" / name
    alone.parent.mkdir(parents=True)
    alone.write_bytes((run[0] / "final" / name).read_bytes())
    done = call("sweep", alone)
    assert done.exit_code == 2
    assert "no config.yaml of a run lies beside this LoRA" in done.stderr
