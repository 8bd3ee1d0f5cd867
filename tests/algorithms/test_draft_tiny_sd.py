"""Replayed gradients against plain autograd on a trained, guided UNet with its VAE."""

from __future__ import annotations

from itertools import product
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align import Policy
from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_presets import PRESETS
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.sampling.seeds import normal

PROMPTS = ["a large red circle", "a small blue square above a green triangle"]
STEPS = 4


def loaded(dtype: str, *, full: bool = False) -> Policy:
    """tiny-sd with an adapter that does something, the same in every precision; or all of it."""
    policy = Policy.load("tiny-sd", lora_rank=None if full else 2, dtype=dtype, full=full)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in () if full else policy.trainable_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.05 * drawn)
    if dtype == "float64":
        policy.initial_noise = lambda noise: noise.double()  # type: ignore[method-assign]
    return policy


@pytest.fixture(scope="module")
def policies() -> dict[str, Policy]:
    return {dtype: loaded(dtype) for dtype in ("float64", "float32")}


def make(world: ModuleType, policy: Policy, eta: float, **options: Any) -> Draft:
    return Draft(
        policy,
        world.Smooth(),
        PROMPTS,
        options=DraftOptions(
            prompts_per_iteration=2, train_batch_size=2, decode_batch_size=1, **options
        ),
        sampling=SamplingOptions(steps=STEPS, guidance_scale=4.0, eta=eta, batch_size=2),
        seed=2,
    )


def gradient(draft: Draft) -> Tensor:
    parameters = draft.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for minibatch in draft.minibatches(draft.collect(0)):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def plain(world: ModuleType, draft: Draft) -> Tensor:
    """The pipeline's own UNet and VAE in a loop that was written apart."""
    policy, items = draft.policy, draft._plan.items(0)
    unet, vae = policy.pipeline.unet, policy.pipeline.vae
    cond = policy.encode([item.prompt.text for item in items], guidance_scale=4.0)

    def network(x: Tensor, timestep: Tensor, branch: int) -> Tensor:
        return unet(x, timestep, **cond.branches[branch].arguments())[0]

    def decode(x: Tensor) -> Tensor:
        return (vae.decode(x / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)

    streams = draft._plan.rollout_streams(items, 0)
    copies = draft._plan.noise_streams(items, 0)
    drawn = draft.drawn(0)
    oracle = world.Oracle(
        network=network,
        decode=decode,
        score=world.score_of,
        schedule=draft._chain.schedule,
        guidance=4.0,
        noises=[normal(streams, cond.latent_shape).to(vae.dtype) for _ in range(STEPS + 1)],
        copies=[
            normal(copies, cond.latent_shape).to(vae.dtype)
            for _ in range(draft.options.plan.lv_copies)
        ],
        eta=draft.sampling.eta,
    )
    loss = oracle.loss(draft.options.plan, drawn.active, drawn.last, lambda r: -r.mean())
    found = torch.autograd.grad(loss, policy.trainable_parameters())
    return torch.cat([g.flatten().double() for g in found])


FAST = {("draft", "both", 1.0)}
CASES = [
    pytest.param(*case, marks=[] if case in FAST else pytest.mark.slow)
    for case in product(PRESETS, ("both", "conditional"), (0.0, 1.0))
]


@pytest.mark.parametrize(("preset", "branch", "eta"), CASES)
def test_replay_is_plain_autograd(
    world: ModuleType, policies: dict[str, Policy], preset: Any, branch: Any, eta: float
) -> None:
    counted = preset in ("draft-k", "drtune")
    options = {
        "preset": preset,
        "guidance_gradient": branch,
        "active_steps": 2 if counted else None,
    }
    wide = make(world, policies["float64"], eta, **options)
    expected = plain(world, wide)
    assert float(expected.norm()) > 0
    assert float((gradient(wide) - expected).norm() / expected.norm()) < 1e-8
    narrow = gradient(make(world, policies["float32"], eta, **options))
    assert float((narrow - expected).norm() / expected.norm()) < 1e-4


def relative(found: Tensor, expected: Tensor) -> float:
    assert float(expected.norm()) > 0 and found.shape == expected.shape
    return float((found - expected).norm() / expected.norm())


@pytest.mark.slow
def test_full_fine_tuning_has_the_gradient_of_every_weight(world: ModuleType) -> None:
    options: dict[str, Any] = {"preset": "draft-lv", "active_steps": 2}
    wide = make(world, loaded("float64", full=True), 1.0, **options)
    expected = plain(world, wide)
    assert len(expected) == sum(p.numel() for p in wide.policy.bare_denoiser.parameters())
    assert relative(gradient(wide), expected) < 1e-8
    narrow = make(world, loaded("float32", full=True), 1.0, **options)
    assert relative(gradient(narrow), expected) < 1e-4


class Autocast(torch.nn.Module):
    """A denoiser as mixed precision runs it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(*args, **options)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["draft-lv", "draft-k"])
def test_bf16_replays_what_autograd_keeps(world: ModuleType, preset: Any) -> None:
    """Re-run in bf16 and kept in bf16 differ by bf16's rounding, which float32's distance shows."""
    options: dict[str, Any] = {"preset": preset, "active_steps": 2}
    policy = loaded("float32")
    expected = gradient(make(world, policy, 1.0, **options))
    policy.denoiser = Autocast(policy.denoiser)
    replayed = gradient(make(world, policy, 1.0, **options))
    kept = gradient(make(world, policy, 1.0, engine="autograd", **options))
    rounding = relative(kept, expected)
    assert 1e-4 < rounding < 0.2
    assert relative(replayed, kept) < 1e-3


# --- bad input ---------------------------------------------------------------------------------


def stopped(draft: Draft) -> UserError:
    with pytest.raises(UserError) as caught:
        gradient(draft)
    return caught.value


def test_a_vae_that_lets_no_gradient_through_is_named(
    world: ModuleType, policies: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    vae: Any = policies["float32"].pipeline.vae
    decode = vae.decode
    monkeypatch.setattr(vae, "decode", lambda z, *a, **k: decode(z.detach(), *a, **k))
    error = stopped(make(world, policies["float32"], 0.0, preset="vader"))
    assert error.where.startswith("VAE") and "the chain breaks at the VAE" in error.what
