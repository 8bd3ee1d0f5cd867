"""Before the first update: the policy is its reference, and coarse precision is told."""

from __future__ import annotations

import importlib.util
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion_align import Policy, tf32
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.untouched import Untouched, rounding_warning
from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Stable Diffusion of a few ten thousand parameters."""
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_untouched", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    root = tmp_path_factory.mktemp("untouched")
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(root)
    return root


class Notes:
    def __init__(self) -> None:
        self.messages: list[str] = []

    def progress(self, phase: str, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        self.messages.append(text)


def make(policy: Any, toy: ModuleType, **options: Any) -> DDPO:
    chosen: dict[str, Any] = {
        "prompts_per_iteration": 2,
        "samples_per_prompt": 2,
        "train_batch_size": 4,
        "clip_range": 2e-6,
        **options,
    }
    return DDPO(
        policy,
        toy.Brightness(),
        ["a red circle", "a blue square"],
        options=DDPOOptions(**chosen),
        sampling=SamplingOptions(steps=3, guidance_scale=4.0),
    )


def test_a_precision_coarser_than_the_clip_range_is_told(pipeline: Path, toy: ModuleType) -> None:
    """In float32 the same options pass in silence; the trial move leaves no trace."""
    said: dict[str, list[str]] = {}
    for dtype in ("float32", "bfloat16"):
        policy = Policy.load(pipeline, lora_rank=2, dtype=dtype)
        before = [p.detach().clone() for p in policy.trainable_parameters()]
        ddpo = make(policy, toy)
        ddpo.listener = notes = Notes()
        ddpo.collect(0)
        said[dtype] = [text for text in notes.messages if text.startswith("warning")]
        assert all(map(torch.equal, before, policy.trainable_parameters()))
    assert said["float32"] == []
    assert len(said["bfloat16"]) == 1
    assert "clip range 2e-06" in said["bfloat16"][0] and "float32" in said["bfloat16"][0]


def test_the_trial_move_measures_rounding_and_not_the_move(toy: ModuleType) -> None:
    """In float32 and in float64: what is left is far less than what the move really does."""
    for dtype in (torch.float32, torch.float64):
        policy = toy.ToyPolicy()
        ddpo = make(policy, toy, clip_range=0.1)
        batch = ddpo.collect(0)
        policy.denoiser.to(dtype)
        first = next(ddpo.minibatches(batch))
        first = replace(first, latents=batch.trajectory.latents.to(dtype))
        rounding = Untouched(ddpo._likelihood, first, 1.0, 2).rounding(
            policy.trainable_parameters()
        )
        assert rounding.shape == first.steps.shape
        with torch.no_grad():
            here = ddpo._likelihood.log_prob(first, slice(0, 3), 1.0)
            for parameter in policy.trainable_parameters():
                parameter.add_(1e-3 * parameter.square().mean().sqrt())
            moved = (ddpo._likelihood.log_prob(first, slice(0, 3), 1.0) - here).abs()
        assert float(rounding.max()) < 0.05 * float(moved.max())


def test_the_warning_counts_what_lies_beyond_and_fears_nan() -> None:
    rounding = torch.tensor([[1e-5, 1e-3], [2e-4, 5e-5]])
    text = rounding_warning(rounding, 1e-4, (1 - 1e-4, 1 + 1e-4))
    assert "up to 1.0e-03" in text and "50%" in text
    assert rounding_warning(rounding, 1e-2, (0.99, 1.01)) == ""
    assert rounding_warning(torch.tensor([float("nan")]), 1e-2, (0.99, 1.01)) != ""


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_copy_computes_in_the_precision_of_the_policy(
    pipeline: Path, toy: ModuleType, tmp_path: Path, precision: Any
) -> None:
    """Full fine-tuning: KL to the reference is exactly zero until something was learnt."""
    policy = Policy.load(pipeline, full=True)
    ddpo = make(policy, toy, kl_weight=0.1, clip_range=0.1, old_log_probs="replayed")
    options = TrainOptions(steps=1, mixed_precision=precision, sample_every=0)
    result = train(ddpo, options=options, output=tmp_path / "run", reporter=Quiet())
    assert result.metrics["policy/kl_reference"] == 0.0
    for module in (policy.denoiser, policy.reference_copy):
        assert module is not None and "_original_forward" not in vars(module)
        assert "forward" not in vars(module) or not hasattr(module.forward, "__wrapped__")


def test_a_policy_that_is_not_its_reference_is_refused(toy: ModuleType) -> None:
    policy = toy.ToyPolicy()
    with torch.no_grad():
        policy.start.bias.add_(0.01)
    with pytest.raises(UserError, match="not its own reference"):
        make(policy, toy, kl_weight=0.1).collect(0)
    make(policy, toy).collect(0)  # nobody asks for the reference


@pytest.mark.parametrize("newer", [False, True])
def test_tf32_is_off_inside_and_as_it_was_outside(newer: bool) -> None:
    cudnn: Any = torch.backends.cudnn
    if newer and not hasattr(cudnn, "conv"):
        pytest.skip("this torch has the older switches only")

    @contextmanager
    def conv_alone() -> Any:
        """The newer switches, which the older cannot read."""
        before = cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision
        cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = "tf32", "ieee"
        try:
            yield
        finally:
            cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision = before

    @contextmanager
    def older() -> Any:
        before = cudnn.allow_tf32
        cudnn.allow_tf32 = True
        try:
            yield
        finally:
            cudnn.allow_tf32 = before

    with conv_alone() if newer else older():
        assert tf32.in_use()
        with pytest.raises(KeyError), tf32.switched_off():
            assert not tf32.in_use()
            raise KeyError
        assert tf32.in_use()
