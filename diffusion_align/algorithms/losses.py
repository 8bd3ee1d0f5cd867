"""Pure losses: tensors in, tensors out. The only clipped policy loss of the project is here.

Diffusion and text algorithms call the same functions; nothing here knows of models, steps or
configs. Everything is computed in float32 (float64 stays float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class RatioStatistics:
    """What the ratio looked like; 0-d tensors without a graph, so that nothing is synchronised.

    `clip_fraction` counts the items whose ratio lies outside the bounds, whatever the sign of the
    advantage; `kl` is the estimate mean((ratio - 1) - log ratio) of KL(old || new), never negative.
    """

    mean: Tensor
    max_deviation: Tensor
    clip_fraction: Tensor
    kl: Tensor


def clipped_policy_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    clip_range: float | tuple[float, float],
) -> tuple[Tensor, RatioStatistics]:
    """PPO's clipped surrogate: mean(max(-A r, -A clip(r, low, high))), r = exp(logp - logp_old).

    Args:
        log_prob: [...] of the policy being trained, with a graph.
        old_log_prob: [...] of the policy that sampled; its graph is ignored.
        advantage: [...] of the same shape (expand it before); finite.
        clip_range: c for 1 - c to 1 + c, or the two bounds of `clip_bounds`.

    Returns:
        The loss (0-d) and the ratio's statistics.

    *Source:* Schulman et al. 2017 (arXiv 1707.06347), equation 7.
    """
    if not log_prob.shape == old_log_prob.shape == advantage.shape:
        raise ValueError(
            f"shapes differ: log_prob {tuple(log_prob.shape)}, old_log_prob "
            f"{tuple(old_log_prob.shape)}, advantage {tuple(advantage.shape)}"
        )
    low, high = (1 - clip_range, 1 + clip_range) if isinstance(clip_range, float) else clip_range
    log_ratio = _at_least_float32(log_prob) - _at_least_float32(old_log_prob.detach())
    ratio = log_ratio.exp()
    advantage = advantage.to(ratio.dtype)
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(low, high)).mean()
    with torch.no_grad():
        fixed = ratio.detach()
        statistics = RatioStatistics(
            mean=fixed.mean(),
            max_deviation=(fixed - 1).abs().max(),
            clip_fraction=((fixed < low) | (fixed > high)).to(fixed.dtype).mean(),
            # expm1 keeps the small numbers that (ratio - 1) - log ratio would cancel.
            kl=(torch.expm1(log_ratio) - log_ratio).mean(),
        )
    return loss, statistics


def _at_least_float32(value: Tensor) -> Tensor:
    return value if value.dtype == torch.float64 else value.float()
