"""A run with a supervised step: from a folder of pictures to weights, cut and gone on with."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

Call = Callable[..., Any]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of other sizes than the model's, each with its caption beside it."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(5):
        colour = (50 * number, 255 - 50 * number, 128)
        Image.new("RGB", (40 + number, 50), colour).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"a plain {number}", encoding="utf-8")
    return folder


@pytest.fixture
def config(model: Path, pictures: Path, tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"""\
model:
  id: {model}
  device: cpu
lora:
  rank: 2
prompts:
  source: [a cat, a dog]
sampling:
  steps: 2
  guidance_scale: 1.0
reward: tiny-hps
algorithm:
  name: draft
  preset: draft
  range_check: "off"          # a model of random weights draws no pictures
  prompts_per_iteration: 2
  train_batch_size: 2
supervised:
  pictures: {pictures}
  every: 2
  batch_size: 3
  pictures_per_loss: 2
train:
  steps: 4
  learning_rate: 1e-2
  checkpoint_every: 1
  sample_every: 100
evaluation:
  prompts: [a bird]
  sample_prompts: 1
  report: false
""",
        encoding="utf-8",
    )
    return path


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "final" / "pytorch_lora_weights.safetensors")


def test_it_is_taken_when_due_and_a_cut_run_ends_with_the_same_bits(
    config: Path, pictures: Path, call: Call, tmp_path: Path
) -> None:
    def go(*words: object) -> Any:
        done = call("train", config, *words)
        assert done.exit_code == 0, (done.stderr, done.exception)
        return done

    said = go("--output", tmp_path / "whole").stderr
    assert "supervised step: one iteration in 2, 3 of 5 pictures, weight 1" in said
    rows = [json.loads(row) for row in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()]
    seen = {row["step"]: row.get("supervised/loss") for row in rows if row["step"]}
    assert [step for step, loss in seen.items() if loss is not None] == [1, 3]
    assert seen[1] > 0
    # 3 pictures x (a forward and a backward that counts as two), beside the method's own calls.
    costs = [row["cost/calls"] for row in rows if row["step"]]
    steps = [after - before for before, after in zip([0, *costs], costs)]
    assert steps == [steps[1] + 9, steps[1], steps[1] + 9, steps[1]]

    go("train.steps=2", "--output", tmp_path / "cut")
    go("--resume", "--output", tmp_path / "cut")
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)
    go("supervised.weight=1e-9", "--output", tmp_path / "other")
    other = weights(tmp_path / "other")
    assert any(not torch.equal(whole[name], other[name]) for name in whole)


def test_other_captions_or_pictures_are_refused_on_resume(
    config: Path, pictures: Path, call: Call, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert call("train", config, "train.steps=1", "--output", run).exit_code == 0
    (pictures / "2.txt").write_text("something else", encoding="utf-8")
    done = call("train", config, "train.steps=2", "--resume", "--output", run)
    assert done.exit_code == 2
    assert "changed since it began: supervised.pictures" in done.stderr
    (pictures / "2.txt").write_text("a plain 2", encoding="utf-8")
    Image.new("RGB", (500, 300)).save(pictures / "2.png")
    done = call("train", config, "train.steps=2", "--resume", "--output", run)
    assert done.exit_code == 2
    assert "not the pictures or captions that the run began with" in done.stderr


def test_pictures_without_captions_are_named(config: Path, pictures: Path, call: Call) -> None:
    (pictures / "1.txt").unlink()
    (pictures / "3.txt").unlink()
    done = call("train", config, "--output", pictures.parent / "run")
    assert done.exit_code == 2
    assert "1.png: no caption" in done.stderr and "3.png: no caption" in done.stderr
