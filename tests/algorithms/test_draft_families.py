"""Replayed gradients on random-weight transformers, of images and of video, against autograd."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align import Policy
from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_presets import PRESETS
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.sampling.seeds import normal
from reward_models.base import RewardInfo, Scores

STEPS, SCALE = 4, 3.0
FRAMES = {"wan2.1": 5, "cogvideox": 9}
BUILDERS = {"sd3": "stable_diffusion_3", "flux": "flux", "wan": "wan", "cogvideox": "cogvideox"}


class Clips:
    """A smooth reward of pictures or clips."""

    def __init__(self, world: ModuleType, modality: Any) -> None:
        self.info = RewardInfo("clips", modality, True, "about 0 to 1", "-", "-")
        self._score = world.score_of

    def score(
        self, media: Tensor, prompts: Any, *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        return Scores(self._score(media))


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Policy]:
    """Each family in float64, with an adapter that does something."""
    path = Path(__file__).parent.parent / "policy" / "tiny_transformers.py"
    spec = importlib.util.spec_from_file_location("tiny_transformers_of_algorithms", path)
    assert spec is not None and spec.loader is not None
    builders = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builders
    spec.loader.exec_module(builders)
    made = {}
    for name, builder in BUILDERS.items():
        folder = tmp_path_factory.mktemp(name)
        getattr(builders, builder)().save_pretrained(folder)
        policy = Policy.load(folder, lora_rank=2, dtype="float64")
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable_parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
        start = policy.initial_noise
        policy.initial_noise = lambda noise, start=start: start(noise.double())  # type: ignore
        made[name] = policy
    return made


def make(world: ModuleType, policy: Policy, reward: Any = None, **options: Any) -> Draft:
    ddim = policy.family.schedule == "ddim"
    return Draft(
        policy,
        reward or Clips(world, policy.info.modality),
        ["a", "bb"],
        options=DraftOptions(prompts_per_iteration=2, train_batch_size=2, **options),
        sampling=SamplingOptions(
            steps=STEPS,
            guidance_scale=SCALE,
            height=32,
            width=32,
            frames=FRAMES.get(policy.family.name),
            batch_size=2,
            **({"eta": 1.0} if ddim else {"flow_kind": "sde"}),
        ),
        seed=4,
    )


def gradient(draft: Draft) -> Tensor:
    parameters = draft.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for minibatch in draft.minibatches(draft.collect(0)):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
    return torch.cat([p.grad.flatten().double() for p in parameters if p.grad is not None])


def plain(world: ModuleType, draft: Draft, score: Any, frames: list[int] | None = None) -> Tensor:
    policy, items, s = draft.policy, draft._plan.items(0), draft.sampling
    cond = policy.encode(
        [item.prompt.text for item in items],
        guidance_scale=SCALE,
        height=s.height,
        width=s.width,
        frames=s.frames,
    )
    streams, copies = draft._plan.rollout_streams(items, 0), draft._plan.noise_streams(items, 0)
    drawn = draft.drawn(0)

    class Guided(world.Oracle):  # type: ignore[name-defined, misc]
        def guided(self, x: Tensor, step: int, plan: Any) -> Tensor:
            return policy.predict(
                x,
                self.schedule.timesteps[step],
                cond,
                guidance_scale=SCALE,
                guidance_gradient=plan.guidance_gradient,
            )

    oracle = Guided(
        network=None,
        decode=lambda x: policy.decode(x, frames=frames),
        score=score,
        schedule=draft._chain.schedule,
        guidance=SCALE,
        noises=[
            policy.initial_noise(noise) if number == 0 else noise.double()
            for number in range(STEPS + 1)
            for noise in [normal(streams, cond.latent_shape)]
        ],
        copies=[
            normal(copies, cond.latent_shape).double() for _ in range(draft.options.plan.lv_copies)
        ],
        eta=s.eta,
        flow_kind="sde",
    )
    loss = oracle.loss(draft.options.plan, drawn.active, drawn.last, lambda r: -r.mean())
    found = torch.autograd.grad(loss, policy.trainable_parameters())
    return torch.cat([g.flatten().double() for g in found])


def distance(one: Tensor, other: Tensor) -> float:
    assert float(other.norm()) > 0
    return float((one - other).norm() / other.norm())


QUICK = {("sd3", "draft-lv"), ("flux", "drtune"), ("wan", "draft-k"), ("cogvideox", "alignprop")}


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(n, p, marks=[] if (n, p) in QUICK else pytest.mark.slow)
        for n in BUILDERS
        for p in PRESETS
    ],
)
def test_replay_is_plain_autograd(
    world: ModuleType, policies: dict[str, Policy], name: str, preset: Any
) -> None:
    counted = {"active_steps": 2} if preset in ("draft-k", "drtune") else {}
    draft = make(world, policies[name], preset=preset, **counted)
    # Wan's norms compute in float32 whatever the weights: rounding in another order shows.
    bar = 1e-6 if name == "wan" else 1e-8
    assert distance(gradient(draft), plain(world, draft, world.score_of)) < bar


@pytest.mark.parametrize(("word", "frames"), [("first", [0]), ("uniform:1", [1])])
def test_chosen_latent_frames_are_decoded_and_carry_the_gradient(
    world: ModuleType, policies: dict[str, Policy], word: str, frames: list[int]
) -> None:
    draft = make(world, policies["wan"], preset="vader", decode_frames=word)
    assert policies["wan"].latent_frames(draft.collect(0).judged.walk.final.shape[1:]) == 2
    assert distance(gradient(draft), plain(world, draft, world.score_of, frames)) < 1e-6


def test_an_image_reward_looks_at_some_frames_of_a_clip(
    world: ModuleType, policies: dict[str, Policy]
) -> None:
    """The mean of the middles of two halves of nine frames."""
    policy = policies["cogvideox"]
    draft = make(world, policy, Clips(world, "image"), preset="vader", reward_frames="uniform:2")

    def score(clips: Tensor) -> Tensor:
        return (world.score_of(clips[:, 2]) + world.score_of(clips[:, 6])) / 2

    assert distance(gradient(draft), plain(world, draft, score)) < 1e-8
