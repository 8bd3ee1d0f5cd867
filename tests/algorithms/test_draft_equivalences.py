"""What one method must share with another, in closed form or as the same number."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.sampling.rollout import rollout
from diffusion_align.training.memory import high_water


@pytest.fixture(scope="module")
def tools() -> ModuleType:
    """`make`, `gradient` and `distance` of the tests beside this one."""
    path = Path(__file__).with_name("test_draft_gradients.py")
    spec = importlib.util.spec_from_file_location("draft_gradients", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_all_steps_with_full_coupling_are_the_whole_chain(
    world: ModuleType, tools: ModuleType
) -> None:
    """The derivative of what sampling does, by central differences: no graph anywhere."""
    draft = tools.make(world, preset="draft", coupling=1.0)
    found = tools.gradient(draft)
    policy, items = draft.policy, draft._plan.items(0)
    cond = policy.encode([item.prompt.text for item in items])

    def loss() -> float:
        chains = rollout(
            policy,
            cond,
            draft._chain.schedule,
            draft._plan.rollout_streams(items, 0),
            guidance_scale=draft.sampling.guidance_scale,
            eta=draft.sampling.eta,
            keep="final",
        )
        return -float(world.score_of(policy.decode(chains.x_0.double())).mean())

    parameters = policy.trainable_parameters()
    direction = [
        torch.randn(p.shape, generator=torch.Generator().manual_seed(2)) for p in parameters
    ]
    told = sum(float((g * d.flatten()).sum()) for g, d in zip(_split(found, parameters), direction))
    values = []
    for sign in (1e-3, -1e-3):
        with torch.no_grad():
            for parameter, way in zip(parameters, direction):
                parameter.add_(way, alpha=sign)
        values.append(loss())
        with torch.no_grad():
            for parameter, way in zip(parameters, direction):
                parameter.sub_(way, alpha=sign)
    # `rollout` keeps float32 latents.
    assert (values[0] - values[1]) / 2e-3 == pytest.approx(told, rel=5e-3)


def _split(flat: Tensor, parameters: Any) -> list[Tensor]:
    return list(flat.split([p.numel() for p in parameters]))


def test_drtune_is_zero_coupling(world: ModuleType, tools: ModuleType) -> None:
    """Its active steps are independent: the gradient is the sum of each one's own."""
    options = {"preset": "drtune", "stop_start": 1.0, "reward_input": "x_0"}
    whole = tools.make(world, **options, active="chosen", chosen_steps=(1, 3, 5))
    parts = [
        tools.gradient(tools.make(world, **options, active="chosen", chosen_steps=(step,)))
        for step in (1, 3, 5)
    ]
    assert tools.distance(tools.gradient(whole), sum(parts)) < 1e-12
    chained = tools.make(world, **options, active="chosen", chosen_steps=(1, 3, 5), coupling=1.0)
    assert tools.distance(tools.gradient(chained), sum(parts)) > 1e-3


def test_one_step_is_the_last_step(world: ModuleType, tools: ModuleType) -> None:
    last = tools.gradient(tools.make(world, preset="draft-k", active_steps=1))
    for options in (
        {"preset": "vader"},
        {"preset": "draft", "active": "chosen", "chosen_steps": (5,)},
        {"preset": "draft-lv", "lv_copies": 0, "guidance_gradient": "both"},
        {
            "preset": "drtune",
            "stop_start": 1.0,
            "reward_input": "x_0",
            "active": "last",
            "active_steps": 1,
            "guidance_gradient": "both",
        },
    ):
        assert tools.distance(tools.gradient(tools.make(world, **options)), last) < 1e-12


def test_two_minibatches_of_one_are_one_of_two(world: ModuleType, tools: ModuleType) -> None:
    for preset in ("draft", "draft-lv", "drtune"):
        options = {"preset": preset, "kl_weight": 0.5, "kl_kind": "prediction"}
        one = tools.gradient(tools.make(world, train_batch_size=2, **options))
        two = tools.gradient(tools.make(world, train_batch_size=1, **options))
        assert tools.distance(two, one) < 1e-12


def test_how_many_are_sampled_decoded_and_scored_at_once_changes_nothing(
    world: ModuleType, tools: ModuleType
) -> None:
    options = {"preset": "draft-lv", "prompts_per_iteration": 6, "train_batch_size": 3}
    one = tools.gradient(tools.make(world, **options))
    other = tools.make(world, **options, decode_batch_size=2, reward_batch_size=1)
    assert tools.distance(tools.gradient(other), one) < 1e-12


def test_pictures_are_those_of_any_other_rollout(world: ModuleType, tools: ModuleType) -> None:
    draft = tools.make(world, preset="draft-k", active_steps=2)
    batch = draft.collect(0)
    items = draft._plan.items(0)
    chains = rollout(
        draft.policy,
        draft.policy.encode([item.prompt.text for item in items]),
        draft._chain.schedule,
        draft._plan.rollout_streams(items, 0),
        guidance_scale=draft.sampling.guidance_scale,
        eta=draft.sampling.eta,
    )
    torch.testing.assert_close(batch.judged.walk.final.float(), chains.x_0, rtol=1e-5, atol=1e-6)
    kept = batch.judged.walk
    for step in kept.places:
        torch.testing.assert_close(
            kept.x(step).float(), chains.latents[:, step], rtol=1e-5, atol=1e-5
        )
    assert kept.places == (4, 5)  # of 6 steps, only what two active ones need


def test_replay_makes_the_calls_that_are_counted(world: ModuleType, tools: ModuleType) -> None:
    """Per sample 6 sampled and 2 copies; 1 + 2 re-run, pairs of which one half has a graph."""
    draft = tools.make(world, preset="draft-lv")
    batch = draft.collect(0)
    assert batch.metrics["cost/calls"] == 2 * ((6 + 2) * 2 + 3 * (2 + 2))
    assert draft.policy.passes == 6 + 2
    for minibatch in draft.minibatches(batch):
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
    assert draft.policy.passes == 6 + 2 + 3


class Heavy(torch.nn.Module):
    """About 60 MB of activations in one call at batch 1, and hardly any parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.scales = torch.nn.Parameter(torch.linspace(0.8, 1.2, 11))
        self.calls = 0

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        inner = x.flatten(1).repeat(1, 54_000) + text.to(x)
        for scale in self.scales:
            inner = torch.tanh(inner * scale)
        return inner.view(len(x), -1, *x.shape[1:]).mean(1) * 2


def peak(world: ModuleType, tools: ModuleType, steps: int, engine: str) -> int:
    draft = tools.make(
        world,
        dtype=torch.float32,
        preset="draft-k",
        active_steps=steps,
        engine=engine,
        steps=10,
        guidance=1.0,
        prompts_per_iteration=1,
        train_batch_size=1,
    )
    draft.policy.denoiser = Heavy()
    _, found = high_water(torch.device("cpu"), lambda: tools.gradient(draft))
    return found


def test_memory_does_not_grow_with_the_steps(world: ModuleType, tools: ModuleType) -> None:
    one = peak(world, tools, 1, "replay")
    assert one > 50 * 2**20
    assert peak(world, tools, 10, "replay") <= 1.10 * one
    # On the same meter a graph of all ten does.
    assert peak(world, tools, 10, "autograd") >= 5 * one
