"""The machinery: precision as asked for, and everything given back, also after a failure."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from diffusion_align import tf32
from diffusion_align.algorithms.base import Needs
from diffusion_align.reporting.console import Quiet
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from diffusion_align.training.setup import Machinery


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_network_runs_in_the_precision_that_was_asked_for(
    regression: ModuleType, tmp_path: Path, precision: Any
) -> None:
    algorithm = regression.Regression()
    seen: list[bool] = []
    # Autocast is on inside the slot's forward, where a hook of the slot itself does not look.
    algorithm.policy.denoiser = torch.nn.Sequential(algorithm.policy.bare)
    algorithm.policy.bare.register_forward_pre_hook(
        lambda module, inputs: seen.append(torch.is_autocast_enabled("cpu"))
    )
    options = TrainOptions(steps=1, mixed_precision=precision, sample_every=0)
    train(algorithm, options=options, output=tmp_path / "run", reporter=Quiet())
    assert seen and all(on == (precision == "bf16") for on in seen)


def test_a_set_up_that_fails_leaves_nothing_behind(
    regression: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = regression.Regression()

    def fail(self: Accelerator, optimizer: Any) -> Any:
        raise RuntimeError("no optimiser today")

    with monkeypatch.context() as patched:
        patched.setattr(Accelerator, "prepare_optimizer", fail)
        machinery = Machinery(algorithm, TrainOptions(mixed_precision="bf16"))
        with pytest.raises(RuntimeError, match="no optimiser"), machinery:
            pass
    assert algorithm.policy.denoiser is algorithm.policy.bare
    assert algorithm.policy.denoiser(torch.zeros(1, 6)).dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    assert not AcceleratorState._shared_state
    with Machinery(algorithm, TrainOptions()):  # the next run has the settings it asks for
        assert AcceleratorState().mixed_precision == "no"


@pytest.mark.skipif(torch.cuda.is_available(), reason="it pretends to have a GPU")
@pytest.mark.parametrize("trajectory", [True, False])
def test_tf32_is_off_where_a_likelihood_ratio_needs_it(
    regression: ModuleType, monkeypatch: pytest.MonkeyPatch, trajectory: bool
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    algorithm = regression.Regression(needs=Needs(trajectory=trajectory))
    algorithm.policy.device = torch.device("cuda")
    with Machinery(algorithm, TrainOptions()) as machinery:
        assert tf32.in_use() is not trajectory
        assert any("TF32 is off" in note for note in machinery.notes) is trajectory
    assert tf32.in_use()
    algorithm.policy.bare.bfloat16()
    with Machinery(algorithm, TrainOptions()) as machinery:
        assert tf32.in_use() and not machinery.notes
