"""The forward process: noised data, what a denoiser should say about it, the training table.

Used wherever a loss is computed on clean latents (Diffusion/Flow DPO, supervised fitting). The
coefficients come from `Schedule.alpha_sigma`, from `train_alpha_bar` (alpha = sqrt(alpha_bar),
sigma = sqrt(1 - alpha_bar)) or, for flow, from the time itself (alpha = 1 - t, sigma = t).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffusion_align.diffusion.prediction import (
    Coefficient,
    PredictionKind,
    check_same_shape,
    coefficient,
    from_pair,
    spread,
    widen,
)


def add_noise(x_0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient) -> Tensor:
    """`x_t = alpha x_0 + sigma eps`.

    Args:
        x_0: [B, ...], clean latents.
        eps: [B, ...], standard normal noise of the same shape.
        alpha: float, 0-d or [B], scale of the data.
        sigma: float, 0-d or [B], scale of the noise.

    Returns:
        [B, ...] in float32 (float64 where an input is).

    Raises:
        ValueError: shapes that differ, or coefficients for another number of items.
    """
    check_same_shape("eps", eps, x_0)
    x_0, eps = widen(x_0), widen(eps)
    return spread(coefficient(alpha), x_0) * x_0 + spread(coefficient(sigma), eps) * eps


def target(
    x_0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient, kind: PredictionKind
) -> Tensor:
    """What a perfect denoiser of `kind` predicts for `add_noise(x_0, eps, alpha, sigma)`, [B, ...].

    Arguments, precision and errors as `add_noise`; an unknown kind is a ValueError too.
    """
    return from_pair(x_0, eps, alpha, sigma, kind)


def train_alpha_bar(config: Mapping[str, Any]) -> Tensor:
    """alpha_bar at each of the N training timesteps of a diffusers scheduler, [N] float32.

    Computed in float32 by the operations diffusers uses: that is the table a checkpoint was
    trained with, rounding included.

    Args:
        config: `scheduler.config`; missing keys have `DDIMScheduler`'s defaults. The key
            `snr_shift_scale` marks CogVideoX, which shifts alpha_bar itself and rescales that for
            zero terminal SNR.

    Raises:
        ValueError: an unknown beta schedule, or betas that do not fit.
    """
    shift = config.get("snr_shift_scale")
    rescale = bool(config.get("rescale_betas_zero_snr", False))
    betas = _betas(config, torch.float32 if shift is None else torch.float64)
    if shift is None and rescale:
        alpha_bar = _zero_terminal_snr(torch.cumprod(1 - betas, 0))
        # diffusers goes back to betas and multiplies up again; its rounding is part of the table.
        alphas = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
        betas = 1 - alphas
    alpha_bar = torch.cumprod(1 - betas, 0)
    if shift is not None:
        alpha_bar = alpha_bar / (shift + (1 - shift) * alpha_bar)
        alpha_bar = _zero_terminal_snr(alpha_bar) if rescale else alpha_bar
    return alpha_bar.float()


def _betas(config: Mapping[str, Any], scaled_dtype: torch.dtype) -> Tensor:
    count = int(config.get("num_train_timesteps", 1000))
    trained = config.get("trained_betas")
    if trained is not None:
        betas = torch.tensor([float(beta) for beta in trained], dtype=torch.float32)
        if len(betas) != count:
            raise ValueError(f"{len(betas)} trained_betas for {count} num_train_timesteps")
        return betas
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if name == "linear":
        return torch.linspace(start, end, count, dtype=torch.float32)
    if name == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, count, dtype=scaled_dtype) ** 2
    if name == "squaredcos_cap_v2":
        return _cosine_betas(count)
    raise ValueError(
        f"beta_schedule {name!r} is not supported; one of linear, scaled_linear, squaredcos_cap_v2"
    )


def _cosine_betas(count: int, largest: float = 0.999) -> Tensor:
    """Nichol & Dhariwal's cosine table (arXiv 2102.09672, equation 17)."""

    def alpha_bar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = [1 - alpha_bar((i + 1) / count) / alpha_bar(i / count) for i in range(count)]
    return torch.tensor([min(beta, largest) for beta in betas], dtype=torch.float32)


def _zero_terminal_snr(alpha_bar: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) to end at 0 (arXiv 2305.08891, algorithm 1)."""
    root = alpha_bar.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * (first / (first - last))) ** 2
