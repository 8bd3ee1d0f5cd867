"""One reverse step of a diffusion as a Gaussian: `ddim` and `flow`, the only ones there are.

A step turns (prediction, x_t) into p(x_next | x_t) = N(mean, std^2 I). Both steps are linear in
two tensors, with a few weights that are computed in float64 and in a form without cancellation,
so that a std that is zero in theory is zero exactly:

    ddim: mean = a_x0 x0_hat + a_eps eps_hat        (DDIM, arXiv 2010.02502, equations 12 and 16)
    flow: mean = a_x x_t + a_v v                    (section of `flow_coefficients`)

`x_next` is the next latent towards the data. The log-probability is that of the latent as stored:
keep latents in float32, because bf16 storage moves the ratio of an untouched policy by more than
the usual clip range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from diffusion_align.diffusion.prediction import (
    Coefficient,
    PredictionKind,
    check_same_shape,
    coefficient,
    spread,
    to_eps,
    to_x0,
    widen,
)

FlowKind = Literal["ode", "sde", "dance", "cps"]
Reduction = Literal["mean", "sum"]

# From here on a sigma counts as pure noise: 1 - sigma is then rounding, and Flow-SDE divides by it.
# (UniPC's first sigma is 1 - 1e-6; a test for equality with 1 misses it and gives a std of 131.)
PURE_NOISE = 1 - 1e-4
# A sigma_max closer to 1 than this cannot stand in for a sigma that is 1 up to rounding.
_LARGEST_SIGMA_MAX = 1 - 2e-6
_HALF_LOG_TWO_PI = 0.5 * math.log(2 * math.pi)


@dataclass(frozen=True, eq=False)
class Transition:
    """The Gaussian of one reverse step for a batch, and the data estimate behind it.

    Attributes:
        mean: [B, ...], differentiable in the prediction and in x_t.
        std: 0-d, or [B, 1, ...]; 0 where the step is deterministic.
        x0: [B, ...], the data that the prediction implies (clipped where the schedule clips).
    """

    mean: Tensor
    std: Tensor
    x0: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """`mean + std noise` for standard normal `noise` [B, ...]; the mean where std is 0."""
        check_same_shape("noise", noise, self.mean)
        return self.mean + self.std * noise.to(self.mean.dtype)

    def log_prob(self, x_next: Tensor, reduction: Reduction = "mean") -> Tensor:
        """log N(x_next; mean, std^2 I) per item.

        log N = -n/2 log 2 pi - n log s - |x - mean|^2 / (2 s^2) over the n latent dimensions.

        Args:
            x_next: [B, ...], the latent that was really taken, in full precision.
            reduction: `sum` is the log-density in nats; `mean` is that divided by n, the unit of
                every published clip range.

        Returns:
            [B] in float32 (float64 for float64 latents), differentiable through the mean.

        Raises:
            ValueError: the step has no noise for some item (it has no density), shapes differ, or
                the reduction is unknown.
        """
        check_same_shape("x_next", x_next, self.mean)
        self._require_noise("log_prob")
        squares = ((widen(x_next) - self.mean) / self.std).square()
        constant = _per_item(self.std).log() + _HALF_LOG_TWO_PI
        if _check_reduction(reduction) == "mean":
            return -0.5 * squares.flatten(1).mean(1) - constant
        return -0.5 * squares.flatten(1).sum(1) - self._dimensions * constant

    def kl(self, other: Transition, reduction: Reduction = "mean") -> Tensor:
        """KL(self || other) per item, exact for two Gaussians of any two stds.

        With q = s / s_other it is -log q + (q^2 - 1) / 2 + (mean - mean_other)^2 / (2 s_other^2)
        per dimension; for equal stds only the last term is left.

        Args:
            other: the transition from the same x_t under another policy, e.g. the reference.
            reduction: `sum` over the latent dimensions (nats), or their `mean`.

        Returns:
            [B] in float32 (float64 for float64 latents), differentiable through both means.

        Raises:
            ValueError: one of the two has no noise, shapes differ, or the reduction is unknown.
        """
        check_same_shape("other.mean", other.mean, self.mean)
        self._require_noise("kl")
        other._require_noise("kl")
        squares = ((self.mean - other.mean) / other.std).square()
        std, std_other = coefficient(_per_item(self.std)), coefficient(_per_item(other.std))
        excess = (std - std_other) / std_other  # q - 1: log1p keeps the small differences
        spreads = (excess + 0.5 * excess.square() - excess.log1p()).to(self.mean.dtype)
        if _check_reduction(reduction) == "mean":
            return 0.5 * squares.flatten(1).mean(1) + spreads
        return 0.5 * squares.flatten(1).sum(1) + self._dimensions * spreads

    @property
    def _dimensions(self) -> int:
        return math.prod(self.mean.shape[1:])

    def _require_noise(self, method: str) -> None:
        if not bool((self.std > 0).all()):
            raise ValueError(
                f"{method} of a step without noise (std 0, or not a number): it has no density; "
                "leave such steps out (Schedule.stochastic_steps), or raise eta / noise_level"
            )


@dataclass(frozen=True, eq=False)
class StepWeights:
    """The numbers of a reverse step, float64, 0-d or one per item.

    Attributes:
        alpha, sigma: scale of the data and of the noise in x_t.
        first, second: weights of the two tensors that the mean is made of: x0_hat and eps_hat
            (ddim), x_t and v (flow).
        std: of the Gaussian.
    """

    alpha: Tensor
    sigma: Tensor
    first: Tensor
    second: Tensor
    std: Tensor


def _per_item(std: Tensor) -> Tensor:
    """[B, 1, ...] as [B]; 0-d as it is."""
    return std.reshape(-1) if std.ndim else std


def _check_reduction(reduction: str) -> str:
    if reduction not in get_args(Reduction):
        raise ValueError(f"unknown reduction {reduction!r}; one of {get_args(Reduction)}")
    return reduction


def ddim_coefficients(
    alpha_bar_t: Coefficient, alpha_bar_prev: Coefficient, eta: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x0_hat and eps_hat in a DDIM step's mean, and its std; float64, 0-d or [B].

    In the paper's terms std^2 = eta^2 (1 - a_p) / (1 - a_t) (1 - a_t / a_p), and the weights are
    sqrt(a_p) and sqrt(1 - a_p - std^2). That radicand cancels, and rounding can make it negative
    at zero terminal SNR (a_t = 0, eta = 1), so it is computed as (1 - a_p) (1 - eta^2 + eta^2 k)
    with k = a_t (1 - a_p) / (a_p (1 - a_t)) in [0, 1], which is the same number.

    A step towards more noise (a_p < a_t, as in inversion) is deterministic: std 0.

    Raises:
        ValueError: eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta is {eta}; it goes from 0 (deterministic) to 1 (DDPM's variance)")
    a_t, a_p = coefficient(alpha_bar_t), coefficient(alpha_bar_prev)
    noise_t, noise_p = 1 - a_t, 1 - a_p
    # noise_t = 0 is data already: nothing is left to remove, hence no noise to put back.
    share = torch.where(noise_t > 0, noise_p / noise_t, torch.ones_like(noise_p))
    kept = (a_t / a_p * share).clamp(max=1.0)
    variance = eta**2 * share * ((a_p - a_t) / a_p).clamp(min=0.0)
    eps_weight = (noise_p * (1 - eta**2 + eta**2 * kept)).sqrt()
    return a_p.sqrt(), eps_weight, variance.sqrt()


def ddim(
    prediction: Tensor,
    x_t: Tensor,
    alpha_bar_t: Coefficient,
    alpha_bar_prev: Coefficient,
    *,
    eta: float,
    kind: PredictionKind,
    clip_sample_range: float | None = None,
) -> Transition:
    """The DDIM step from noise level `alpha_bar_t` to `alpha_bar_prev`.

    Args:
        prediction: [B, ...] of `kind`.
        x_t: [B, ...].
        alpha_bar_t: float, 0-d or [B], in [0, 1]; 0 (zero terminal SNR) is fine for all but `eps`.
        alpha_bar_prev: float, 0-d or [B], in (0, 1], the level stepped to; 1 gives std 0 exactly.
        eta: 0 (std 0 exactly) to 1.
        kind: what `prediction` is.
        clip_sample_range: clamp x0_hat to [-range, range], leaving eps_hat as predicted.

    Raises:
        ValueError: shapes that do not fit, an unknown kind, eta outside [0, 1].

    Source: equation 12 of arXiv 2010.02502; equal to diffusers' `DDIMScheduler.step` with its
    default `use_clipped_model_output=False`, except that it is finite at zero terminal SNR.
    """
    weights = ddim_weights(alpha_bar_t, alpha_bar_prev, eta)
    return ddim_with(weights, prediction, x_t, kind=kind, clip_sample_range=clip_sample_range)


def ddim_weights(alpha_bar_t: Coefficient, alpha_bar_prev: Coefficient, eta: float) -> StepWeights:
    """All numbers of a DDIM step; arguments and errors as `ddim_coefficients`."""
    a_t = coefficient(alpha_bar_t)
    return StepWeights(
        a_t.sqrt(), (1 - a_t).sqrt(), *ddim_coefficients(alpha_bar_t, alpha_bar_prev, eta)
    )


def ddim_with(
    weights: StepWeights,
    prediction: Tensor,
    x_t: Tensor,
    *,
    kind: PredictionKind,
    clip_sample_range: float | None = None,
) -> Transition:
    """`ddim` with weights that are known already."""
    x0 = to_x0(prediction, x_t, weights.alpha, weights.sigma, kind)
    if clip_sample_range is not None:
        x0 = x0.clamp(-clip_sample_range, clip_sample_range)
    eps = to_eps(prediction, x_t, weights.alpha, weights.sigma, kind)
    mean = spread(weights.first, x0) * x0 + spread(weights.second, eps) * eps
    return Transition(mean=mean, std=spread(weights.std, mean), x0=x0)


def flow_coefficients(
    sigma: Coefficient,
    sigma_next: Coefficient,
    *,
    kind: FlowKind,
    noise_level: float,
    sigma_max: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weights of x_t and v in a flow step's mean, and its std; float64, 0-d or [B].

    With t = sigma, dt = sigma_next - sigma < 0 and a = noise_level:

    - `ode`: mean = x + v dt, std = 0.
    - `sde` (Flow-GRPO, arXiv 2505.05470) and `dance` (DanceGRPO, arXiv 2505.07818), both
      mean = x + [v + g^2 / (2t) (x + (1 - t) v)] dt, std = g sqrt(-dt), with
      g = a sqrt(t / (1 - t)) for `sde` and g = a for `dance`.
      At pure noise (t >= PURE_NOISE) `sde` puts sigma_max in the place of t in 1 - t.
    - `cps` (coefficients-preserving sampling, arXiv 2509.05952): std = sigma_next sin(a pi / 2),
      mean = (1 - sigma_next) x0_hat + sqrt(sigma_next^2 - std^2) eps_hat. At a = 1 it is full
      renoising, diffusers' `stochastic_sampling`.

    All four are the ODE at noise level 0. A step towards more noise takes none in `sde`, `dance`.

    Raises:
        ValueError: unknown kind, a noise level out of range, or `sde` at pure noise with a
            sigma_max that is 1 as well.
    """
    _check_flow(kind, noise_level)
    t, t_next = coefficient(sigma), coefficient(sigma_next)
    dt = t_next - t
    one = torch.ones_like(dt)
    if kind == "ode":
        return one, dt, torch.zeros_like(dt)
    if kind == "cps":
        angle = 0.5 * math.pi * noise_level
        # cos and sin in place of sqrt(t_next^2 - std^2): nothing to cancel.
        eps_weight = t_next * math.cos(angle)
        x_weight = (1 - t_next) + eps_weight
        return x_weight, eps_weight * (1 - t) - (1 - t_next) * t, t_next * math.sin(angle)
    if kind == "sde":
        if sigma_max > _LARGEST_SIGMA_MAX and bool((t >= PURE_NOISE).any()):
            raise ValueError(
                "the first step starts at pure noise, where Flow-SDE's g is infinite: "
                f"pass sigma_max = sigmas[1] instead of {sigma_max}"
            )
        capped = torch.where(t >= PURE_NOISE, t.clamp(max=sigma_max), t)
        half = noise_level**2 / (2 * (1 - capped))  # g^2 / (2 t)
    else:
        half = torch.where(t > 0, noise_level**2 / (2 * t), torch.zeros_like(t))
    half = torch.where(dt < 0, half, torch.zeros_like(dt))
    variance = 2 * t * half * dt.abs()
    return one + half * dt, (1 + half * (1 - t)) * dt, variance.sqrt()


def _check_flow(kind: str, noise_level: float) -> None:
    if kind not in get_args(FlowKind):
        raise ValueError(f"unknown flow kind {kind!r}; one of {get_args(FlowKind)}")
    highest = 1.0 if kind == "cps" else math.inf
    if not 0 <= noise_level <= highest or noise_level == math.inf:
        raise ValueError(f"noise_level is {noise_level}; {kind!r} takes 0 to {highest}")


def flow(
    velocity: Tensor,
    x_t: Tensor,
    sigma: Coefficient,
    sigma_next: Coefficient,
    *,
    kind: FlowKind,
    noise_level: float = 0.7,
    sigma_max: float = 1.0,
) -> Transition:
    """The rectified-flow step from time `sigma` to `sigma_next`; formulas at `flow_coefficients`.

    Args:
        velocity: [B, ...], the prediction v = eps - x_0.
        x_t: [B, ...].
        sigma: float, 0-d or [B], in (0, 1].
        sigma_next: float, 0-d or [B], in [0, 1], at most sigma; 0 gives `cps` a std of 0 exactly.
        kind: `ode`, `sde`, `dance` or `cps`.
        noise_level: published values are 0.7 (`sde`), 0.25-0.3 (`dance`), 0.8 (`cps`).
        sigma_max: what `sde` divides by at pure noise: the schedule's second sigma.

    Raises:
        ValueError: shapes that do not fit, and as `flow_coefficients`.
    """
    weights = flow_weights(
        sigma, sigma_next, kind=kind, noise_level=noise_level, sigma_max=sigma_max
    )
    return flow_with(weights, velocity, x_t)


def flow_weights(
    sigma: Coefficient,
    sigma_next: Coefficient,
    *,
    kind: FlowKind,
    noise_level: float,
    sigma_max: float = 1.0,
) -> StepWeights:
    """All numbers of a flow step; arguments and errors as `flow_coefficients`."""
    t = coefficient(sigma)
    mean_and_std = flow_coefficients(
        sigma, sigma_next, kind=kind, noise_level=noise_level, sigma_max=sigma_max
    )
    return StepWeights(1 - t, t, *mean_and_std)


def flow_with(weights: StepWeights, velocity: Tensor, x_t: Tensor) -> Transition:
    """`flow` with weights that are known already."""
    x0 = to_x0(velocity, x_t, weights.alpha, weights.sigma, "flow")
    velocity, x_t = widen(velocity), widen(x_t)
    mean = spread(weights.first, x_t) * x_t + spread(weights.second, velocity) * velocity
    return Transition(mean=mean, std=spread(weights.std, mean), x0=x0)
