"""DDPO's gradient in the linear-Gaussian world: NumPy closed form, finite differences, and the
derivative of the expected reward itself.
"""

from __future__ import annotations

from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.batches import TrajectoryMinibatch
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.sampling.options import SamplingOptions

STEPS = 3


def make(toy: ModuleType, **options: Any) -> DDPO:
    chosen = {"clip_range": 0.2, "train_batch_size": 4, **options}
    policy = toy.ToyPolicy()
    policy.denoiser.double()
    policy.start.double()
    return DDPO(
        policy,
        toy.Brightness(),
        ["a", "bb"],
        options=DDPOOptions(prompts_per_iteration=2, samples_per_prompt=2, **chosen),
        sampling=SamplingOptions(steps=STEPS, guidance_scale=1.0),
    )


def coefficients(ddpo: DDPO) -> list[tuple[float, float, float, float, float]]:
    """(alpha, sigma, weight of x0_hat, weight of eps_hat, std) per step, from DDIM's equations."""
    schedule = ddpo.policy.schedule(STEPS)
    levels, landings = schedule.levels.double().numpy(), schedule._landings().double().numpy()
    rows = []
    for a_t, a_p in zip(levels[:-1], landings):
        variance = (1 - a_p) / (1 - a_t) * (1 - a_t / a_p)
        rows.append(
            (
                np.sqrt(a_t),
                np.sqrt(1 - a_t),
                np.sqrt(a_p),
                np.sqrt(1 - a_p - variance),
                np.sqrt(variance),
            )
        )
    return rows


def random_minibatch(ddpo: DDPO, toy: ModuleType, seed: int = 0) -> TrajectoryMinibatch:
    """Four trajectories of nobody's policy: any numbers must give the right derivative."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    minibatch = TrajectoryMinibatch(
        rows=torch.arange(4),
        steps=torch.arange(STEPS).repeat(4, 1),
        latents=normal(4, STEPS + 1, *toy.SHAPE),
        old_log_probs=torch.zeros(4, STEPS, dtype=torch.float64),
        advantages=normal(4),
        cond=toy.ToyConditioning(("a", "bb", "a", "bb")),
    )
    with torch.no_grad():
        groups = minibatch.groups(1)
        now = [ddpo._likelihood.log_prob(minibatch, group, 1.0) for group in groups]
    return replace(minibatch, old_log_probs=torch.cat(now, dim=1))


def gradient(ddpo: DDPO, minibatch: TrajectoryMinibatch, scale: float = 1.0) -> list[Tensor]:
    parameters = ddpo.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for loss, _ in ddpo.losses(minibatch, scale):
        loss.backward()
    return [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]


def total(ddpo: DDPO, minibatch: TrajectoryMinibatch) -> float:
    with torch.no_grad():
        return sum(float(loss) for loss, _ in ddpo.losses(minibatch, 1.0))


def test_the_gradient_at_ratio_one_is_the_closed_form(toy: ModuleType) -> None:
    """-mean A grad log p, differentiated on paper: d log p / d eps = c (x' - mu) / (n s^2)."""
    ddpo = make(toy)
    minibatch = random_minibatch(ddpo, toy)
    weight, bias = (p.detach().numpy() for p in ddpo.policy.trainable_parameters())
    latents = minibatch.latents.flatten(2).numpy()
    d_weight, d_bias = np.zeros_like(weight), np.zeros_like(bias)
    for row in range(4):
        extra = 0.01 * len(minibatch.cond.prompts[row])
        for step, (alpha, sigma, w_x0, w_eps, std) in enumerate(coefficients(ddpo)):
            x, x_next = latents[row, step], latents[row, step + 1]
            eps = weight @ x + bias + extra
            mean = w_x0 * (x - sigma * eps) / alpha + w_eps * eps
            d_eps = (x_next - mean) / (4 * std**2) * (w_eps - w_x0 * sigma / alpha)
            share = -float(minibatch.advantages[row]) / (4 * STEPS)
            d_weight += share * np.outer(d_eps, x)
            d_bias += share * d_eps
    got_weight, got_bias = (g.numpy() for g in gradient(ddpo, minibatch))
    np.testing.assert_allclose(got_weight, d_weight, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(got_bias, d_bias, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unit", ["mean", "nats"])
@pytest.mark.parametrize("kl_weight", [0.0, 0.3])
def test_the_gradient_equals_finite_differences(
    toy: ModuleType, unit: str, kl_weight: float
) -> None:
    """Off the old policy, where some ratios are clipped and some are not."""
    ddpo = make(toy, clip_unit=unit, kl_weight=kl_weight)
    minibatch = random_minibatch(ddpo, toy)
    parameters = ddpo.policy.trainable_parameters()
    # One fixed move: a difference quotient across the kink of a clip would be meaningless.
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in parameters:
            move = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.add_(0.02 * move)
    clipped = [float(m["policy/clip_fraction"]) for _, m in ddpo.losses(minibatch, 1.0)]
    analytic = torch.cat([g.flatten() for g in gradient(ddpo, minibatch)])
    numeric, step = [], 1e-6
    for parameter in parameters:
        for index in range(parameter.numel()):
            flat = parameter.data.view(-1)
            before = float(flat[index])
            flat[index] = before + step
            above = total(ddpo, minibatch)
            flat[index] = before - step
            below = total(ddpo, minibatch)
            flat[index] = before
            numeric.append((above - below) / (2 * step))
    expected = torch.tensor(numeric, dtype=torch.float64)
    torch.testing.assert_close(analytic, expected, rtol=1e-6, atol=1e-8)
    if unit == "nats":
        assert any(share > 0 for share in clipped)


def test_it_estimates_the_derivative_of_the_expected_reward(toy: ModuleType) -> None:
    """x_0 of a linear policy is Gaussian, so E[r] of r = -|x_0 - 1|^2 is known: autograd gives its
    derivative, and the mean of DDPO's gradient over many samples must be that, within its error.
    """
    ddpo = make(toy)
    parameters = ddpo.policy.trainable_parameters()
    start = torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    truth = torch.cat(
        [g.flatten() for g in torch.autograd.grad(value_after(ddpo, 0, *start), parameters)]
    )
    generator = torch.Generator().manual_seed(1)
    estimates = torch.stack(
        [monte_carlo_gradient(ddpo, toy, generator, count=4000) for _ in range(24)]
    )
    found, error = estimates.mean(0), estimates.std(0) / len(estimates) ** 0.5
    assert float(((found - truth) / error).abs().max()) < 4
    assert float(truth.norm() / error.norm()) > 10  # the samples are enough to tell


def moves(ddpo: DDPO) -> list[tuple[Tensor, Tensor, float]]:
    """x_next = M x + v + s noise, with the graph of W and b in M and v."""
    weight, bias = ddpo.policy.trainable_parameters()
    rows = []
    for alpha, sigma, w_x0, w_eps, std in coefficients(ddpo):
        on_eps = w_eps - w_x0 * sigma / alpha
        rows.append(((w_x0 / alpha) * torch.eye(4) + on_eps * weight, on_eps * (bias + 0.01), std))
    return rows


def value_after(ddpo: DDPO, step: int, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[r] when x at `step` is Gaussian; mean may be [..., 4]."""
    for move, shift, std in moves(ddpo)[step:]:
        mean = mean @ move.T + shift
        covariance = move @ covariance @ move.T + std**2 * torch.eye(4)
    return -((mean - 1).square().sum(-1) + covariance.trace())


def monte_carlo_gradient(
    ddpo: DDPO, toy: ModuleType, generator: torch.Generator, count: int
) -> Tensor:
    """An estimate of the derivative of E[r] from `count` trajectories, through `losses`.

    The baseline is the exact value of the state, which leaves the mean as it is and takes most of
    the variance away.
    """
    x = torch.randn(count, 4, generator=generator, dtype=torch.float64)
    latents = [x]
    with torch.no_grad():
        for move, shift, std in moves(ddpo):
            noise = torch.randn(count, 4, generator=generator, dtype=torch.float64)
            latents.append(latents[-1] @ move.T + shift + std * noise)
        reward = -(latents[-1] - 1).square().sum(1)
        known = torch.zeros(4, 4, dtype=torch.float64)
        values = [value_after(ddpo, step, latents[step], known) for step in range(STEPS)]
    result = torch.zeros(20, dtype=torch.float64)
    for step in range(STEPS):
        minibatch = TrajectoryMinibatch(
            rows=torch.arange(count),
            steps=torch.full((count, 1), step),
            latents=torch.stack(latents, dim=1).view(count, STEPS + 1, *toy.SHAPE),
            old_log_probs=torch.zeros(count, 1, dtype=torch.float64),
            advantages=reward - values[step],
            cond=toy.ToyConditioning(("a",) * count),
        )
        with torch.no_grad():
            now = ddpo._likelihood.log_prob(minibatch, slice(0, 1), 1.0)
        minibatch = replace(minibatch, old_log_probs=now)
        # The loss is a mean over samples (of a nominal batch of 4) and 4 dimensions.
        loss = torch.cat([g.flatten() for g in gradient(ddpo, minibatch, 4 / count)])
        result -= loss * 4
    return result


def test_scale_is_applied_exactly_once(toy: ModuleType) -> None:
    ddpo = make(toy, kl_weight=0.1)
    minibatch = random_minibatch(ddpo, toy)
    whole = gradient(ddpo, minibatch, 1.0)
    for part, full in zip(gradient(ddpo, minibatch, 0.125), whole):
        torch.testing.assert_close(part, full * 0.125, rtol=1e-12, atol=0)


def test_the_reference_kl_is_zero_at_the_start_and_has_its_value_later(toy: ModuleType) -> None:
    ddpo = make(toy, kl_weight=1.0)
    minibatch = random_minibatch(ddpo, toy)
    values = [float(m["policy/kl_reference"]) for _, m in ddpo.losses(minibatch, 1.0)]
    assert values == [0.0] * STEPS
    with torch.no_grad():
        ddpo.policy.trainable_parameters()[1].add_(0.1)
    moved = [float(m["policy/kl_reference"]) for _, m in ddpo.losses(minibatch, 1.0)]
    # The means differ by c * 0.1 in every dimension; KL = difference^2 / (2 s^2).
    expected = [
        ((w_eps - w_x0 * sigma / alpha) * 0.1) ** 2 / (2 * std**2)
        for alpha, sigma, w_x0, w_eps, std in coefficients(ddpo)
    ]
    np.testing.assert_allclose(moved, expected, rtol=1e-5)
