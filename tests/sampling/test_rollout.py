"""Rollouts: what a trajectory holds, and what a picture does and does not depend on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_align import Policy, UserError
from diffusion_align.policy.catalogue import MODELS, resolve
from diffusion_align.sampling import SamplingOptions, resolve_sampling, stream
from diffusion_align.sampling.rollout import Trajectory, rollout
from diffusion_align.sampling.seeds import Purpose, normal

SCALE = 3.0
PROMPTS = ["a", "a red circle", "a", "blue", "a small green square"]


def fresh(items: list[int], iteration: int | None = 0) -> list[np.random.Generator]:
    """The streams of these items of one batch plan."""
    purpose: Purpose = "eval" if iteration is None else "rollout"
    return [stream(1, purpose, iteration=iteration, position=i, sample=0) for i in items]


def sample(
    policy: Policy,
    items: list[int],
    *,
    iteration: int | None = 0,
    batch_size: int = 32,
    steps: int = 5,
    streams: list[np.random.Generator] | None = None,
    **others: Any,
) -> Trajectory:
    """Items of one batch plan, made together or not."""
    cond = policy.encode([PROMPTS[i] for i in items], guidance_scale=SCALE)
    return rollout(
        policy,
        cond,
        policy.schedule(steps),
        streams or fresh(items, iteration),
        guidance_scale=SCALE,
        batch_size=batch_size,
        **others,
    )


def test_pictures_do_not_depend_on_the_batch_size(policy: Policy) -> None:
    whole = sample(policy, [0, 1, 2, 3, 4])
    rms = float(whole.latents.square().mean().sqrt())
    pixels = policy.decode(whole.x_0)
    for batch_size in (1, 2, 3, 4):
        parts = sample(policy, [0, 1, 2, 3, 4], batch_size=batch_size)
        torch.testing.assert_close(parts.latents, whole.latents, atol=1e-5 * rms, rtol=0)
        torch.testing.assert_close(policy.decode(parts.x_0), pixels, atol=1e-5, rtol=0)


def test_pictures_are_the_same_bits_when_a_batch_is_drawn_again(policy: Policy) -> None:
    once, again = sample(policy, [0, 1, 3]), sample(policy, [0, 1, 3])
    assert torch.equal(once.latents, again.latents)
    assert torch.equal(once.log_probs, again.log_probs)


def test_a_picture_does_not_depend_on_its_row_in_the_batch(policy: Policy) -> None:
    # Threads share a matrix product by rows, so that another row may round in another order.
    one, other = sample(policy, [0, 1, 3]), sample(policy, [3, 4, 1])
    for mine, theirs in ((1, 2), (2, 0)):
        torch.testing.assert_close(one.latents[mine], other.latents[theirs], atol=1e-5, rtol=1e-5)


def test_iterations_and_equal_prompts_in_a_batch_differ(policy: Policy) -> None:
    first, second = sample(policy, [0, 2]), sample(policy, [0, 2], iteration=1)
    assert first.cond.prompts == ("a", "a")
    for one, other in (
        (first.latents[0], first.latents[1]),
        (first.latents[0], second.latents[0]),
        (first.latents[0], sample(policy, [0], iteration=None).latents[0]),
    ):
        for i in range(len(one)):
            assert float((one[i] - other[i]).abs().max()) > 0.05


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("batch_size", [5, 2])
def test_replaying_an_untouched_policy_gives_a_ratio_of_one(
    folder: Path, reduction: Any, batch_size: int
) -> None:
    policy = Policy.load(folder, lora_rank=4, lora_dropout=0.5)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.add_(0.1)
    made = sample(policy, [0, 1, 2, 3, 4], reduction=reduction)
    rows = torch.arange(5)
    for start in range(0, 5, batch_size):
        index = rows[start : start + batch_size]
        part = made.take(index)
        for i in range(len(made.schedule)):
            x_t, x_next = part.latents[:, i], part.latents[:, i + 1]
            with torch.no_grad():
                prediction = policy.predict(
                    x_t, made.schedule.timesteps[i], part.cond, guidance_scale=SCALE
                )
            step = made.schedule.step(prediction, x_t, i)
            again = step.log_prob(x_next, reduction)
            old = part.log_probs[:, i]
            if batch_size == 5:
                assert torch.equal(again, old)
            # The sum over 1024 dimensions is near 2500 nats, of which float32 keeps 2.4e-4.
            rounding = float(np.spacing(old.abs().max().numpy()))
            bound = 1e-6 if reduction == "mean" else max(1e-4, 2 * rounding)
            assert float((again - old).expm1().abs().max()) <= bound
            normal = torch.distributions.Normal(step.mean.double(), step.std.double())
            terms = normal.log_prob(x_next.double()).flatten(1)
            exact = terms.mean(1) if reduction == "mean" else terms.sum(1)
            torch.testing.assert_close(again.double(), exact, rtol=1e-5, atol=1e-5)


def test_steps_without_noise_have_no_likelihood_and_draw_nothing(policy: Policy) -> None:
    made = sample(policy, [0, 1], eta=0.0)
    assert bool(made.log_probs.isnan().all())
    assert bool(sample(policy, [0, 1]).log_probs.isfinite().all())
    source = stream(1, "rollout", iteration=0, position=0, sample=0)
    untouched = stream(1, "rollout", iteration=0, position=0, sample=0)
    cond = policy.encode(["a"], guidance_scale=1.0)
    rollout(policy, cond, policy.schedule(5), [source], guidance_scale=1.0, eta=0.0)
    shape = cond.latent_shape
    untouched.standard_normal(shape, dtype="float32")
    assert source.random() == untouched.random()


def test_a_last_step_without_noise_is_marked(folder: Path) -> None:
    policy = Policy.load(folder)
    policy.pipeline.scheduler.register_to_config(set_alpha_to_one=True)
    made = sample(policy, [0, 1])
    assert bool(made.log_probs[:, -1].isnan().all())
    assert bool(made.log_probs[:, :-1].isfinite().all())


def test_keeping_only_the_end_gives_the_same_pictures(policy: Policy) -> None:
    everything = sample(policy, [0, 1, 2], batch_size=2)
    end = sample(policy, [0, 1, 2], batch_size=2, keep="final")
    assert torch.equal(everything.x_0, end.x_0)
    assert end.latents.shape[1] == 1 and bool(end.log_probs.isnan().all())
    assert everything.latents.shape == (3, 6, *everything.cond.latent_shape)
    assert everything.log_probs.shape == (3, 5)


def test_a_rollout_keeps_float32_and_no_graph_whatever_the_models_dtype(folder: Path) -> None:
    policy = Policy.load(folder, lora_rank=2, dtype="bfloat16")
    made = sample(policy, [0, 1])
    assert made.latents.dtype == made.log_probs.dtype == torch.float32
    assert not made.latents.requires_grad and not made.log_probs.requires_grad
    # nothing was rounded to bfloat16 on the way
    assert not torch.equal(made.latents, made.latents.bfloat16().float())


def test_a_rollout_calls_the_denoiser_once_per_step_and_batch(folder: Path) -> None:
    policy = Policy.load(folder)
    sizes: list[int] = []
    slot = policy.denoiser

    class Counting(torch.nn.Module):
        def forward(self, sample: Tensor, **others: Any) -> Any:
            assert not torch.is_grad_enabled()
            sizes.append(sample.shape[0])
            return slot(sample, **others)

    policy.denoiser = Counting()
    sample(policy, [0, 1, 2], batch_size=2, steps=4)
    assert sizes == [4] * 4 + [2] * 4


def test_taken_items_keep_their_rows(policy: Policy) -> None:
    made = sample(policy, [0, 1, 3])
    taken = made.take([2, 0])
    assert len(taken) == 2 and taken.cond.prompts == ("blue", "a")
    assert torch.equal(taken.latents, made.latents[[2, 0]])
    assert torch.equal(taken.x_0, made.x_0[[2, 0]])


def test_a_rollout_refuses_streams_that_do_not_match(policy: Policy) -> None:
    cond = policy.encode(["a", "b"], guidance_scale=1.0)
    streams = [stream(0, "eval", iteration=None, position=0, sample=0)]
    with pytest.raises(ValueError, match="2 items but 1 streams"):
        rollout(policy, cond, policy.schedule(2), streams, guidance_scale=1.0)


def test_options_left_out_are_the_models_own() -> None:
    info = MODELS["tiny-sd"]
    resolved = resolve_sampling(SamplingOptions(eta=0.5, width=128), info)
    assert (resolved.steps, resolved.guidance_scale) == (info.steps, info.guidance_scale)
    assert (resolved.height, resolved.width, resolved.eta) == (info.height, 128, 0.5)
    assert resolve_sampling(resolved, MODELS["sdxl"]) == resolved
    with pytest.raises(UserError, match="only once it is loaded"):
        resolve_sampling(SamplingOptions(), resolve("owner/model"))


@pytest.mark.parametrize(
    "change",
    [
        {"steps": 0},
        {"batch_size": 0},
        {"height": -8},
        {"eta": 1.5},
        {"eta": float("nan")},
        {"guidance_scale": -1.0},
        {"noise_level": -0.1},
        {"flow_kind": "dacne"},
    ],
    ids=str,
)
def test_options_out_of_range_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^{next(iter(change))}: must"):
        SamplingOptions(**change)


def test_steps_without_their_noise_are_those_of_the_deterministic_sampler(policy: Policy) -> None:
    """Item by item: one with noise nowhere, one everywhere, two with windows of their own."""
    noisy = torch.zeros(4, 5, dtype=torch.bool)
    noisy[1], noisy[2, 1:3], noisy[3, 2] = True, True, True
    mixed = sample(policy, [0, 1, 3, 4], noisy=noisy, eta=1.0)
    plain, full = sample(policy, [0, 1, 3, 4], eta=0.0), sample(policy, [0, 1, 3, 4], eta=1.0)
    for row, expected in ((0, plain), (1, full)):
        torch.testing.assert_close(mixed.latents[row], expected.latents[row], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(mixed.latents[2, :2], plain.latents[2, :2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(mixed.latents[2, 2], plain.latents[2, 2], atol=1e-2)
    assert torch.equal(~mixed.log_probs[:, :4].isnan(), noisy[:, :4])
    for row, item in enumerate([0, 1, 3, 4]):
        alone = sample(policy, [item], noisy=noisy[row : row + 1], eta=1.0)
        torch.testing.assert_close(mixed.latents[row], alone.latents[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(
            mixed.log_probs[row], alone.log_probs[0], atol=1e-5, rtol=1e-5, equal_nan=True
        )


def test_an_item_draws_for_its_own_steps_alone(policy: Policy) -> None:
    noisy = torch.zeros(3, 5, dtype=torch.bool)
    noisy[1, 1:3], noisy[2] = True, True
    streams = fresh([0, 1, 3])
    made = sample(policy, [0, 1, 3], noisy=noisy, streams=streams)
    taken = (~made.log_probs.isnan()).sum(dim=1).tolist()
    assert taken[:2] == [0, 2] and taken[2] > 2
    for used, untouched, steps in zip(streams, fresh([0, 1, 3]), taken, strict=True):
        for _ in range(1 + steps):  # x_T first
            normal([untouched], made.latents.shape[2:])
        assert used.random() == untouched.random()  # both stand at the same place


def test_items_that_share_a_start_differ_by_the_noise_of_their_steps_alone(policy: Policy) -> None:
    def starts() -> list[np.random.Generator]:
        return [stream(1, "rollout", iteration=0, position=0, sample=0) for _ in range(2)]

    own, together = sample(policy, [0, 2]), sample(policy, [0, 2], starts=starts())
    assert torch.equal(together.latents[0, 0], together.latents[1, 0])
    torch.testing.assert_close(together.latents[0], own.latents[0])
    assert not torch.allclose(together.x_0[0], together.x_0[1], atol=1e-2)
    still = sample(policy, [0, 2], starts=starts(), noisy=torch.zeros(2, 5, dtype=torch.bool))
    torch.testing.assert_close(still.x_0[0], still.x_0[1], atol=1e-5, rtol=1e-5)
