"""Guidance that a network is told, instead of a second branch: one branch, one call, factor 1."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_chain import Chain
from diffusion_align.algorithms.gradient_plan import DrawnSteps, GradientPlan
from diffusion_align.algorithms.gradient_presets import PRESETS
from diffusion_align.algorithms.likelihood import branches
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions


def make(world: ModuleType, *, embedded: bool = True, **options: Any) -> Draft:
    return Draft(
        world.GuidedPolicy("flow", embedded=embedded),
        world.Smooth(),
        ["a", "bb"],
        options=DraftOptions(prompts_per_iteration=2, train_batch_size=2, **options),
        sampling=SamplingOptions(steps=6, guidance_scale=4.0, flow_kind="sde"),
        seed=3,
    )


def gradient(draft: Draft) -> Tensor:
    parameters = draft.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for minibatch in draft.minibatches(draft.collect(0)):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_that_say_conditional_have_their_one_branch(world: ModuleType, preset: Any) -> None:
    counted: dict[str, Any] = {"active_steps": 2} if preset == "draft-k" else {}
    draft = make(world, preset=preset, **counted)
    assert any("guidance is told to the network" in line for line in draft.describe())
    whole = make(world, preset=preset, **counted)
    policy: Any = whole.policy
    predict = policy.predict
    policy.predict = lambda *a, **k: predict(*a, **{**k, "guidance_gradient": "both"})
    assert torch.equal(gradient(draft), gradient(whole))


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "draft-k", "active_steps": 2, "guidance_gradient": "conditional"},
        {"preset": "draft-lv", "norm_compensation": True},
        {"preset": "draft-lv", "guidance_gradient": "conditional", "norm_compensation": True},
    ],
    ids=str,
)
def test_a_branch_that_is_not_there_is_refused_where_it_is_asked_for(
    world: ModuleType, options: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="has no second branch") as caught:
        make(world, **options)
    assert caught.value.where.startswith("algorithm.") and "leave" in caught.value.fix
    make(world, embedded=False, **options)
    make(world, **{**options, "guidance_gradient": "both", "norm_compensation": None})


@pytest.mark.parametrize("embedded", [True, False])
def test_the_factor_that_guidance_puts_on_a_gradient_is_taken_off_where_it_is(
    world: ModuleType, embedded: bool
) -> None:
    """The derivative of a prediction in the network's own output, by autograd."""
    plan = GradientPlan(guidance_gradient="conditional", norm_compensation=True)
    policy: Any = world.GuidedPolicy("flow", embedded=embedded)
    draft = make(world, embedded=embedded)
    chain = Chain(policy, draft._chain.schedule, draft.sampling, plan)
    x = torch.randn(2, *world.SHAPE, dtype=torch.float64)
    offset = torch.zeros((), dtype=torch.float64, requires_grad=True)
    network = policy.denoiser
    policy.denoiser = lambda x, t, told: network(x, t, told) + offset
    _, weighted = chain.rerun(
        x, 5, policy.encode(["a", "b"]), chain.weights(DrawnSteps((5,), 5))[5]
    )
    (found,) = torch.autograd.grad(weighted[0, 0, 0, 0], offset)
    assert float(found) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("embedded", "expected"),
    # Per sample 6 sampled and 2 copies; then 3 re-run, a backward counting as two more.
    [(True, 2 * (8 + 3 * 3)), (False, 2 * (8 * 2 + 3 * (2 + 2)))],
)
def test_calls_are_those_that_the_network_was_asked(
    world: ModuleType, embedded: bool, expected: int
) -> None:
    draft = make(world, embedded=embedded, preset="draft-lv")
    batch = draft.collect(0)
    assert batch.metrics["cost/calls"] == expected
    asked = 0
    network: Any = draft.policy.denoiser
    network.register_forward_hook(lambda *_: asked_once())

    def asked_once() -> None:
        nonlocal asked
        asked += 1

    draft.collect(1)
    assert asked * 2 == (6 + 2) * 2 * branches(4.0, draft.policy)


def test_a_policy_that_says_nothing_of_its_family_has_pairs() -> None:
    assert (branches(4.0), branches(1.0)) == (2, 1)
