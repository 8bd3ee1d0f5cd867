"""The replay check: an untouched policy has ratio 1, and what breaks that stops the run."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion_align import Policy
from diffusion_align.algorithms import collection
from diffusion_align.algorithms.batches import TrajectoryBatch
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.replay import BARS, FloatProbe, judge, ratio_deviation
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of a few ten thousand parameters."""
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_algorithms", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("algorithms")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root)
    return root


def make(policy: Any, toy: ModuleType, *, batch_size: int = 8, **options: Any) -> DDPO:
    chosen = {"prompts_per_iteration": 2, "samples_per_prompt": 4, "train_batch_size": 4}
    return DDPO(
        policy,
        toy.Brightness(),
        ["a red circle", "a blue square"],
        options=DDPOOptions(**{"clip_range": 0.1, **chosen, **options}),
        sampling=SamplingOptions(steps=3, guidance_scale=4.0, batch_size=batch_size),
    )


def worst_ratio(ddpo: DDPO, batch: TrajectoryBatch) -> float:
    """Largest |ratio - 1| that training sees before any update, gradients switched on."""
    return max(
        float(metrics["policy/ratio_deviation_max"])
        for minibatch in ddpo.minibatches(batch)
        for _, metrics in ddpo.losses(minibatch, 1.0)
    )


@pytest.mark.parametrize("unit", ["mean", "nats"])
@pytest.mark.parametrize(("sampled", "trained", "group"), [(4, 4, 1), (8, 2, 1), (1, 4, 3)])
def test_an_untouched_policy_has_ratio_one_at_any_batch_sizes(
    pipeline: Path, toy: ModuleType, unit: str, sampled: int, trained: int, group: int
) -> None:
    ddpo = make(
        Policy.load(pipeline, lora_rank=2),
        toy,
        batch_size=sampled,
        train_batch_size=trained,
        timesteps_per_loss=group,
        clip_unit=unit,
    )
    bar = BARS["mean" if unit == "mean" else "sum"]
    assert worst_ratio(ddpo, ddpo.collect(0)) <= bar


def test_latents_stored_in_bf16_are_found(
    pipeline: Path, toy: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = collection.rollout

    def rounding(*args: Any, **options: Any) -> Any:
        trajectory = honest(*args, **options)
        return replace(trajectory, latents=trajectory.latents.bfloat16().float())

    monkeypatch.setattr(collection, "rollout", rounding)
    ddpo = make(Policy.load(pipeline, lora_rank=2), toy)
    with pytest.raises(UserError, match="more than rounding explains") as caught:
        ddpo.collect(0)
    assert str(caught.value).count("timestep ") >= 3  # the report names each
    assert "float32" in str(caught.value)


def test_a_policy_that_drops_out_in_training_is_found(toy: ModuleType) -> None:
    with pytest.raises(UserError, match="dropout"):
        make(toy.ToyPolicy(dropout=0.5), toy).collect(0)


def test_lora_dropout_is_refused_although_a_fresh_lora_would_hide_it(
    pipeline: Path, toy: ModuleType
) -> None:
    with pytest.raises(UserError, match=r"lora\.dropout"):
        make(Policy.load(pipeline, lora_rank=2, lora_dropout=0.1), toy)


def test_unguided_training_is_replayed_and_consistent(toy: ModuleType) -> None:
    ddpo = make(toy.ToyPolicy(), toy, train_guidance=False)
    batch = ddpo.collect(0)
    assert worst_ratio(ddpo, batch) <= BARS["mean"]
    assert not torch.allclose(batch.old_log_probs, batch.trajectory.log_probs, atol=1e-4)
    with pytest.raises(UserError, match="guided policy"):
        make(toy.ToyPolicy(), toy, train_guidance=False, old_log_probs="sampled")


def test_replaying_covers_the_steps_of_every_inner_epoch(toy: ModuleType) -> None:
    ddpo = make(
        toy.ToyPolicy(), toy, old_log_probs="replayed", inner_epochs=3, timestep_fraction=0.4
    )
    batch = ddpo.collect(0)
    assert all(bool(m.old_log_probs.isfinite().all()) for m in ddpo.minibatches(batch))
    assert worst_ratio(ddpo, batch) <= BARS["mean"]


def test_the_check_runs_once_and_not_after_a_resume(toy: ModuleType) -> None:
    policy, other = toy.ToyPolicy(), toy.ToyPolicy()
    ddpo, resumed = make(policy, toy), make(other, toy)
    ddpo.collect(0)
    before = policy.calls
    ddpo.collect(1)
    resumed.load_state_dict(ddpo.state_dict())
    resumed.collect(2)
    assert other.calls == policy.calls - before


def decide(deviation: list[float], **changes: Any) -> str:
    settings: dict[str, Any] = {
        "reduction": "mean",
        "dimensions": 256,
        "wish": "auto",
        "is_float32": True,
        "clip_range": 1e-4,
        **changes,
    }
    report = judge(
        timesteps=torch.arange(float(len(deviation))),
        deviation=torch.tensor(deviation),
        unweighted=torch.tensor(settings.pop("unweighted", deviation)),
        **settings,
    )
    return report.decision


def test_rounding_is_cured_and_faults_are_not() -> None:
    nan = float("nan")
    assert decide([0.0, 9e-7, nan]) == "sampled"
    assert decide([0.0, 3e-6, nan]) == "replayed"
    with pytest.raises(UserError):
        decide([0.0, 3e-5])
    with pytest.raises(UserError):
        decide([0.0, float("inf")])
    with pytest.raises(UserError, match="above the bar"):
        decide([3e-6], wish="sampled")
    assert decide([0.0], wish="replayed") == "replayed"
    assert decide([9e-5], reduction="sum") == "sampled"
    assert decide([2e-3], reduction="sum") == "replayed"
    with pytest.raises(UserError):
        decide([5e-3], reduction="sum")


def test_weights_of_steps_enlarge_rounding_which_stays_rounding_and_hide_no_fault() -> None:
    assert decide([3e-5], unweighted=[2e-6]) == "replayed"
    assert decide([9e-7], unweighted=[9e-6]) == "sampled"
    with pytest.raises(UserError, match=r"is 3.0e-05 .* more than rounding explains"):
        decide([9e-7], unweighted=[3e-5])
    with pytest.raises(UserError, match="above the bar"):
        decide([3e-5], unweighted=[2e-6], wish="sampled")


def test_lower_precision_is_held_to_the_clip_range_instead() -> None:
    assert decide([9e-6], is_float32=False) == "sampled"
    assert decide([1e-2], is_float32=False) == "replayed"
    assert decide([0.3], is_float32=False, reduction="sum") == "replayed"


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("is_float32", [True, False])
@pytest.mark.parametrize("dimensions", [4, 256, 10_000_000])
def test_what_is_not_finite_is_refused_in_any_precision(
    reduction: str, is_float32: bool, dimensions: int
) -> None:
    for bad in (float("inf"), float("nan")):
        with pytest.raises(UserError, match="more than rounding explains"):
            decide([bad], reduction=reduction, is_float32=is_float32, dimensions=dimensions)


def test_lower_precision_has_faults_too() -> None:
    for wish in ("auto", "sampled", "replayed"):
        with pytest.raises(UserError, match="more than rounding explains"):
            decide([0.2], is_float32=False, wish=wish)
    # A bound below the bar would forbid what the bar allows.
    assert decide([0.08], is_float32=False, clip_range=0.9) == "sampled"


def test_deviation_ignores_untrained_pairs_and_fears_lost_ones() -> None:
    nan = float("nan")
    new = torch.tensor([[0.1, nan, 0.3], [nan, nan, 0.3]])
    old = torch.tensor([[0.1, 0.2, nan], [0.5, 0.2, 0.3]])
    found = ratio_deviation(new, old)
    assert found[0] == 0 and found[1].isnan() and found[2] == float("inf")


def test_the_probe_sees_autocast_and_narrow_weights() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.ReLU())
    with FloatProbe(module) as plain:
        module(torch.zeros(1, 2))
    assert plain.result
    with FloatProbe(module) as cast, torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.zeros(1, 2))
    assert not cast.result
    assert not FloatProbe(module.bfloat16()).result
    assert not module[0]._forward_pre_hooks
