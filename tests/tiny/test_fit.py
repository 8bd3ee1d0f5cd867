"""The builder's training loop: it learns, and an interrupted run ends where a whole one does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from diffusion_align.tiny.fit import fit


class Interrupted(Exception):
    pass


def regression(model: nn.Module, stop_at: int | None = None) -> Callable[[torch.Generator], Tensor]:
    calls = 0

    def step(generator: torch.Generator) -> Tensor:
        nonlocal calls
        calls += 1
        if stop_at is not None and calls > stop_at:
            raise Interrupted
        x = torch.randn(64, 3, generator=generator)
        y = x @ torch.tensor([1.0, -2.0, 0.5]) + 0.3
        return (model(x).squeeze(1) - y).square().mean()

    return step


def new_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1)


def test_it_learns_a_known_answer(tmp_path: Path) -> None:
    model = new_model()
    fit(
        model,
        regression(model),
        steps=400,
        learning_rate=0.05,
        checkpoint=tmp_path / "a.pt",
        seed=1,
        warmup=10,
    )
    assert torch.allclose(model.weight, torch.tensor([[1.0, -2.0, 0.5]]), atol=1e-2)  # type: ignore[arg-type]


def test_an_interrupted_run_ends_with_the_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"steps": 40, "learning_rate": 0.05, "seed": 1, "warmup": 5, "ema_decay": 0.9}
    whole = new_model()
    fit(whole, regression(whole), checkpoint=tmp_path / "whole.pt", **options)  # type: ignore[arg-type]

    monkeypatch.setattr("diffusion_align.tiny.fit.CHECKPOINT_SECONDS", 0.0)
    first = new_model()
    with pytest.raises(Interrupted):
        fit(first, regression(first, 23), checkpoint=tmp_path / "cut.pt", **options)  # type: ignore[arg-type]
    second = new_model()
    fit(second, regression(second), checkpoint=tmp_path / "cut.pt", **options)  # type: ignore[arg-type]
    assert torch.equal(second.weight, whole.weight)  # type: ignore[arg-type]
