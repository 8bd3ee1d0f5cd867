"""Reward-weighted regression: weights and loss in closed form, iterations in the toy world."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from diffusion_align.algorithms.base import Silence
from diffusion_align.algorithms.losses import weighted_denoising_loss
from diffusion_align.algorithms.plan import Plan
from diffusion_align.algorithms.rwr import RWR
from diffusion_align.algorithms.rwr_options import RWROptions
from diffusion_align.algorithms.sharing import Share
from diffusion_align.algorithms.weights import (
    best_share,
    effective_share,
    exponential_weights,
    sparse_weights,
)
from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.errors import OptionError, UserError
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import GuardStop
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions

PROMPTS = ["a", "bb", "ccc", "dddd", "eeeee"]
FLOW = Schedule(
    "flow", "flow", torch.tensor([900.0, 600.0, 300.0]), torch.tensor([0.9, 0.6, 0.3, 0.0])
)


def make(
    toy: ModuleType,
    *,
    policy: Any = None,
    reward: Any = None,
    sampling: SamplingOptions | None = None,
    seed: int = 0,
    **options: Any,
) -> RWR:
    chosen: dict[str, Any] = {
        "prompts_per_iteration": 4,
        "samples_per_prompt": 3,
        "train_batch_size": 4,
        "advantages": "global",
        **options,
    }
    return RWR(
        policy or toy.ToyPolicy(),
        reward or toy.Brightness(),
        PROMPTS,
        options=RWROptions(**chosen),
        sampling=sampling or SamplingOptions(steps=6, guidance_scale=1.0),
        seed=seed,
    )


def test_exponential_weights_are_a_softmax_times_their_number() -> None:
    advantages = torch.tensor([0.3, -1.2, 2.0, 0.0, math.nan])
    weights = exponential_weights(advantages, 0.7)
    expected = torch.softmax(advantages[:4].double() / 0.7, 0) * 4
    torch.testing.assert_close(weights[:4].double(), expected, rtol=1e-6, atol=0)
    assert math.isnan(float(weights[4]))
    assert torch.equal(exponential_weights(torch.zeros(3), 1.0), torch.ones(3))
    # Far too large for exp in any precision, and still a softmax.
    assert exponential_weights(torch.tensor([0.0, 5000.0]), 1.0).tolist() == [0.0, 2.0]


def test_sparse_weights_keep_the_best_and_average_one() -> None:
    values = torch.tensor([4.0, 1.0, math.nan, 3.0, 2.0])
    assert best_share(values, 0.5) == 3.0
    weights = sparse_weights(values, best_share(values, 0.5))
    assert weights[[0, 1, 3, 4]].tolist() == [2.0, 0.0, 2.0, 0.0]
    assert best_share(values, 0.99) == 4.0 and best_share(values, 0.0) == 1.0
    assert sparse_weights(values, 9.0)[[0, 1, 3, 4]].tolist() == [0.0] * 4


@settings(max_examples=50, deadline=None)
@given(
    values=st.lists(st.floats(-20, 20), min_size=1, max_size=12),
    temperature=st.floats(0.05, 20),
    quantile=st.floats(0, 0.99),
)
def test_weights_average_one_and_rise_with_the_reward(
    values: list[float], temperature: float, quantile: float
) -> None:
    rewards = torch.tensor(values)
    order = rewards.argsort()
    for weights in (
        exponential_weights(rewards, temperature),
        sparse_weights(rewards, best_share(rewards, quantile)),
    ):
        assert float(weights.mean()) == pytest.approx(1, rel=1e-5)
        assert bool((weights[order].diff() >= 0).all())
        assert 0 < effective_share(weights) <= 1 + 1e-6


def test_the_effective_share_counts_equal_weights_wholly_and_one_alone_once() -> None:
    assert effective_share(torch.ones(5)) == pytest.approx(1)
    assert effective_share(torch.tensor([5.0, 0, 0, 0, 0, math.nan])) == pytest.approx(0.2)


def test_equal_weights_give_the_ordinary_denoising_loss() -> None:
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 5, 4, 3, 3, generator=generator)
    ordinary = torch.nn.functional.mse_loss(prediction, target)
    torch.testing.assert_close(weighted_denoising_loss(prediction, target, torch.ones(5)), ordinary)
    doubled = weighted_denoising_loss(prediction, target, torch.full((5,), 2.0))
    torch.testing.assert_close(doubled, 2 * ordinary)


def test_a_weight_counts_its_item_alone_and_the_loss_is_in_float32() -> None:
    prediction, target = torch.zeros(3, 2, dtype=torch.bfloat16), torch.ones(3, 2)
    target[1] = 3.0
    loss = weighted_denoising_loss(prediction, target, torch.tensor([0.0, 2.0, 1.0]))
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx((0 + 2 * 9 + 1) / 3)
    with pytest.raises(ValueError, match="shapes"):
        weighted_denoising_loss(prediction, target, torch.ones(2))


def test_the_gradient_of_the_loss_is_that_of_finite_differences() -> None:
    generator = torch.Generator().manual_seed(1)
    prediction, target = torch.randn(2, 3, 2, 2, dtype=torch.float64, generator=generator)
    weight = torch.rand(3, dtype=torch.float64, generator=generator)
    prediction.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda p: weighted_denoising_loss(p, target, weight), (prediction,)
    )


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_every_model_regresses_to_what_it_predicts(toy: ModuleType, kind: str) -> None:
    """The loss of a minibatch, from its tensors, by the formulas written out."""
    policy = toy.ToyPolicy()
    plain = policy.schedule
    schedule = FLOW if kind == "flow" else replace(plain(3), prediction=kind)
    policy.schedule = lambda steps, **_: schedule
    rwr = make(toy, policy=policy, sampling=SamplingOptions(steps=3, guidance_scale=1.0))
    minibatch = next(iter(rwr.minibatches(rwr.collect(0))))
    expected = 0.0
    for b in range(len(minibatch.x_0)):
        for k in range(3):
            level = schedule.levels[minibatch.steps[b, k]]
            alpha, sigma = (
                (1 - level, level) if kind == "flow" else (level.sqrt(), (1 - level).sqrt())
            )
            x_0, eps = minibatch.x_0[b], minibatch.eps[b, k]
            wanted = {"eps": eps, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]
            extra = 0.01 * len(minibatch.cond.prompts[b])
            network = policy.bare
            said = network((alpha * x_0 + sigma * eps)[None], torch.full((1, 1), extra))[0]
            error = (said - wanted).detach().square().mean()
            expected += float(minibatch.weights[b] * error) / 12
    found = sum(float(loss.detach()) for loss, _ in rwr.losses(minibatch, 0.5))
    assert found == pytest.approx(0.5 * expected, rel=1e-5)


def test_the_gradient_does_not_depend_on_how_a_batch_is_cut(toy: ModuleType) -> None:
    whole = make(toy, train_batch_size=12, timesteps_per_loss=6)
    batch = whole.collect(0)
    expected = toy.gradient(whole, batch)
    for size, group in ((12, 1), (4, 3), (1, 2)):
        other = make(toy, policy=whole.policy, train_batch_size=size, timesteps_per_loss=group)
        torch.testing.assert_close(
            toy.gradient(other, batch, size / 12), expected, rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize("size", [1, 4, 12])
def test_two_ranks_share_one_gradient(toy: ModuleType, size: int) -> None:
    """What two ranks compute on their shares, averaged, is what one computes on everything.

    With minibatches of one sample the other rank has nothing to do, and takes part all the same.
    """
    rwr = make(toy, train_batch_size=size, reward=toy.Brightness(failing=(3,)))
    batch = rwr.collect(0)
    expected = toy.gradient(rwr, batch, size / 12)
    count = len(list(rwr.minibatches(batch)))
    total = torch.zeros_like(expected)
    for rank in range(2):
        rwr.group = SimpleNamespace(rank=rank, size=2, lockstep=False)
        share = Share.of(batch.sample_orders[0], rwr.group)
        mine = replace(
            batch.collected,
            share=share,
            trajectory=batch.collected.trajectory.take(share.places),
        )
        part = replace(batch, collected=mine)
        assert len(list(rwr.minibatches(part))) == count
        total += toy.gradient(rwr, part, size / 12)
    torch.testing.assert_close(total / 2, expected, rtol=1e-5, atol=1e-7)


def test_inner_epochs_see_every_sample_once_under_new_noise_and_timesteps(toy: ModuleType) -> None:
    rwr = make(toy, inner_epochs=2, train_batch_size=12, timesteps_per_sample=2)
    first, second = list(rwr.minibatches(rwr.collect(0)))
    order = [first.x_0.flatten(1)[:, 0].argsort(), second.x_0.flatten(1)[:, 0].argsort()]
    assert torch.equal(first.x_0[order[0]], second.x_0[order[1]])
    assert not torch.equal(first.x_0, second.x_0)
    assert not bool((first.eps[order[0]] == second.eps[order[1]]).any())
    assert not torch.equal(first.steps[order[0]], second.steps[order[1]])
    assert all(len(set(row)) == 2 for row in [*first.steps.tolist(), *second.steps.tolist()])
    assert abs(float(first.eps.mean())) < 0.5 and 0.5 < float(first.eps.std()) < 1.5


def test_an_iteration_is_repeated_exactly_and_another_differs(toy: ModuleType) -> None:
    a, b = make(toy), make(toy)
    first, again, other = a.collect(3), b.collect(3), a.collect(4)
    assert torch.equal(first.weights, again.weights)
    for x, y in zip(a.minibatches(first), b.minibatches(again), strict=True):
        assert torch.equal(x.x_0, y.x_0) and torch.equal(x.eps, y.eps)
    x, y = next(iter(a.minibatches(first))), next(iter(a.minibatches(other)))
    assert not torch.equal(x.eps, y.eps)


def test_only_clean_latents_are_kept_and_a_sampler_without_noise_will_do(toy: ModuleType) -> None:
    rwr = make(toy, sampling=SamplingOptions(steps=6, guidance_scale=1.0, eta=0.0))
    batch = rwr.collect(0)
    assert batch.collected.trajectory.latents.shape == (12, 1, *toy.SHAPE)
    assert rwr.needs.clean_latents and not rwr.needs.trajectory


def test_failed_rewards_and_worthless_samples_are_not_trained_on(toy: ModuleType) -> None:
    rwr = make(toy, reward=toy.Brightness(failing=(0, 7)), weighting="sparse", quantile=0.5)
    batch = rwr.collect(0)
    assert batch.metrics["reward/invalid"] == 2
    assert batch.weights.isnan().nonzero().flatten().tolist() == [0, 7]
    trained = list(rwr.minibatches(batch))
    assert sum(len(minibatch.x_0) for minibatch in trained) == 5
    assert all(float(minibatch.weights.min()) == 2.0 for minibatch in trained)
    # 12 x 6 sampled; 5 samples x 4 timesteps, forward and backward.
    assert batch.metrics["cost/calls"] == 12 * 6 + 5 * 4 * 3


class Heard(Silence):
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def test_a_threshold_is_a_raw_reward_and_an_iteration_below_it_teaches_nothing(
    toy: ModuleType,
) -> None:
    plain: dict[str, Any] = {"weighting": "sparse", "advantages": "prompt"}
    batch = make(toy, threshold=0.5, **plain).collect(0)
    rewards = batch.collected.scores.values
    assert torch.equal(batch.weights > 0, rewards >= 0.5)
    assert 0 < int((rewards >= 0.5).sum()) < 12
    assert batch.metrics["weight/positive"] == pytest.approx(
        float((rewards >= 0.5).double().mean())
    )
    rwr = make(toy, threshold=7.0, **plain)
    rwr.listener = heard = Heard()
    batch = rwr.collect(3)
    assert batch.metrics["weight/positive"] == batch.metrics["weight/effective_share"] == 0
    assert list(rwr.minibatches(batch)) == []
    assert len(heard.said) == 1 and "iteration 3: no reward reaches" in heard.said[0]
    assert batch.metrics["cost/calls"] == 12 * 6  # sampled, and nothing more


def test_a_run_goes_on_past_an_iteration_that_teaches_nothing(
    toy: ModuleType, tmp_path: Path
) -> None:
    calls = []

    def reward(images: Tensor, prompts: list[str]) -> Tensor:
        calls.append(len(images))
        high = sum(calls) > 12  # from the second iteration on
        return torch.linspace(0, 1, len(images)) + high

    rwr = make(toy, reward=reward, weighting="sparse", threshold=1.5, advantages="prompt")
    options = TrainOptions(steps=1, checkpoint_every=1)
    train(rwr, options=options, output=tmp_path / "run", reporter=Quiet())
    rows = [json.loads(row) for row in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(row["step"], row["iteration"]) for row in rows] == [(1, 1)]
    assert sum(calls) == 24


def test_a_threshold_that_nothing_reaches_ends_the_run_when_the_guard_loses_patience(
    toy: ModuleType, tmp_path: Path
) -> None:
    iterations = []
    rwr = make(toy, weighting="sparse", threshold=7.0, advantages="prompt")
    collect = rwr.collect
    rwr.collect = lambda iteration: iterations.append(iteration) or collect(iteration)  # type: ignore
    guards = GuardOptions(equal_rewards_iterations=2)
    with pytest.raises(GuardStop, match="threshold"):
        train(rwr, steps=2, guards=guards, output=tmp_path / "run", reporter=Quiet())
    assert iterations == [0, 1]


@pytest.mark.parametrize("quantile", [0.0, 0.5])
def test_equal_positive_weights_are_not_called_a_lack_of_spread(
    toy: ModuleType, quantile: float
) -> None:
    """Every sample counts alike: ordinary regression, which `advantage/std` = 0 would forbid."""
    metrics = make(toy, weighting="sparse", quantile=quantile).collect(0).metrics
    assert "advantage/std" not in metrics
    assert metrics["weight/positive"] == pytest.approx(1 - quantile)
    assert (metrics["weight/std"] == 0) is (quantile == 0)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"threshold": 0.5}, "threshold"),
        ({"quantile": 0.5}, "quantile"),
        ({"weighting": "sparse", "temperature": 0.2}, "temperature"),
        ({"weighting": "sparse", "threshold": 0.5, "quantile": 0.5}, "quantile"),
        ({"weighting": "sparse", "threshold": 0.5, "advantages": "group"}, "advantages"),
        ({"weighting": "sparse", "threshold": 0.5, "buffer_size": 64}, "buffer_size"),
        ({"weighting": "sparse", "threshold": 0.5, "buffer_min_count": 8}, "buffer_min_count"),
        ({"weighting": "sparse", "threshold": 0.5, "advantage_clip": 2.0}, "advantage_clip"),
    ],
)
def test_options_that_nothing_reads_are_refused(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError, match="is not read with") as caught:
        RWROptions(**options)
    assert caught.value.where == name


def test_what_is_described_is_what_is_done(toy: ModuleType) -> None:
    raw = make(toy, weighting="sparse", threshold=0.5, advantages="prompt").describe()[0]
    assert ">= 0.5" in raw or "at least 0.5" in raw
    assert "normalised" not in raw
    assert "exp(reward / 1), rewards normalised by global" in make(toy).describe()[0]
    best = make(toy, weighting="sparse").describe()[0]
    assert "quantile 0.75" in best and "normalised by global" in best


def test_loss_count_says_how_many_losses_come(toy: ModuleType) -> None:
    for group in (1, 3, 100):
        rwr = make(toy, timesteps_per_loss=group)
        batch = rwr.collect(0)
        minibatches = list(rwr.minibatches(batch))
        assert len(minibatches) == rwr.minibatch_count()
        for minibatch in minibatches:
            assert len(list(rwr.losses(minibatch, 1.0))) == rwr.loss_count(minibatch)


def test_it_learns_what_is_rewarded_and_unlearns_what_is_punished(
    toy: ModuleType, tmp_path: Path
) -> None:
    def brightness_after(sign: int) -> float:
        rwr = make(
            toy,
            reward=lambda images, prompts: sign * images.mean(dim=(1, 2, 3)),
            prompts_per_iteration=5,
            samples_per_prompt=16,
            train_batch_size=40,
            temperature=0.5,
        )
        options = TrainOptions(steps=40, learning_rate=3e-2, checkpoint_every=0)
        train(rwr, options=options, output=tmp_path / str(sign), reporter=Quiet())
        return sign * rwr.collect(10**6).metrics["reward/mean"]

    untouched = make(toy, prompts_per_iteration=5, samples_per_prompt=16).collect(10**6).metrics
    before, spread = untouched["reward/mean"], untouched["reward/std"]
    assert brightness_after(+1) > before + 0.15 * spread
    assert brightness_after(-1) < before - 0.15 * spread


def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    toy: ModuleType, tmp_path: Path
) -> None:
    def run(folder: str, steps: int, resume: bool = False) -> dict[str, Tensor]:
        policy = toy.ToyPolicy()
        rwr = make(toy, policy=policy, advantages="prompt", buffer_min_count=4, inner_epochs=2)
        options = TrainOptions(steps=steps, learning_rate=1e-2, checkpoint_every=1)
        train(rwr, options=options, output=tmp_path / folder, resume=resume, reporter=Quiet())
        return {name: p.detach().clone() for name, p in policy.bare.named_parameters()}

    whole = run("whole", 18)
    before = run("cut", 12)
    resumed = run("cut", 18, resume=True)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert not all(torch.equal(whole[name], before[name]) for name in whole)


def test_a_run_does_not_go_on_with_other_prompts(toy: ModuleType) -> None:
    state = make(toy).state_dict()
    make(toy).load_state_dict(state)
    rows: list[Any] = [{"prompt": prompt} for prompt in PROMPTS]
    for changed in (
        PROMPTS[::-1],
        [{**rows[0], "negative_prompt": "x"}, *rows[1:]],
        [{**rows[0], "count": 2}, *rows[1:]],  # the reward gets it
    ):
        other = RWR(toy.ToyPolicy(), toy.Brightness(), changed, options=RWROptions())
        with pytest.raises(UserError, match="not the prompts that the run began with"):
            other.load_state_dict(state)


def test_metadata_is_the_same_in_any_order_and_of_any_kind() -> None:
    def fingerprint(metadata: dict[str, Any]) -> str:
        return Plan([Prompt("a", metadata=metadata)], 1, 1, 0).fingerprint

    assert fingerprint({"x": 1, "y": [2, {"z": None}]}) == fingerprint(
        {"y": (2, {"z": None}), "x": 1}
    )
    assert fingerprint({"x": 1}) != fingerprint({"x": 2})
    assert fingerprint({"x": object()}) == fingerprint({"x": object()})


def test_samples_that_would_all_be_one_picture_are_refused(toy: ModuleType) -> None:
    still = SamplingOptions(steps=6, guidance_scale=1.0, eta=0.0)
    with pytest.raises(UserError, match="all be one picture"):
        make(toy, sampling=still, shared_noise=True)
    make(toy, sampling=still)  # each with a start of its own
    make(toy, shared_noise=True)
