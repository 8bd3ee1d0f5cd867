"""The running average: its closed form, who sees it, and exact resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffusion_align.errors import OptionError
from diffusion_align.reporting.console import Quiet
from diffusion_align.training.checkpoint import load_checkpoint
from diffusion_align.training.ema import Average
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions

OPTIONS = TrainOptions(
    steps=8,
    learning_rate=1e-2,
    accumulation=2,
    checkpoint_every=1,
    keep_checkpoints=9,
    sample_every=2,
    ema_decay=0.8,
)


def run(algorithm: Any, folder: Path, **options: Any) -> Any:
    return train(algorithm, output=folder, **{"options": OPTIONS, "reporter": Quiet(), **options})


def final(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "final" / "w.safetensors")


@pytest.mark.parametrize("every", [1, 3])
def test_the_average_is_its_closed_form(every: int) -> None:
    generator = np.random.default_rng(0)
    path = generator.standard_normal((13, 5))  # p_0 ... p_12 in float64
    parameter = nn.Parameter(torch.tensor(path[0], dtype=torch.float32))
    average = Average([parameter], 0.9, every)
    for step in range(1, 13):
        parameter.data = torch.tensor(path[step], dtype=torch.float32)
        average.update(step)
    seen = path[every::every]
    n = len(seen)
    expected = 0.9**n * path[0] + 0.1 * sum(0.9 ** (n - k) * p for k, p in enumerate(seen, start=1))
    np.testing.assert_allclose(average.values[0].numpy(), expected, rtol=1e-5, atol=1e-6)


def test_the_average_of_bfloat16_weights_is_kept_in_float32() -> None:
    parameter = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    average = Average([parameter], 0.999, 1)
    parameter.data.fill_(2.0)
    average.update(1)
    assert average.values[0].dtype == torch.float32
    # In bfloat16, 1 + 0.001 is 1.
    torch.testing.assert_close(average.values[0], torch.full((3,), 1.001))


def test_looking_through_the_average_gives_back_the_same_bits() -> None:
    parameter = nn.Parameter(torch.randn(7, generator=torch.Generator().manual_seed(0)))
    average = Average([parameter], 0.5, 1)
    with torch.no_grad():
        parameter.mul_(3)
    average.update(1)
    before = parameter.detach().clone()
    with pytest.raises(KeyError), average.in_place():
        assert torch.equal(parameter, average.values[0]) and not torch.equal(parameter, before)
        raise KeyError
    assert torch.equal(parameter, before)


class Look:
    """A probe that writes down the weights it sees."""

    def __init__(self, policy: Any) -> None:
        self.policy, self.seen = policy, {}  # type: ignore[var-annotated]

    def samples(self, step: int, folder: Path) -> None:
        self.seen[step] = [p.detach().clone() for p in self.policy.bare.parameters()]

    def heldout(self, step: int) -> Mapping[str, float]:
        return {"weight": float(next(self.policy.bare.parameters()).detach()[0, 0])}


def test_pictures_and_final_are_averaged_and_checkpoints_hold_both(
    regression: ModuleType, tmp_path: Path
) -> None:
    averaged, raw = regression.Regression(), regression.Regression()
    probe = Look(averaged.policy)
    run(averaged, tmp_path / "averaged", probe=probe)
    run(raw, tmp_path / "raw", options=replace(OPTIONS, ema_decay=0.0))
    # The average takes no part in the training.
    path = [
        [
            load_checkpoint(tmp_path / name / "checkpoints" / f"step_{step:06d}")
            for step in (2, 4, 6, 8)
        ]
        for name in ("averaged", "raw")
    ]
    for mine, plain in zip(*path, strict=True):
        for name, value in plain.parameters.items():
            assert torch.equal(mine.parameters[name], value)
        assert plain.state["average"] is None
    last = path[0][-1]
    names = [name for name, _ in averaged.policy.bare.named_parameters()]
    stored = dict(zip(names, last.state["average"], strict=True))  # in the optimiser's order
    written = final(tmp_path / "averaged")
    assert not torch.equal(written["weight"], last.parameters["weight"])
    for name, value in written.items():
        assert torch.equal(value, stored[name])
    named = averaged.policy.bare.named_parameters()
    for (name, now), seen in zip(named, probe.seen[8], strict=True):
        assert torch.equal(now, stored[name])  # the policy in memory is what final/ is
        assert torch.equal(seen, stored[name])


def test_a_crash_and_a_resume_keep_the_average_bit_for_bit(
    regression: ModuleType, tmp_path: Path
) -> None:
    options = replace(OPTIONS, ema_every=3)
    run(regression.Regression(), tmp_path / "straight", options=options)

    calls = 0

    def crash(place: str) -> None:
        nonlocal calls
        calls += place == "losses"
        if calls == 11:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(regression.Regression(event=crash), tmp_path / "broken", options=options)
    resumed = regression.Regression()
    run(resumed, tmp_path / "broken", options=options, resume=True)
    for name, value in final(tmp_path / "straight").items():
        assert torch.equal(value, final(tmp_path / "broken")[name])
    ends = [
        load_checkpoint(tmp_path / name / "checkpoints" / "step_000008").state["average"]
        for name in ("straight", "broken")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("wrong", [{"ema_decay": 1.0}, {"ema_decay": -0.1}, {"ema_every": 0}])
def test_a_decay_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(OptionError, match="ema"):
        TrainOptions(**wrong)
