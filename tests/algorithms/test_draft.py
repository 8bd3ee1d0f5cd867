"""Reward backpropagation as a method: what it is given, what it refuses, who takes part."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.errors import UserError
from diffusion_align.policy.adapter import TrainingDropout
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.guards.alarm import GuardStop
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions

PROMPTS = ["a", "bb", "cccc", "ddddddd"]


def make(world: ModuleType, *, policy: Any = None, reward: Any = None, **options: Any) -> Draft:
    chosen = {"preset": "draft-k", "prompts_per_iteration": 4, "train_batch_size": 4, **options}
    if "active_steps" not in chosen and chosen["preset"] == "draft-k":
        chosen["active_steps"] = 2
    return Draft(
        policy or world.GuidedPolicy("ddim", torch.float32),
        reward or world.Smooth(),
        PROMPTS,
        options=DraftOptions(**chosen),
        sampling=SamplingOptions(steps=6, guidance_scale=3.0, batch_size=3),
        seed=1,
    )


def gradient(draft: Draft, iteration: int = 0) -> Tensor:
    parameters = draft.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    batch = draft.collect(iteration)
    for minibatch in draft.minibatches(batch):
        count = 0
        for loss, _ in draft.losses(minibatch, 1 / draft.minibatch_count()):
            loss.backward()
            count += 1
        assert count == draft.loss_count(minibatch)
    return torch.cat(
        [torch.zeros_like(p).flatten() if p.grad is None else p.grad.flatten() for p in parameters]
    )


def test_pixels_reach_the_reward_as_they_are_decoded(world: ModuleType) -> None:
    """Once in [0, 1], not squeezed into [0.5, 1] by a second mapping (AlignProp's bug)."""
    reward = world.Smooth()
    draft = make(world, reward=reward)
    batch = draft.collect(0)
    seen = torch.cat(reward.seen)
    expected = draft.policy.decode(batch.judged.walk.final)
    torch.testing.assert_close(seen, expected, rtol=1e-6, atol=1e-7)
    assert float(seen.min()) < 0.4 and float(seen.min()) >= 0 and float(seen.max()) <= 1


def test_a_group_reward_sees_all_samples_of_a_prompt_together(world: ModuleType) -> None:
    reward = world.Smooth(scope="group")
    draft = make(
        world, reward=reward, prompts_per_iteration=2, samples_per_prompt=3, train_batch_size=6
    )
    found = gradient(draft)
    # Chunks of 3 are sampled, of prompts of 3: the reward is asked once per prompt.
    assert [len(set(asked)) for asked in reward.asked] == [1, 1]
    assert [len(asked) for asked in reward.asked] == [3, 3]
    # r_i = s_i - mean(s) / 2 has, over a whole prompt, half the gradient of s.
    alone = make(world, prompts_per_iteration=2, samples_per_prompt=3, train_batch_size=6)
    torch.testing.assert_close(found, gradient(alone) / 2, rtol=1e-4, atol=1e-9)


def test_prompts_that_chunks_split_are_put_together(world: ModuleType) -> None:
    reward = world.Smooth(scope="group")
    draft = make(
        world, reward=reward, prompts_per_iteration=2, samples_per_prompt=2, train_batch_size=4
    )
    draft.collect(0)  # chunks of 3: the second prompt's samples lie in two of them
    assert [len(asked) for asked in reward.asked] == [2, 2]


def test_items_without_a_score_take_no_part(world: ModuleType) -> None:
    """NaN in a value and in its derivative: neither reaches anybody's gradient."""
    whole = make(world)
    pixels = whole.policy.decode(whole.collect(0).judged.walk.final)
    marks = pixels.flatten(1).mean(1)
    bad = float(marks[1])
    failing = world.Smooth(failing=lambda media: (media.flatten(1).mean(1) - bad).abs() < 1e-6)
    draft = make(world, reward=failing, decode_batch_size=4)
    found = gradient(draft)
    assert found.isfinite().all()
    batch = draft.collect(0)
    assert batch.metrics["reward/invalid"] == 1
    assert batch.judged.collection.scores.values.isnan().tolist() == [False, True, False, False]
    # The others' gradient is what it was: theirs alone, over the same 4.
    losses = whole.collect(0)
    share = losses.judged.gradient
    assert torch.equal(batch.judged.gradient[[0, 2, 3]], share[[0, 2, 3]])
    assert not batch.judged.gradient[1].any()
    assert sum(minibatch.count for minibatch in draft.minibatches(batch)) == 3


def test_a_margin_that_all_have_reached_teaches_nothing_and_ends_the_run(
    world: ModuleType, tmp_path: Path
) -> None:
    said: list[str] = []
    draft = make(world, loss="relu", loss_target=-1.0)

    class Listening:
        def progress(self, phase: str, done: int, total: int) -> None: ...

        def message(self, text: str) -> None:
            said.append(text)

    draft.listener = Listening()
    batch = draft.collect(0)
    assert batch.metrics["weight/positive"] == 0 and list(draft.minibatches(batch)) == []
    assert "reaches algorithm.loss_target=-1" in said[0]
    with pytest.raises(GuardStop):
        train(
            make(world, loss="relu", loss_target=-1.0),
            options=TrainOptions(steps=3),
            output=tmp_path / "run",
            reporter=Quiet(),
        )


def test_training_raises_the_reward_and_counts_one_update_an_iteration(
    world: ModuleType, tmp_path: Path
) -> None:
    draft = make(world, preset="draft-lv", train_batch_size=2)
    before = draft.collect(0).metrics["reward/mean"]
    options = TrainOptions(steps=12, learning_rate=2e-2, accumulation=2)
    result = train(draft, options=options, output=tmp_path / "run", reporter=Quiet())
    assert result.iterations == result.steps == 12
    assert draft.collect(0).metrics["reward/mean"] > before + 0.02


def test_a_run_that_goes_on_is_the_run_that_was_never_stopped(
    world: ModuleType, tmp_path: Path
) -> None:
    def run(folder: Path, steps: int, **more: Any) -> list[Tensor]:
        draft = make(world, preset="drtune")
        options = TrainOptions(steps=steps, learning_rate=1e-2, checkpoint_every=1)
        train(draft, options=options, output=folder, reporter=Quiet(), **more)
        assert draft.state_dict()["calls"] > 0
        return [p.detach().clone() for p in draft.policy.trainable_parameters()]

    whole = run(tmp_path / "whole", 4)
    run(tmp_path / "cut", 2)
    assert all(map(torch.equal, run(tmp_path / "cut", 4, resume=True), whole))


# --- bad input ---------------------------------------------------------------------------------


def refused(call: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


def test_a_reward_without_gradient_is_refused_with_those_that_have_one(world: ModuleType) -> None:
    reward = world.Smooth()
    reward.info = replace(reward.info, differentiable=False)
    error = refused(lambda: make(world, reward=reward))
    assert "has no gradient" in error.what
    assert "tiny-hps" in error.fix and "hpsv2.1" in error.fix
    assert "incompressibility" not in error.fix


def test_more_active_steps_than_steps_are_refused(world: ModuleType) -> None:
    error = refused(lambda: make(world, active_steps=7))
    assert error.where == "active_steps" and "7 of 6" in error.what


def test_fp16_is_refused_in_the_weights_and_in_training(world: ModuleType, tmp_path: Path) -> None:
    policy = world.GuidedPolicy("ddim", torch.float32)
    policy.denoiser.half()
    assert "fp16" in refused(lambda: make(world, policy=policy)).what
    options = TrainOptions(steps=1, mixed_precision="fp16")
    error = refused(
        lambda: train(make(world), options=options, output=tmp_path / "r", reporter=Quiet())
    )
    assert error.where == "train.mixed_precision" and "scaler" in error.what


def test_dropout_is_refused(world: ModuleType) -> None:
    policy = world.GuidedPolicy()
    policy.denoiser.extra = TrainingDropout(0.1)
    assert refused(lambda: make(world, policy=policy)).where == "lora.dropout"


def test_several_updates_of_one_iteration_are_refused(world: ModuleType, tmp_path: Path) -> None:
    draft = make(world, train_batch_size=2)
    error = refused(
        lambda: train(draft, options=TrainOptions(steps=2), output=tmp_path / "r", reporter=Quiet())
    )
    assert "one update" in error.what and "train.accumulation=2" in error.fix


def test_a_kl_where_no_step_has_noise_is_refused(world: ModuleType) -> None:
    def build() -> Draft:
        return Draft(
            world.GuidedPolicy(),
            world.Smooth(),
            PROMPTS,
            options=DraftOptions(preset="draft-k", kl_weight=1.0),
            sampling=SamplingOptions(steps=6, eta=0.0),
        )

    assert "kl_kind=prediction" in refused(build).fix


def test_what_is_refused_does_not_hang_on_a_draw(
    world: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plans that leave gaps, or reach a step with noise, in some of their draws only."""

    def build(seed: int, **options: Any) -> Draft:
        return Draft(
            world.GuidedPolicy(),
            world.Smooth(),
            PROMPTS,
            options=DraftOptions(preset="draft", **options),
            sampling=SamplingOptions(steps=6),
            seed=seed,
        )

    monkeypatch.setitem(world.DDIM, "set_alpha_to_one", True)  # the last step takes no noise
    for seed in range(12):
        build(seed, active="uniform", active_steps=1, kl_weight=1.0)
        error = refused(lambda s=seed: build(s, active="last", active_steps=1, kl_weight=1.0))
        assert error.where == "algorithm.kl_kind"
    monkeypatch.setitem(world.DDIM, "clip_sample", True)
    window: Any = {"active": "interval", "interval_start": 0.5}
    for seed in range(12):
        error = refused(lambda s=seed: build(s, active_steps=2, **window))
        assert error.where == "algorithm.active" and "clips" in error.what
        build(seed, active_steps=3, **window)


class Pulling:
    """A supervised step of one loss, every second iteration."""

    calls = 7

    def __init__(self, parameter: Any) -> None:
        self._parameter = parameter

    def due(self, iteration: int) -> bool:
        return iteration % 2 == 0

    def losses(self, iteration: int, scale: float, group: Any) -> Any:
        yield self._parameter.sum() * 0.5, {"supervised/loss": torch.tensor(0.5)}

    def loss_count(self, group: Any) -> int:
        return 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_supervised_step_is_taken_where_no_sample_teaches(world: ModuleType, ranks: int) -> None:
    def work(group: Any) -> tuple[int, Tensor | None, float, int]:
        draft = make(world, loss="relu", loss_target=-1.0)
        bias = draft.policy.trainable_parameters()[-1]
        draft.supervised, draft.group = Pulling(bias), group  # type: ignore[assignment]
        batch = draft.collect(0)
        assert batch.metrics["weight/positive"] == 0
        (minibatch,) = draft.minibatches(batch)
        losses = 0
        for loss, _ in draft.losses(minibatch, 1.0):
            loss.backward()
            losses += 1
        assert losses == draft.loss_count(minibatch)
        return (
            losses,
            bias.grad,
            batch.metrics["cost/calls"],
            len(list(draft.minibatches(draft.collect(1)))),
        )

    for losses, found, calls, later in world.on_ranks(work, ranks):
        assert losses == 1 and bool((found == 0.5).all())
        assert calls == 4 * 6 * 2 + 7  # sampled in pairs; nothing is walked back
        assert later == 0


def test_a_copy_without_a_score_counts_in_no_mean(world: ModuleType) -> None:
    """The loss of an item is the mean over those of its 1 + n pictures that have a score."""
    options: dict[str, Any] = {"preset": "draft-lv", "decode_batch_size": 4}
    whole = make(world, **options).collect(0).judged
    marks = whole.walk.copies[2].flatten(1).mean(1)
    policy = world.GuidedPolicy("ddim", torch.float32)
    pixel = float(policy.decode(whole.walk.copies[2])[1].mean())
    assert len(marks) == 2
    failing = world.Smooth(failing=lambda media: (media.flatten(1).mean(1) - pixel).abs() < 1e-6)
    found = make(world, reward=failing, **options).collect(0).judged
    assert found.copy_scores.isnan().nonzero().tolist() == [[1, 2]]
    others = [0, 1, 3]
    assert torch.equal(found.gradient[others], whole.gradient[others])
    assert torch.equal(found.copy_gradients[others], whole.copy_gradients[others])
    torch.testing.assert_close(found.gradient[2], whole.gradient[2] * 1.5)
    torch.testing.assert_close(found.copy_gradients[2, 0], whole.copy_gradients[2, 0] * 1.5)
    assert not found.copy_gradients[2, 1].any()


def test_the_vae_is_named_where_it_loses_or_breaks_the_gradient(world: ModuleType) -> None:
    for value, said in ((0.0, "the chain breaks at the VAE"), (math.nan, "NaN or infinity")):
        draft = make(world)
        policy: Any = draft.policy
        policy.decode_gradient = lambda x, g, chunk=None, frames=None, v=value: x * v
        error = refused(lambda draft=draft: draft.collect(0))
        assert said in error.what and error.where.startswith("VAE")


def test_the_denoiser_is_named_where_no_parameter_gets_a_gradient(world: ModuleType) -> None:
    draft = make(world)
    policy: Any = draft.policy
    network: Any = policy.denoiser
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    spare = torch.nn.Parameter(torch.zeros(18))  # an adapter that is switched off
    policy.trainable_parameters = lambda: [spare]
    error = refused(lambda: gradient(draft))
    assert "the chain breaks at the denoiser" in error.what
    # One that is on, and comes to nothing.
    forward = type(network).forward
    network.forward = lambda x, t, c: forward(network, x, t, c) + (0 * spare).view(x.shape[1:])
    error = refused(lambda: gradient(draft))
    assert "the chain breaks at the denoiser" in error.what


def test_a_chain_that_is_not_the_sampled_one_is_refused(world: ModuleType) -> None:
    draft = make(world)
    batch = draft.collect(0)
    with torch.no_grad():
        draft.policy.trainable_parameters()[-1].add_(0.5)

    def walk() -> None:
        for minibatch in draft.minibatches(batch):
            for loss, metrics in draft.losses(minibatch, 1.0):
                loss.backward()
                assert metrics["replay/mismatch_max"] > 1e-3

    assert refused(walk).where == "algorithm.mismatch_limit"


# --- several processes ---------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["item", "group"])
@pytest.mark.parametrize("samples", [2, 3])
def test_two_ranks_have_the_gradient_of_one(world: ModuleType, scope: str, samples: int) -> None:
    options = {
        "preset": "draft-lv",
        "prompts_per_iteration": 3,
        "samples_per_prompt": samples,
        "train_batch_size": samples,
    }
    alone = gradient(make(world, reward=world.Smooth(scope=scope), **options))

    def work(group: Any) -> tuple[Tensor, Any]:
        draft = make(world, reward=world.Smooth(scope=scope), **options)
        draft.group = group
        return gradient(draft), draft.collect(1).metrics

    (one, told), (other, said) = world.on_ranks(work)
    assert told == said
    # DDP averages over the ranks.
    torch.testing.assert_close((one + other) / 2, alone, rtol=1e-4, atol=1e-8)
