"""The weights of the best look stay as long as a checkpoint that may be resumed knows them."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from diffusion_align.reporting.console import Quiet
from diffusion_align.training.best import BestWeights
from diffusion_align.training.checkpoint import load_checkpoint
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions


class Rising:
    """Every look is better than the one before."""

    def samples(self, step: int, folder: Path) -> None:
        pass

    def heldout(self, step: int) -> dict[str, float]:
        return {"taste": float(step)}

    def scores(self, step: int) -> dict[str, Any]:
        return {"taste": np.arange(8.0).reshape(4, 2) + 0.3 * step}


def run(regression: ModuleType, folder: Path, steps: int, **options: Any) -> None:
    chosen = {"learning_rate": 1e-3, "sample_every": 3, "checkpoint_every": 2, **options}
    train(
        regression.Regression(),
        options=TrainOptions(steps=steps, **chosen),
        output=folder,
        resume=(folder / "metrics.jsonl").exists(),
        reporter=Quiet(),
        probe=Rising(),
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def known(checkpoint: Path) -> int:
    return int(load_checkpoint(checkpoint).state["guards"]["heldout"]["best"][0])


@pytest.mark.parametrize("keep", [1, 2])
def test_each_kept_checkpoint_finds_its_best_weights(
    regression: ModuleType, tmp_path: Path, keep: int
) -> None:
    """Looks at 3, 6, 9, 12, 15, 16; checkpoints at 8 and 16."""
    folder = tmp_path / "run"
    run(regression, folder, 16, keep_checkpoints=keep)
    checkpoints = sorted((folder / "checkpoints").iterdir())
    assert len(checkpoints) == keep
    assert names(folder / "best") == [f"step_{known(path):06d}" for path in checkpoints]
    if keep == 1:
        return
    before = {path.name: path.read_bytes() for path in (folder / "best" / "step_000006").iterdir()}
    torn = checkpoints[-1] / "state.pt"
    torn.write_bytes(torn.read_bytes()[:100])
    run(regression, folder, 8, keep_checkpoints=keep)  # nothing is left to do at step 8
    assert names(folder / "best") == ["step_000006"]
    after = {path.name: path.read_bytes() for path in (folder / "best" / "step_000006").iterdir()}
    assert before and before == after


def test_what_belongs_to_no_checkpoint_goes_and_what_is_newer_stays(tmp_path: Path) -> None:
    best = BestWeights(tmp_path / "best")
    for step in (2, 4, 6, 9, 12):
        best.keep(step, lambda place: torch.save(torch.ones(1), place / "w.pt"))
    best.settle([3, 8])
    assert names(tmp_path / "best") == ["step_000002", "step_000006", "step_000009", "step_000012"]
    best.settle([8, 10])
    assert names(tmp_path / "best") == ["step_000006", "step_000009", "step_000012"]
    best.cut(9)
    best.settle([10])
    assert names(tmp_path / "best") == ["step_000009"]
