"""Replayed gradients against plain autograd through a sampling loop that was written apart."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_presets import PRESETS
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.sampling.seeds import normal
from diffusion_align.training.means import Means

PROMPTS = ["a", "bb", "cccc"]
STEPS = 6
SAMPLERS = [
    pytest.param(("ddim", {"eta": 0.0}), id="ddim"),
    pytest.param(("ddim", {"eta": 1.0}), id="ddim-noise"),
    pytest.param(("flow", {"flow_kind": "ode"}), id="ode"),
    pytest.param(("flow", {"flow_kind": "sde"}), id="sde"),
]


def make(
    world: ModuleType,
    sampler: tuple[str, dict[str, Any]] = ("ddim", {"eta": 1.0}),
    *,
    dtype: torch.dtype = torch.float64,
    guidance: float = 3.0,
    reward: Any = None,
    steps: int = STEPS,
    **options: Any,
) -> Draft:
    family, how = sampler
    chosen = {"prompts_per_iteration": 2, "train_batch_size": 2, **options}
    return Draft(
        world.GuidedPolicy(family, dtype),
        reward or world.Smooth(),
        PROMPTS,
        options=DraftOptions(**chosen),
        sampling=SamplingOptions(steps=steps, guidance_scale=guidance, batch_size=2, **how),
        seed=3,
    )


def gradient(draft: Draft, iteration: int = 0) -> Tensor:
    """What one update would be made of."""
    parameters = draft.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    batch = draft.collect(iteration)
    for minibatch in draft.minibatches(batch):
        for loss, _ in draft.losses(minibatch, 1 / draft.minibatch_count()):
            loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def oracle_of(world: ModuleType, draft: Draft, iteration: int = 0) -> Any:
    """The independent loop on the same noise."""
    policy: Any = draft.policy
    plan = draft._plan
    items = plan.items(iteration)
    cond = policy.encode([item.prompt.text for item in items])
    streams = plan.rollout_streams(items, iteration)
    copies = plan.noise_streams(items, iteration)
    count = len(draft._chain.schedule)
    return world.Oracle(
        network=lambda x, t, branch: policy.denoiser(x, t, cond.told(branch)),
        decode=policy.decode,
        score=world.score_of,
        schedule=draft._chain.schedule,
        guidance=draft.sampling.guidance_scale,
        noises=[normal(streams, world.SHAPE).to(policy.dtype) for _ in range(count + 1)],
        copies=[
            normal(copies, world.SHAPE).to(policy.dtype)
            for _ in range(draft.options.plan.lv_copies)
        ],
        eta=draft.sampling.eta,
        flow_kind=draft.sampling.flow_kind,
        level=draft.sampling.noise_level,
    )


def negative(scores: Tensor) -> Tensor:
    return -scores.mean()


def plain(
    world: ModuleType,
    draft: Draft,
    iteration: int = 0,
    of: Callable[[Tensor], Tensor] = negative,
) -> Tensor:
    drawn = draft.drawn(iteration)
    loss = oracle_of(world, draft, iteration).loss(draft.options.plan, drawn.active, drawn.last, of)
    return torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, draft.policy.trainable_parameters())]
    )


def distance(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("branch", ["both", "conditional"])
def test_replay_is_plain_autograd(
    world: ModuleType, preset: str, branch: str, sampler: tuple[str, dict[str, Any]]
) -> None:
    count: dict[str, Any] = {"active_steps": 3} if preset == "draft-k" else {}
    draft = make(world, sampler, preset=preset, guidance_gradient=branch, **count)
    assert distance(gradient(draft, 1), plain(world, draft, 1)) < 1e-8


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("preset", PRESETS)
def test_replay_is_plain_autograd_in_float32(
    world: ModuleType, preset: str, sampler: tuple[str, dict[str, Any]]
) -> None:
    narrow = make(world, sampler, preset=preset, active_steps=3, dtype=torch.float32)
    wide = make(world, sampler, preset=preset, active_steps=3)
    assert distance(gradient(narrow).double(), plain(world, wide)) < 1e-4


@pytest.mark.parametrize("engine", ["replay", "autograd"])
@pytest.mark.parametrize(
    "options",
    [
        {"coupling": 0.3, "preset": "draft"},
        {"active": "uniform", "active_steps": 3, "preset": "draft"},
        {"active": "interval", "active_steps": 2, "preset": "draft"},
        {"active": "chosen", "chosen_steps": (1, 2, 4), "step_weights": (0.5, 2.0, 0.0)},
        {"active": "chosen", "chosen_steps": (0, 3), "preset": "draft", "coupling": 0.5},
        {"preset": "draft-lv", "norm_compensation": True, "step_weights": (0.7,)},
        {
            "preset": "draft-lv",
            "active": "chosen",
            "chosen_steps": (2, 4),
            "norm_compensation": True,
        },
        {"preset": "alignprop", "cut": "uniform", "interval_start": 0.2, "interval_end": 0.9},
        {"preset": "drtune", "guidance_gradient": "both", "coupling": 1.0},
    ],
    ids=str,
)
def test_every_part_of_a_plan_is_plain_autograd(
    world: ModuleType, options: dict[str, Any], engine: str
) -> None:
    draft = make(world, engine=engine, **{"preset": "draft", **options})
    for iteration in (0, 1):
        assert distance(gradient(draft, iteration), plain(world, draft, iteration)) < 1e-8


@pytest.mark.parametrize(
    ("options", "of"),
    [
        ({"loss": "relu", "loss_target": 0.6}, lambda r: (0.6 - r).clamp(min=0).mean()),
        ({"loss": "absolute", "loss_target": 0.2}, lambda r: (r - 0.2).abs().mean()),
        ({"loss_scale": 0.01}, lambda r: -0.01 * r.mean()),
    ],
)
def test_losses_are_their_formulas(
    world: ModuleType, options: dict[str, Any], of: Callable[[Tensor], Tensor]
) -> None:
    draft = make(world, preset="draft-lv", prompts_per_iteration=4, **options)
    assert distance(gradient(draft), plain(world, draft, of=of)) < 1e-8


def test_the_rescale_is_the_share_of_the_flow_that_carries_no_gradient(world: ModuleType) -> None:
    options: dict[str, Any] = {"preset": "draft-k", "active_steps": 2, "coupling": 0.0}
    flow: tuple[str, dict[str, Any]] = ("flow", {"flow_kind": "ode"})
    bare = make(world, flow, **options)
    moved = bare._chain.schedule.levels.double().diff().abs()
    factor = 1 + 0.5 * (float(moved.sum() / moved[-2:].sum()) - 1)
    rescaled = gradient(make(world, flow, gradient_rescale=0.5, **options))
    assert distance(rescaled, factor * gradient(bare)) < 1e-8


@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        (("ddim", {"eta": 1.0}), {"active_steps": 2}),
        (("ddim", {"eta": 0.4}), {"active_steps": 3, "coupling": 0.0}),
        (("flow", {"flow_kind": "sde"}), {"active_steps": 2}),
    ],
    ids=str,
)
def test_the_rescale_is_its_formula_where_steps_take_noise(
    world: ModuleType, sampler: tuple[str, dict[str, Any]], options: dict[str, Any]
) -> None:
    """|d x_next / d prediction| of the textbook steps, by central differences."""
    bare = make(world, sampler, preset="draft-k", **options)
    oracle = oracle_of(world, bare)
    assert any(bare._chain.stochastic())
    zero, h = torch.zeros((), dtype=torch.float64), 0.5
    reach = [
        abs(float(oracle.step(zero, zero + h, i)[1] - oracle.step(zero, zero - h, i)[1])) / (2 * h)
        for i in range(STEPS)
    ]
    factor = 1 + 0.3 * (sum(reach) / sum(reach[-options["active_steps"] :]) - 1)
    assert factor > 1.1
    rescaled = make(world, sampler, preset="draft-k", gradient_rescale=0.3, **options)
    assert distance(gradient(rescaled), factor * gradient(bare)) < 1e-8


@pytest.mark.parametrize("lands", [False, True], ids=["noise", "last step without"])
@pytest.mark.parametrize("kind", ["kl", "prediction"])
@pytest.mark.parametrize("engine", ["replay", "autograd"])
def test_the_distance_to_the_reference_has_its_gradient(
    world: ModuleType, monkeypatch: pytest.MonkeyPatch, kind: str, engine: str, lands: bool
) -> None:
    """The reference is a constant at the latents visited; the reward's own share is negligible.

    A mean is over the active steps that have such a distance.
    """
    monkeypatch.setitem(world.DDIM, "set_alpha_to_one", lands)
    options: dict[str, Any] = {"preset": "draft-k", "active_steps": 2, "loss_scale": 1e-9}
    draft = make(world, kl_weight=2.0, kl_kind=kind, engine=engine, guidance=1.0, **options)
    found = gradient(draft)
    policy: Any = draft.policy
    oracle, drawn = oracle_of(world, draft), draft.drawn(0)
    items = draft._plan.items(0)
    cond = policy.encode([item.prompt.text for item in items])

    start = oracle.noises[0]

    def sampled(stop: int) -> Tensor:
        x, noises = start, iter(oracle.noises[1:])
        with torch.no_grad():
            for step in range(stop):
                _, mean, std = oracle.step(x, oracle.guided(x, step, None), step)
                x = mean + std * next(noises) if std > 0 else mean
        return x

    x = sampled(drawn.first)
    total, noises = torch.zeros(()), iter(oracle.noises[1 + drawn.first :])
    for step in drawn.active:
        moments = oracle.schedule.timesteps[step].expand(len(x))
        ours = policy.denoiser(x, moments, cond.told(1))
        base = policy.start(x.detach(), moments, cond.told(1)).detach()
        _, mean, std = oracle.step(x, ours, step)
        _, other, _ = oracle.step(x, base, step)
        if kind == "prediction":
            total = total + (ours - base).square().flatten(1).mean(1)
        elif std > 0:
            total = total + ((mean - other) / std).square().flatten(1).mean(1) / 2
        x = mean + std * next(noises) if std > 0 else mean
    counted = 1 if lands and kind == "kl" else 2
    loss = 2.0 * (total / counted).mean()
    wanted = torch.autograd.grad(loss, policy.trainable_parameters())
    assert distance(found, torch.cat([g.flatten() for g in wanted])) < 1e-6
    told = Means()
    for minibatch in draft.minibatches(draft.collect(0)):
        for step_loss, metrics in draft.losses(minibatch, 1.0):
            step_loss.backward()
            told.add(metrics)
    name = "policy/kl_reference" if kind == "kl" else "policy/prediction_distance"
    assert told.take()[name] == pytest.approx(float(loss.detach()) / 2.0, rel=1e-5)
