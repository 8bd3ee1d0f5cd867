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
from diffusion_align.errors import UserError
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


class Policies:
    """Each family with an adapter that does something, the same in every precision."""

    def __init__(self, builders: ModuleType, folder: Path) -> None:
        self._builders, self._folder = builders, folder
        self._made: dict[tuple[str, str], Policy] = {}

    def __getitem__(self, name: str) -> Policy:
        return self.of(name, "float64")

    def of(self, name: str, dtype: str, *, full: bool = False) -> Policy:
        folder = self._folder / name
        if not folder.exists():
            getattr(self._builders, BUILDERS[name])().save_pretrained(folder)
        if full:
            return self._drawn(Policy.load(folder, full=True, dtype=dtype), dtype, 0.0)
        if (name, dtype) not in self._made:
            policy = Policy.load(folder, lora_rank=2, dtype=dtype)
            self._made[name, dtype] = self._drawn(policy, dtype, 0.3)
        return self._made[name, dtype]

    def _drawn(self, policy: Policy, dtype: str, level: float) -> Policy:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in policy.trainable_parameters() if level else ():
                parameter.copy_(level * torch.randn(parameter.shape, generator=generator))
        start = policy.initial_noise
        if dtype == "float64":
            policy.initial_noise = lambda noise: start(noise.double())  # type: ignore
        return policy


@pytest.fixture(scope="module")
def policies(tmp_path_factory: pytest.TempPathFactory) -> Policies:
    path = Path(__file__).parent.parent / "policy" / "tiny_transformers.py"
    spec = importlib.util.spec_from_file_location("tiny_transformers_of_algorithms", path)
    assert spec is not None and spec.loader is not None
    builders = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = builders
    spec.loader.exec_module(builders)
    return Policies(builders, tmp_path_factory.mktemp("families"))


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


QUICK = {
    ("sd3", "draft-lv"),
    ("sd3", "refl"),
    ("flux", "drtune"),
    ("flux", "vader"),
    ("wan", "draft"),
    ("wan", "draft-k"),
    ("cogvideox", "alignprop"),
}
assert {preset for _, preset in QUICK} == set(PRESETS)


@pytest.mark.parametrize(
    ("name", "preset"),
    [
        pytest.param(n, p, marks=[] if (n, p) in QUICK else pytest.mark.slow)
        for n in BUILDERS
        for p in PRESETS
    ],
)
def test_replay_is_plain_autograd(
    world: ModuleType,
    policies: Policies,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    preset: Any,
) -> None:
    """With guidance at batch 2, in both precisions; the expected one is float64's."""
    counted = {"active_steps": 2} if preset in ("draft-k", "drtune") else {}
    options = {"preset": preset, "reward_frames": "all", **counted}
    with monkeypatch.context() as patched:
        if name == "wan":
            # Its blocks say .float() whatever the weights are, and round what should be float64.
            patched.setattr(torch.Tensor, "float", torch.Tensor.double)
        wide = make(world, policies.of(name, "float64"), **options)
        expected = plain(world, wide, world.score_of)
        found = gradient(wide)
    assert distance(found, expected) < 1e-8
    narrow = gradient(make(world, policies.of(name, "float32"), **options))
    assert distance(narrow, expected) < 1e-4


@pytest.mark.parametrize(("word", "frames"), [("first", [0]), ("uniform:1", [1])])
def test_chosen_latent_frames_are_decoded_and_carry_the_gradient(
    world: ModuleType, policies: Policies, word: str, frames: list[int]
) -> None:
    draft = make(world, policies["wan"], preset="vader", decode_frames=word)
    assert policies["wan"].latent_frames(draft.collect(0).judged.walk.final.shape[1:]) == 2
    assert distance(gradient(draft), plain(world, draft, world.score_of, frames)) < 1e-6


def test_full_fine_tuning_has_the_gradient_of_every_weight(
    world: ModuleType, policies: Policies
) -> None:
    wide = make(world, policies.of("sd3", "float64", full=True), preset="draft-lv")
    expected = plain(world, wide, world.score_of)
    assert len(expected) > 1000 + sum(p.numel() for p in policies["sd3"].trainable_parameters())
    assert distance(gradient(wide), expected) < 1e-8
    narrow = make(world, policies.of("sd3", "float32", full=True), preset="draft-lv")
    assert distance(gradient(narrow), expected) < 1e-4


class Autocast(torch.nn.Module):
    """A denoiser as mixed precision runs it."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **options: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16):
            return self.inner(*args, **options)


def test_bf16_replays_what_autograd_keeps(world: ModuleType, policies: Policies) -> None:
    """Re-run in bf16 is kept in bf16; how far that is from float32 shows that it was bf16."""
    policy = policies.of("sd3", "float32")
    expected, whole = gradient(make(world, policy, preset="draft-lv")), policy.denoiser
    policy.denoiser = Autocast(whole)
    try:
        replayed = gradient(make(world, policy, preset="draft-lv"))
        kept = gradient(make(world, policy, preset="draft-lv", engine="autograd"))
    finally:
        policy.denoiser = whole
    assert 1e-4 < distance(kept, expected) < 0.2
    assert distance(replayed, kept) < 1e-3


def test_an_overflow_in_the_backward_pass_of_the_vae_stops_the_run(
    world: ModuleType, policies: Policies
) -> None:
    """fp16 weights: the pictures are finite, their derivative leaves what fp16 can hold."""
    policy = policies.of("sd3", "float32", full=True)
    policy.pipeline.vae.half()
    make(world, policy, preset="vader").collect(0)
    draft = make(world, policy, preset="vader", loss_scale=1e9)
    with pytest.raises(UserError) as caught:
        draft.collect(0)
    assert caught.value.where.startswith("VAE") and "NaN or infinity" in caught.value.what
    assert "bfloat16" in caught.value.fix


@pytest.mark.parametrize("name", ["sd3", "flux", "wan"])
def test_calls_are_those_that_the_network_gets(
    world: ModuleType, policies: Policies, name: str
) -> None:
    """Counted at the transformer: 1 for an item, 2 more where its graph is kept."""
    policy = policies.of(name, "float32")
    counted = 0

    def count(module: Any, args: Any, options: Any, output: Any) -> None:
        nonlocal counted
        counted += len(output[0]) * (3 if torch.is_grad_enabled() else 1)

    hook = policy.bare_denoiser.register_forward_hook(count, with_kwargs=True)
    try:
        draft = make(world, policy, preset="draft-lv", lv_copies=1)
        policy.encode(
            ["a", "bb"], guidance_scale=SCALE, height=32, width=32, frames=draft.sampling.frames
        )
        counted = 0
        batch = draft.collect(0)
        for minibatch in draft.minibatches(batch):
            for loss, _ in draft.losses(minibatch, 1.0):
                loss.backward()
    finally:
        hook.remove()
    assert batch.metrics["cost/calls"] == counted


def test_a_network_that_is_told_its_guidance_has_no_second_branch(
    world: ModuleType, policies: Policies
) -> None:
    with pytest.raises(UserError, match="has no second branch"):
        make(world, policies["flux"], preset="draft-lv", guidance_gradient="conditional")
    found = gradient(make(world, policies["flux"], preset="draft-lv"))
    both = make(world, policies["flux"], preset="draft-lv", guidance_gradient="both")
    assert torch.equal(found, gradient(both))


class Watching(Clips):
    """It remembers what it was asked; of pictures their means."""

    def __init__(self, world: ModuleType, modality: Any) -> None:
        super().__init__(world, modality)
        self.asked: list[tuple[Any, Any, list[float]]] = []

    def score(
        self, media: Tensor, prompts: Any, *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        marks = media.detach().flatten(1).mean(1).tolist()
        self.asked.append((tuple(media.shape), fps, marks))
        return super().score(media, prompts)


def frames_seen(draft: Draft, reward: Watching, iteration: int) -> list[int]:
    """Which frame of each clip the reward was shown."""
    reward.asked.clear()
    walk = draft.collect(iteration).judged.walk
    clips = draft.policy.decode(walk.final).flatten(2).mean(2)
    marks = [mark for _, _, found in reward.asked for mark in found]
    assert len(marks) == len(clips)
    return [int((row - mark).abs().argmin()) for row, mark in zip(clips, marks, strict=True)]


def test_vader_draws_a_frame_for_each_clip_of_each_iteration(
    world: ModuleType, policies: Policies
) -> None:
    reward = Watching(world, "image")
    draft = make(world, policies["cogvideox"], reward, preset="vader")
    seen = [frames_seen(draft, reward, iteration) for iteration in range(3)]
    assert len({tuple(row) for row in seen}) == 3 and len({f for row in seen for f in row}) > 2
    assert any(first != second for first, second in seen)
    again = make(world, policies["cogvideox"], reward, preset="vader", reward_batch_size=1)
    assert frames_seen(again, reward, 1) == seen[1]
    frames = seen[0]

    def score(clips: Tensor) -> Tensor:
        chosen = torch.stack([clip[frame] for clip, frame in zip(clips, frames, strict=True)])
        return world.score_of(chosen)

    assert distance(gradient(draft), plain(world, draft, score)) < 1e-8


@pytest.mark.parametrize(("decoded", "told"), [("all", 8.0), ("first", 8.0), ("uniform:1", None)])
def test_a_temporal_reward_is_told_the_frame_rate(
    world: ModuleType, policies: Policies, decoded: str, told: float | None
) -> None:
    """Of frames that follow one another; chosen ones have none."""
    policy = policies["cogvideox"]
    reward, before = Watching(world, "video"), policy.info
    policy.info = Timed(before, 8.0)  # type: ignore[assignment]
    try:
        make(world, policy, reward, preset="vader", decode_frames=decoded).collect(0)
    finally:
        policy.info = before
    assert {fps for _, fps, _ in reward.asked} == {told}


class Timed:
    """A model's information, with a frame rate."""

    def __init__(self, info: Any, fps: float) -> None:
        self._info, self.fps = info, fps

    def __getattr__(self, name: str) -> Any:
        return getattr(self._info, name)


def test_an_image_reward_looks_at_some_frames_of_a_clip(
    world: ModuleType, policies: Policies
) -> None:
    """The mean of the middles of two halves of nine frames."""
    policy = policies["cogvideox"]
    draft = make(world, policy, Clips(world, "image"), preset="vader", reward_frames="uniform:2")

    def score(clips: Tensor) -> Tensor:
        return (world.score_of(clips[:, 2]) + world.score_of(clips[:, 6])) / 2

    assert distance(gradient(draft), plain(world, draft, score)) < 1e-8
