"""Where metrics go."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from diffusion_align.errors import UserError
from diffusion_align.reporting.trackers import open_trackers


def test_jsonl_is_always_there_appends_and_writes_no_nan(tmp_path: Path) -> None:
    for step in (1, 2):
        (tracker,) = open_trackers((), tmp_path)
        tracker.log({"step": step, "reward/mean": float("nan") if step == 1 else 0.5})
        # Flushed at once: a crash after this loses nothing.
        assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == step
        tracker.close()
    rows = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "reward/mean": None}, {"step": 2, "reward/mean": 0.5}]


@pytest.mark.parametrize(
    ("name", "module"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb")]
)
def test_a_missing_extra_says_how_to_install_it(
    name: str, module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError) as caught:
        open_trackers((name,), tmp_path)
    assert f"pip install 'diffusion-align[{name}]'" in str(caught.value)


def test_an_unknown_tracker_is_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="wandbb") as caught:
        open_trackers(("wandbb",), tmp_path)
    assert "did you mean wandb" in str(caught.value)


def test_a_resumed_run_continues_the_same_wandb_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    logged: list[Any] = []

    def init(**options: Any) -> Any:
        asked.append(options["id"])
        return SimpleNamespace(
            id="abc", log=lambda row, step: logged.append((step, row)), finish=lambda: None
        )

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    for _ in range(2):
        trackers = open_trackers(("wandb",), tmp_path)
        trackers[1].log({"step": 3, "a": 1.0, "bad": float("inf")})
        trackers[1].close()
    assert asked == [None, "abc"]
    assert logged[0] == (3, {"step": 3, "a": 1.0})


def test_tensorboard_gets_scalars_by_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[Any] = []

    class Writer:
        def __init__(self, folder: str) -> None:
            self.folder = folder

        def add_scalar(self, name: str, value: float, step: int) -> None:
            calls.append((name, value, step))

        def close(self) -> None:
            calls.append("closed")

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer)
    )
    trackers = open_trackers(("tensorboard",), tmp_path)
    trackers[1].log({"step": 2, "reward/mean": 0.5})
    trackers[1].close()
    assert ("reward/mean", 0.5, 2) in calls and calls[-1] == "closed"
