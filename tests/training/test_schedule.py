"""The learning rate is a function of the step, in a run that is resumed as well."""

from __future__ import annotations

import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from diffusion_align.errors import OptionError
from diffusion_align.reporting.console import Quiet
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions


def rates(options: TrainOptions) -> list[float]:
    return [options.learning_rate_at(step) for step in range(options.steps)]


def test_the_default_is_constant_from_the_first_step() -> None:
    assert set(rates(TrainOptions(steps=50))) == {TrainOptions().learning_rate}


def test_the_warm_up_rises_in_a_line_and_ends_at_the_highest_rate() -> None:
    found = rates(TrainOptions(steps=8, learning_rate=1e-2, warmup_steps=4))
    assert found == pytest.approx([2.5e-3, 5e-3, 7.5e-3, 1e-2, 1e-2, 1e-2, 1e-2, 1e-2])


def test_the_cosine_is_torch_s() -> None:
    options = TrainOptions(steps=20, learning_rate=1.0, schedule="cosine", warmup_steps=5)
    optimiser = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    oracle = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=15)
    for step in range(5, 20):
        assert options.learning_rate_at(step) == pytest.approx(oracle.get_last_lr()[0], abs=1e-12)
        optimiser.step()
        oracle.step()
    assert options.learning_rate_at(20) == pytest.approx(0, abs=1e-12)
    assert options.learning_rate_at(99) == pytest.approx(0, abs=1e-12)


def test_a_warm_up_longer_than_the_run_never_reaches_the_highest_rate() -> None:
    found = rates(TrainOptions(steps=3, learning_rate=1.0, schedule="cosine", warmup_steps=10))
    assert found == pytest.approx([0.1, 0.2, 0.3])


def test_a_negative_warm_up_is_refused() -> None:
    with pytest.raises(OptionError, match="warmup_steps"):
        TrainOptions(warmup_steps=-1)


def test_a_run_uses_it_and_a_resumed_run_goes_on_with_it(
    regression: ModuleType, tmp_path: Path
) -> None:
    options = TrainOptions(
        steps=8, learning_rate=1e-2, schedule="cosine", warmup_steps=3, checkpoint_every=1
    )

    def weights(folder: Path) -> bytes:
        return (folder / "final" / "w.safetensors").read_bytes()

    whole = train(regression.Regression(), options=options, output=tmp_path / "a", reporter=Quiet())
    logged = [row["train/learning_rate"] for row in whole.rows()]
    assert logged == pytest.approx(rates(options))
    assert logged[3] == 1e-2 and logged[7] < logged[4]
    assert not math.isclose(logged[0], logged[1])

    def stop(place: str) -> None:
        if place == "collect" and stopping.collected == 1:
            raise RuntimeError("stopped")

    stopping = regression.Regression(event=stop)
    with pytest.raises(RuntimeError, match="stopped"):
        train(stopping, options=options, output=tmp_path / "b", reporter=Quiet())
    train(
        regression.Regression(),
        options=options,
        output=tmp_path / "b",
        resume=True,
        reporter=Quiet(),
    )
    assert weights(tmp_path / "b") == weights(tmp_path / "a")
