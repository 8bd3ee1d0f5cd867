"""Windows of noise, first noise in common, weights of steps: what is sampled and what is learnt."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion_align import UserError
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import OptionError
from diffusion_align.sampling.options import SamplingOptions

PROMPTS, SAMPLES, STEPS = 3, 4, 6  # every step takes noise


def make(toy: ModuleType, *, policy: Any = None, **options: Any) -> DDPO:
    chosen: dict[str, Any] = {
        "prompts_per_iteration": PROMPTS,
        "samples_per_prompt": SAMPLES,
        "train_batch_size": 6,
        "advantages": "group",
        "clip_range": 0.1,
        **options,
    }
    return DDPO(
        policy or toy.ToyPolicy(),
        toy.Brightness(),
        ["a", "bb", "ccc", "dddd"],
        options=DDPOOptions(**chosen),
        sampling=SamplingOptions(steps=STEPS, guidance_scale=1.0, batch_size=5),
    )


def test_a_prompt_has_one_window_of_consecutive_steps_and_only_these_take_noise(
    toy: ModuleType,
) -> None:
    ddpo = make(toy, noise_window=2)
    starts = set()
    for iteration in range(10):
        batch = ddpo.collect(iteration)
        trained = batch.step_orders[0].sort(dim=1).values
        assert torch.equal(trained[:, 1], trained[:, 0] + 1)
        by_prompt = trained.view(PROMPTS, SAMPLES, 2)
        assert torch.equal(by_prompt, by_prompt[:, :1].expand_as(by_prompt))
        has_noise = ~batch.trajectory.log_probs.isnan()
        expected = torch.zeros_like(has_noise).scatter(1, trained, True)
        assert torch.equal(has_noise, expected)
        starts |= set(trained[:, 0].tolist())
    assert starts == {0, 1, 2, 3, 4}  # five places for a pair


def test_a_window_lies_where_the_steps_to_be_trained_on_lie(toy: ModuleType) -> None:
    ddpo = make(toy, noise_window=2, window_start=0.5)
    seen = {s for i in range(6) for s in ddpo.collect(i).step_orders.unique().tolist()}
    assert seen == {3, 4, 5}


def test_a_window_of_all_steps_is_no_window(toy: ModuleType) -> None:
    whole, plain = make(toy, noise_window=6).collect(0), make(toy).collect(0)
    assert torch.equal(whole.trajectory.latents, plain.trajectory.latents)
    assert torch.equal(whole.step_orders, plain.step_orders)


def test_only_the_steps_of_the_window_cost_training(toy: ModuleType) -> None:
    samples = PROMPTS * SAMPLES
    for options, trained in (({"noise_window": 2}, 2), ({"noise_window": 4}, 4), ({}, STEPS)):
        ddpo = make(toy, old_log_probs="sampled", **options)
        first, second = (ddpo.collect(i).metrics["cost/calls"] for i in range(2))
        assert second - first == samples * (STEPS + 3 * trained)
    half = make(toy, noise_window=4, timestep_fraction=0.5).collect(0)
    assert half.step_orders.shape == (1, samples, 2)


def test_more_steps_of_noise_than_there_are_is_refused(toy: ModuleType) -> None:
    with pytest.raises(UserError, match=r"(?s)4 steps .* only 3 of the 6 can.*3 or less"):
        make(toy, noise_window=4, window_start=0.5)
    with pytest.raises(OptionError, match="noise_window"):
        DDPOOptions(noise_window=-1)


def test_samples_of_a_prompt_begin_alike_and_then_differ(toy: ModuleType) -> None:
    latents = make(toy, shared_noise=True).collect(0).trajectory.latents
    first = latents[:, 0].view(PROMPTS, SAMPLES, -1)
    assert torch.equal(first, first[:, :1].expand_as(first))
    assert not torch.equal(first[0, 0], first[1, 0])
    ends = latents[:, -1].view(PROMPTS, SAMPLES, -1)
    assert len({tuple(row.tolist()) for row in ends.flatten(0, 1)}) == PROMPTS * SAMPLES


def test_what_a_sample_begins_with_says_nothing_of_its_later_noise(toy: ModuleType) -> None:
    """The stream that all share must not be used again by one of them."""
    ddpo = make(toy, shared_noise=True, samples_per_prompt=64, train_batch_size=6)
    batch = ddpo.collect(0)
    own = make(toy, samples_per_prompt=64, train_batch_size=6).collect(0).trajectory.latents
    latents = batch.trajectory.latents
    # The first sample of each prompt begins as it would alone; all take their own noise afterwards.
    for prompt in range(PROMPTS):
        torch.testing.assert_close(latents[64 * prompt], own[64 * prompt])
    schedule = ddpo.policy.schedule(STEPS)
    mean = schedule.step(torch.zeros_like(latents[:, 0]), latents[:, 0], 0).mean
    moved = (latents[:, 1] - mean).flatten(1)
    start = latents[:, 0].flatten(1)
    for prompt in range(PROMPTS):
        rows = slice(64 * prompt, 64 * (prompt + 1))
        spread = moved[rows].std(dim=0)
        assert bool((spread > 0).all())
        assert start[rows].std(dim=0).max() < 1e-6


def test_steps_weighted_by_prediction_add_up_to_their_own_gradients_over_their_leverage(
    toy: ModuleType,
) -> None:
    """Against the gradient of each step alone, and leverages from finite differences."""
    plain = make(toy)
    batch = plain.collect(0)
    weighted = make(toy, policy=plain.policy, step_weights="prediction")
    schedule = plain.policy.schedule(STEPS)
    leverage = []
    for step in range(STEPS):
        zero, one = (torch.full((1, 1), float(value)).double() for value in (0, 1))
        low, high = (schedule.step(value, zero, step) for value in (zero, one))
        leverage.append(float((high.mean - low.mean).abs() / low.std))
    mean = sum(leverage) / len(leverage)
    expected = torch.zeros_like(toy.gradient(plain, batch))
    for step, size in enumerate(leverage):
        alone = replace(batch, step_orders=torch.full_like(batch.step_orders[:, :, :1], step))
        expected += toy.gradient(plain, alone) * (mean / size) / STEPS
    found = toy.gradient(weighted, weighted.collect(0))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-7)
    assert not torch.allclose(toy.gradient(plain, batch), expected, rtol=1e-2)


def test_an_untouched_policy_has_ratio_one_whatever_the_weights(toy: ModuleType) -> None:
    ddpo = make(toy, step_weights="prediction", noise_window=2, shared_noise=True)
    batch = ddpo.collect(0)
    for minibatch in ddpo.minibatches(batch):
        for _, metrics in ddpo.losses(minibatch, 1.0):
            assert float(metrics["policy/ratio_deviation_max"]) < 1e-5


def test_the_ratio_that_is_checked_is_the_one_that_is_trained_with(toy: ModuleType) -> None:
    """A deviation below the bar, at a step whose weight lifts it above."""
    plain = make(toy)
    weighted = make(toy, policy=plain.policy, step_weights="prediction")
    weights = weighted._likelihood.weights
    assert weights is not None
    step = int(weights.argmax())
    assert float(weights[step]) > 3
    for ddpo, factor, expected in ((plain, 1.0, "sampled"), (weighted, weights[step], "replayed")):
        batch = ddpo.collect(0)
        moved = batch.trajectory.log_probs.clone()
        moved[:, step] += 7e-7
        torch.testing.assert_close(
            batch.old_log_probs[:, step],
            batch.trajectory.log_probs[:, step] * factor,
            rtol=1e-5,
            atol=1e-5,
        )
        tampered = replace(batch, old_log_probs=ddpo._likelihood.weighted(moved))
        assert ddpo.check_replay(tampered).decision == expected


def test_a_fault_at_a_step_of_small_weight_is_still_a_fault(toy: ModuleType) -> None:
    weighted = make(toy, step_weights="prediction")
    weights = weighted._likelihood.weights
    assert weights is not None
    step = int(weights.argmin())
    assert float(weights[step]) < 0.5
    batch = weighted.collect(0)
    moved = batch.trajectory.log_probs.clone()
    moved[:, step] += 1.6e-5  # above what rounding explains, below it once weighted
    tampered = replace(batch, old_log_probs=weighted._likelihood.weighted(moved))
    with pytest.raises(UserError, match="more than rounding explains"):
        weighted.check_replay(tampered)
