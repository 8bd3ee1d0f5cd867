"""Evaluation pictures: shared noise, independence of batches, the policy left as it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.generate import evaluation_sampling, generate
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.sampling.seeds import normal, stream

PROMPTS = ["a cat", "a rather large dog", "x"]
PLAIN = SamplingOptions(eta=0.0)


def test_base_and_tuned_start_from_the_same_noise_of_the_eval_streams(fake_policy: Any) -> None:
    policy = fake_policy(shift=0.3)
    base = generate(policy, PROMPTS, 2, PLAIN, reference="base", run_seed=7)
    tuned = generate(policy, PROMPTS, 2, PLAIN, run_seed=7)

    expected = torch.cat(
        [
            normal([stream(7, "eval", iteration=None, position=p, sample=s)], (4, 2, 2))
            for p in range(3)
            for s in range(2)
        ]
    )
    assert torch.equal(policy.start_noise[0], expected)
    assert torch.equal(policy.start_noise[1], expected)
    assert policy.references == ["base"]
    assert not torch.equal(base.pixels, tuned.pixels)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_untouched_policy_draws_what_its_reference_draws(fake_policy: Any, eta: float) -> None:
    policy = fake_policy(shift=0.0)
    sampling = SamplingOptions(eta=eta)
    base = generate(policy, PROMPTS, 2, sampling, reference="base")
    assert torch.equal(base.pixels, generate(policy, PROMPTS, 2, sampling).pixels)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_pictures_do_not_depend_on_batch_size_or_on_slicing(fake_policy: Any, eta: float) -> None:
    policy = fake_policy(shift=0.1)
    whole = generate(policy, PROMPTS, 3, SamplingOptions(eta=eta, batch_size=32))
    small = generate(policy, PROMPTS, 3, SamplingOptions(eta=eta, batch_size=2))
    last = generate(policy, PROMPTS[2:], 3, SamplingOptions(eta=eta), first_position=2)
    assert torch.equal(whole.pixels, small.pixels)
    assert torch.equal(whole.pixels[2:], last.pixels)


def test_samples_and_run_seeds_differ(fake_policy: Any) -> None:
    policy = fake_policy()
    first = generate(policy, ["a cat"], 2, PLAIN, run_seed=0).pixels
    other = generate(policy, ["a cat"], 2, PLAIN, run_seed=1).pixels
    assert not torch.equal(first[0, 0], first[0, 1])
    assert not torch.equal(first, other)


def test_pictures_are_arranged_by_prompt_and_seed_as_8_bit(fake_policy: Any) -> None:
    pictures = generate(fake_policy(), [Prompt("a"), "b"], 3, PLAIN)
    assert pictures.pixels.shape == (2, 3, 3, 16, 16)
    assert pictures.pixels.dtype == torch.uint8
    assert pictures.floats().max() <= 1.0
    assert bool(pictures.valid.all())


def test_dropout_is_off_while_drawing_and_every_mode_comes_back(fake_policy: Any) -> None:
    policy = fake_policy()
    policy.denoiser[0].eval()
    once = generate(policy, PROMPTS, 1, PLAIN).pixels
    assert torch.equal(once, generate(policy, PROMPTS, 1, PLAIN).pixels)
    modes = [policy.denoiser.training, *(part.training for part in policy.denoiser)]
    assert modes == [True, False, True]


def test_pixels_that_are_not_finite_make_a_picture_invalid(fake_policy: Any) -> None:
    policy = fake_policy()
    decode = policy.decode

    def broken(x_0: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = decode(x_0)
        pixels[1, 0, 3, 3] = torch.nan
        return pixels

    policy.decode = broken
    pictures = generate(policy, ["a", "b"], 2, PLAIN)
    assert pictures.valid.tolist() == [[True, False], [True, True]]


def test_no_gradient_and_no_global_random_state_are_touched(fake_policy: Any) -> None:
    before = torch.get_rng_state()
    pictures = generate(fake_policy(), ["a"], 1, SamplingOptions(eta=1.0))
    assert torch.equal(before, torch.get_rng_state())
    assert not pictures.pixels.requires_grad


def test_evaluation_at_eta_zero_is_deterministic_in_both_families() -> None:
    training = SamplingOptions(steps=9, eta=1.0, batch_size=4, flow_kind="sde")
    plain = evaluation_sampling(training, EvaluationOptions(eta=0.0, batch_size=16))
    assert (plain.steps, plain.eta, plain.flow_kind, plain.batch_size) == (9, 0.0, "ode", 16)
    noisy = evaluation_sampling(training, EvaluationOptions(eta=0.5), batch_size=3)
    assert (noisy.eta, noisy.flow_kind, noisy.batch_size) == (0.5, "sde", 3)


def test_an_evaluation_has_the_steps_and_guidance_of_the_training_unless_it_says_its_own() -> None:
    training = SamplingOptions(steps=9, guidance_scale=1.0)
    same = evaluation_sampling(training, EvaluationOptions())
    own = evaluation_sampling(training, EvaluationOptions(steps=40, guidance_scale=4.5))
    assert (same.steps, same.guidance_scale) == (9, 1.0)
    assert (own.steps, own.guidance_scale) == (40, 4.5)
    assert evaluation_sampling(SamplingOptions(), EvaluationOptions()).steps is None
