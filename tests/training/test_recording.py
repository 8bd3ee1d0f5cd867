"""What the loop hands to trackers: rows, pictures, and the same run after a resume."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_align.reporting.console import Quiet
from diffusion_align.reporting.trackers.opening import REMEMBERED
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions


class Look:
    """A probe that writes one picture and one held-out score."""

    def samples(self, step: int, folder: Path) -> None:
        Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(folder / "p0000_s00.png")
        row = {"path": "p0000_s00.png", "prompt": f"a circle at {step}"}
        (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")

    def heldout(self, step: int) -> Mapping[str, float]:
        return {"taste": step / 10}

    def scores(self, step: int) -> Mapping[str, Any]:
        return {"taste": np.full((1, 1), step / 10)}


@pytest.mark.parametrize("remembers", ["the run folder", "the checkpoint"])
def test_a_resumed_run_goes_on_in_the_same_tracker_with_rows_and_pictures(
    tmp_path: Path, regression: ModuleType, monkeypatch: pytest.MonkeyPatch, remembers: str
) -> None:
    names: list[str] = []
    logged: list[tuple[int | None, dict[str, Any]]] = []

    def init(**asked: Any) -> Any:
        names.append(asked["name"])
        assert asked["config"]["train"]["learning_rate"] == 3e-4
        assert "torch" in asked["config"]["environment"]["packages"]
        return SimpleNamespace(log=lambda data, step: logged.append((step, data)))

    fake = SimpleNamespace(
        init=init, finish=lambda: None, Image=lambda path, caption: (Path(path).name, caption)
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    options = TrainOptions(checkpoint_every=1, sample_every=4, trackers=("trackio",))
    for steps, resume in ((4, False), (8, True)):
        if resume and remembers == "the checkpoint":
            (tmp_path / "run" / REMEMBERED).unlink()
        train(
            regression.Regression(),
            steps=steps,
            options=options,
            output=tmp_path / "run",
            resume=resume,
            reporter=Quiet(),
            probe=Look(),
        )
    assert len(names) == 2 and names[0] == names[1]
    rows = [(step, data) for step, data in logged if "loss" in data]
    assert [step for step, _ in rows] == [1, 2, 3, 4, 5, 6, 7, 8]
    heldout = {step: data["heldout/taste"] for step, data in logged if "heldout/taste" in data}
    assert heldout == {0: 0.0, 4: 0.4, 8: 0.8}
    pictures = {
        step: data["samples/p0000_s00"] for step, data in logged if "samples/p0000_s00" in data
    }
    assert pictures == {step: ("p0000_s00.png", f"a circle at {step}") for step in (0, 4, 8)}
