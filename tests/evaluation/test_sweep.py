"""The adapter-scale sweep: the comparison's numbers at every scale, and how they are told."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align import Policy
from diffusion_align.errors import OptionError, UserError
from diffusion_align.evaluation.compare import compare
from diffusion_align.evaluation.comparison import Result
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.evaluation.sweep import Point, Sweep, sweep
from diffusion_align.sampling.options import SamplingOptions

PROMPTS = ["a red circle", "a dog", "c"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_the_sweep", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("pipeline")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root)
    return root


@pytest.fixture(scope="module")
def policy(pipeline: Path) -> Policy:
    """Its LoRA is moved away from zero, so that tuned differs from base."""
    made = Policy.load(pipeline, lora_rank=2, lora_alpha=3)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in made.trainable_parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)
    return made


def how(policy: Policy, brightness: Any) -> dict[str, Any]:
    size = policy.info.height or 32
    return {
        "rewards": {"light": brightness(), "dark": brightness(-1.0)},
        "trained_on": ["light"],
        "seeds": 2,
        "sampling": SamplingOptions(steps=2, eta=0.0, height=size, width=size, batch_size=4),
        "run_seed": 5,
    }


@pytest.fixture(scope="module")
def weights(policy: Policy) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in policy.trainable_parameters()]


def test_scale_one_is_the_comparison_and_scale_zero_the_base(
    policy: Policy, weights: list[torch.Tensor], brightness: Any, tmp_path: Path
) -> None:
    compared = compare(policy, PROMPTS, output=tmp_path / "final", **how(policy, brightness))
    found = sweep(
        policy, PROMPTS, scales=[0, 0.5, 1], output=tmp_path / "sweep", **how(policy, brightness)
    )
    none, half, whole = found.points
    summary = json.loads((tmp_path / "final" / "summary.json").read_text(encoding="utf-8"))
    told = json.loads((tmp_path / "sweep" / "sweep.json").read_text(encoding="utf-8"))
    assert told["scales"][2]["rewards"] == summary["rewards"]
    assert {k: told[k] for k in ("pairs", "prompts", "trained_on")} == {
        k: summary[k] for k in ("pairs", "prompts", "trained_on")
    }
    for mine, its in zip(whole.results, compared.results, strict=True):
        assert np.array_equal(mine.tuned, its.tuned) and np.array_equal(mine.base, its.base)
    for result in none.results:
        assert np.array_equal(result.tuned, result.base)
    # At half strength the pictures are others than at either end.
    for other in (none, whole):
        assert not np.array_equal(half.results[0].tuned, other.results[0].tuned)
    for parameter, before in zip(policy.trainable_parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
    with Image.open(tmp_path / "sweep" / "sweep.png") as grid:
        assert grid.width > 4 * 128 and grid.height > 3 * 128


def test_a_scale_is_the_weights_times_it(pipeline: Path, policy: Policy) -> None:
    """The oracle scales the second matrices themselves."""
    weaker = Policy.load(pipeline, lora_rank=2, lora_alpha=3)
    with torch.no_grad():
        for (name, mine), its in zip(
            weaker.bare_denoiser.named_parameters(),
            policy.bare_denoiser.parameters(),
            strict=True,
        ):
            mine.copy_(its * 0.25 if ".lora_B." in name else its)
    with policy.adapter_scale(0.25):
        got = predicted(policy)
    assert torch.allclose(got, predicted(weaker), atol=1e-5)
    assert not torch.allclose(got, predicted(policy), atol=1e-2)


def predicted(policy: Policy) -> torch.Tensor:
    cond = policy.encode(["a"], guidance_scale=1.0)
    x = torch.randn(1, *policy.latent_shape(), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return policy.predict(x, torch.tensor(500.0), cond, guidance_scale=1.0)


def test_a_model_without_a_lora_is_refused_before_anything_is_drawn(
    pipeline: Path, brightness: Any, tmp_path: Path
) -> None:
    for full, why in ((True, "every weight"), (False, "load it with one")):
        frozen = Policy.load(pipeline, full=full)
        with pytest.raises(UserError, match="only a LoRA can be scaled") as raised:
            sweep(frozen, PROMPTS, scales=[1.0], output=tmp_path / "x", **how(frozen, brightness))
        assert why in str(raised.value)
    assert not (tmp_path / "x").exists()


def test_the_scale_is_put_back_after_an_error(policy: Policy) -> None:
    before = predicted(policy)
    with pytest.raises(RuntimeError, match="stop"), policy.adapter_scale(0.3):
        raise RuntimeError("stop")
    assert torch.equal(before, predicted(policy))


def point(scale: float, **rises: float) -> Point:
    """Rewards of 20 prompts that rise by so much; base scores have a standard deviation of 1.02."""
    base = np.linspace(-1.7, 1.7, 40).reshape(20, 2)
    roles: Any = {"trained": "trained", "part": "held-out"}
    return Point(
        scale,
        tuple(
            Result(name, roles.get(name, "held-out"), "", base, base + rise, "x" * (name == "part"))
            for name, rise in rises.items()
        ),
    )


@pytest.mark.parametrize(
    ("points", "said"),
    [
        (
            [(0.5, 0.4), (1, -0.2)],
            "held-out rewards stand highest at scale 0.5 (+0.39 standard deviations of the base)",
        ),
        ([(0.5, -0.1), (1, -0.2)], "held-out rewards are at no scale higher than the base's"),
    ],
)
def test_the_verdict_is_that_of_the_held_out_rewards(
    points: list[tuple[float, float]], said: str
) -> None:
    made = [point(scale, trained=9 * scale, other=rise, part=50.0) for scale, rise in points]
    assert Sweep(20, 2, ("trained",), tuple(made), Path()).verdict.startswith(said)


def test_without_a_held_out_reward_or_with_few_prompts_there_is_no_verdict() -> None:
    assert Sweep(20, 2, ("trained",), (point(1.0, trained=1.0),), Path()).verdict == ""
    assert Sweep(19, 2, ("trained",), (point(1.0, other=1.0),), Path()).verdict == ""


def test_a_rise_within_its_interval_may_be_chance() -> None:
    base = np.linspace(-1, 1, 40).reshape(20, 2)
    moved = base + np.tile([[1.1], [-1.0]], (10, 1))
    made = Point(1.0, (Result("other", "held-out", "", base, moved),))
    assert made.heldout > 0 and not made.results[0].paired.rose
    assert Sweep(20, 2, (), (made,), Path()).verdict.endswith("which may be chance)")


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ((-0.5,), "scale_sweep: must be at least 0, not -0.5"),
        ((float("nan"),), "scale_sweep: must be at least 0, not nan"),
        ((0.5, 1.0, 0.5), "scale_sweep: 0.5 comes twice"),
    ],
)
def test_scales_that_cannot_be_drawn_are_refused(scales: tuple[float, ...], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        EvaluationOptions(scale_sweep=scales)


def test_a_run_without_its_comparison_has_no_sweep() -> None:
    with pytest.raises(OptionError, match="scale_sweep: is not read with report: false"):
        EvaluationOptions(scale_sweep=(1.0,), report=False)
