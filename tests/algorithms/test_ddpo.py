"""DDPO as a whole in the toy world: collection, cutting, options, state."""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_align.algorithms.batches import TrajectoryBatch
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]


def make(
    toy: ModuleType,
    *,
    reward: Any = None,
    seed: int = 0,
    sampling: SamplingOptions | None = None,
    policy: Any = None,
    **options: Any,
) -> DDPO:
    chosen = {
        "prompts_per_iteration": 4,
        "samples_per_prompt": 3,
        "train_batch_size": 4,
        "clip_range": 0.1,
        **options,
    }
    return DDPO(
        policy or toy.ToyPolicy(),
        reward or toy.Brightness(),
        PROMPTS,
        options=DDPOOptions(**chosen),
        sampling=sampling or SamplingOptions(steps=6, guidance_scale=1.0),
        seed=seed,
    )


def gradient(ddpo: DDPO, batch: TrajectoryBatch, accumulation: int) -> torch.Tensor:
    parameters = ddpo.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for minibatch in ddpo.minibatches(batch):
        for loss, _ in ddpo.losses(minibatch, 1 / accumulation):
            loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def doubled(batch: TrajectoryBatch) -> TrajectoryBatch:
    trajectory = replace(batch.trajectory, latents=batch.trajectory.latents.double())
    return replace(batch, trajectory=trajectory, old_log_probs=batch.old_log_probs.double())


def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(toy: ModuleType) -> None:
    """One minibatch of 12 or twelve of 1, one timestep at a time or all of them."""
    whole = make(toy, train_batch_size=12, timesteps_per_loss=6)
    batch = doubled(whole.collect(0))
    whole.policy.denoiser.double()
    with torch.no_grad():
        whole.policy.trainable_parameters()[1].add_(0.05)  # off ratio 1, some clipped
    expected = gradient(whole, batch, 1)
    for size, group in ((12, 1), (12, 4), (4, 3), (1, 2)):
        other = make(toy, policy=whole.policy, train_batch_size=size, timesteps_per_loss=group)
        found = gradient(other, batch, 12 // size)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_loss_count_says_how_many_losses_come(toy: ModuleType) -> None:
    for group in (1, 4, 6, 100):
        ddpo = make(toy, timesteps_per_loss=group)
        minibatch = next(iter(ddpo.minibatches(ddpo.collect(0))))
        assert len(list(ddpo.losses(minibatch, 1.0))) == ddpo.loss_count(minibatch)
        count = ddpo.minibatch_count()
        assert count == len(list(ddpo.minibatches(ddpo.collect(1))))
        assert ddpo.minibatch_arithmetic().endswith(f"= {count} minibatches")


def test_an_iteration_is_repeated_exactly_and_another_differs(toy: ModuleType) -> None:
    first, again, other = make(toy).collect(3), make(toy).collect(3), make(toy).collect(4)
    assert torch.equal(first.trajectory.latents, again.trajectory.latents)
    assert torch.equal(first.sample_orders, again.sample_orders)
    assert torch.equal(first.step_orders, again.step_orders)
    assert not torch.equal(first.trajectory.latents, other.trajectory.latents)
    assert not torch.equal(first.sample_orders, other.sample_orders)
    seeded = make(toy, seed=1).collect(3)
    assert not torch.equal(first.trajectory.latents, seeded.trajectory.latents)


def test_prompts_come_once_each_before_any_comes_twice(toy: ModuleType) -> None:
    ddpo = make(toy)
    dealt = [item.prompt.text for i in range(5) for item in ddpo._online.plan.items(i)[::3]]
    assert len(dealt) == 20
    for start in range(0, 20, 5):
        assert sorted(dealt[start : start + 5]) == sorted(PROMPTS)
    assert dealt[:5] != dealt[5:10] or dealt[5:10] != dealt[10:15]


def test_every_sample_has_its_own_subset_of_timesteps(toy: ModuleType) -> None:
    ddpo = make(toy, timesteps_per_loss=2, timestep_fraction=0.5, inner_epochs=2)
    batch = ddpo.collect(0)
    assert batch.step_orders.shape == (2, 12, 3)
    rows = batch.step_orders.flatten(0, 1).tolist()
    assert all(len(set(row)) == 3 for row in rows)
    assert len({tuple(row) for row in rows}) > 5
    seen = torch.cat([minibatch.rows for minibatch in ddpo.minibatches(batch)])
    assert sorted(seen.tolist()) == sorted([*range(12), *range(12)])


def test_steps_without_noise_are_never_trained(toy: ModuleType) -> None:
    policy = toy.ToyPolicy()
    original = policy.schedule

    def ending_clean(steps: int, **size: Any) -> Any:
        schedule = original(steps, **size)
        landings = schedule.landings.clone()
        landings[-1] = 1.0  # lands on clean data: std 0
        return replace(schedule, landings=landings)

    policy.schedule = ending_clean
    ddpo = make(toy, policy=policy)
    batch = ddpo.collect(0)
    assert set(batch.step_orders.unique().tolist()) == {0, 1, 2, 3, 4}
    assert bool(batch.trajectory.log_probs[:, -1].isnan().all())
    assert bool(torch.isfinite(gradient(ddpo, batch, 3)).all())


def test_failed_rewards_leave_the_update_and_are_counted(toy: ModuleType) -> None:
    ddpo = make(toy, reward=toy.Brightness(failing=(0, 7)), advantages="global")
    batch = ddpo.collect(0)
    assert batch.metrics["reward/invalid"] == 2
    assert batch.advantages.isnan().nonzero().flatten().tolist() == [0, 7]
    trained = torch.cat([minibatch.rows for minibatch in ddpo.minibatches(batch)])
    assert sorted(trained.tolist()) == [1, 2, 3, 4, 5, 6, 8, 9, 10, 11]
    assert abs(float(batch.advantages[trained].mean())) < 1e-5
    assert bool(torch.isfinite(gradient(ddpo, batch, 3)).all())


def test_no_reward_at_all_stops_with_the_reward_named(toy: ModuleType) -> None:
    with pytest.raises(UserError, match="brightness"):
        make(toy, reward=toy.Brightness(failing=tuple(range(12)))).collect(0)


def test_metrics_say_what_was_sampled_and_what_it_cost(toy: ModuleType) -> None:
    ddpo = make(toy)
    batch = ddpo.collect(0)
    for minibatch in ddpo.minibatches(batch):
        for loss, _ in ddpo.losses(minibatch, 1.0):
            loss.backward()
    metrics = batch.metrics
    assert metrics["reward_part/twice"] == pytest.approx(2 * metrics["reward/mean"], rel=1e-6)
    # 12 x 6 sampled, replayed once by the check, 3 per trained pair (forward and backward).
    assert metrics["cost/calls"] == 12 * 6 * (1 + 1 + 3)
    assert ddpo.collect(1).metrics["cost/calls"] == 12 * 6 * (2 + 1 + 6)
    assert batch.samples is not None
    assert batch.samples.pixels.shape == (8, 3, 2, 2)
    assert len(batch.samples.prompts) == len(batch.samples.rewards) == 8


def test_a_group_reward_sees_all_samples_of_a_prompt(toy: ModuleType) -> None:
    reward = toy.Brightness()
    reward.info = replace(reward.info, scope="group")
    seen: list[set[str]] = []
    plain = reward.score

    def watching(media: Any, prompts: Any, **options: Any) -> Any:
        seen.append(set(prompts))
        assert len(media) == 3
        return plain(media, prompts, **options)

    reward.score = watching
    sampling = SamplingOptions(steps=6, guidance_scale=1.0, batch_size=5)
    grouped = make(toy, reward=reward, sampling=sampling).collect(0)
    assert len(seen) == 4 and all(len(prompts) == 1 for prompts in seen)
    single = make(toy, sampling=sampling).collect(0)
    assert torch.equal(grouped.advantages, single.advantages)


def test_state_carries_the_statistics_and_the_decision(toy: ModuleType) -> None:
    ddpo = make(toy, buffer_min_count=4)
    ddpo.collect(0)
    other = make(toy, buffer_min_count=4)
    other.load_state_dict(ddpo.state_dict())
    a, b = ddpo.collect(1), other.collect(1)
    assert torch.equal(a.advantages, b.advantages)
    assert a.metrics == b.metrics


def test_a_deterministic_sampler_is_refused(toy: ModuleType) -> None:
    with pytest.raises(UserError, match="no step of this schedule has noise"):
        make(toy, sampling=SamplingOptions(steps=4, guidance_scale=1.0, eta=0.0))


def test_the_clip_range_is_told_in_both_units(toy: ModuleType) -> None:
    assert "0.1 in the mean over 4 dimensions, 0.4 nats" in make(toy).describe()[0]
    assert (
        "0.025 in the mean over 4 dimensions, 0.1 nats" in make(toy, clip_unit="nats").describe()[0]
    )


def test_a_network_that_is_told_its_guidance_is_trained_with_what_it_sampled_at(
    toy: ModuleType,
) -> None:
    """It has no unguided branch: another scale would be another policy."""
    policy = toy.ToyPolicy()
    sampling = SamplingOptions(steps=6, guidance_scale=3.0)
    for family, expected in ((None, 1.0), (SimpleNamespace(guidance="embedded"), 3.0)):
        policy.family = family
        ddpo = DDPO(
            policy,
            toy.Brightness(),
            ["a"],
            options=DDPOOptions(
                prompts_per_iteration=4,
                samples_per_prompt=1,
                train_batch_size=4,
                train_guidance=False,
            ),
            sampling=sampling,
        )
        (line,) = (text for text in ddpo.describe() if text.startswith("one iteration"))
        assert f"guidance 3 in sampling and {expected:g} in training" in line
