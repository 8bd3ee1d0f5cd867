"""Pure losses: tensors in, tensors out. The project's only clipped policy loss and its only
logistic preference loss are here.

Diffusion and text algorithms and reward training call the same functions; nothing here knows of
models, steps or configs. Everything is computed in float32 (float64 stays float64).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


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
    log_ratio = at_least_float32(log_prob) - at_least_float32(old_log_prob.detach())
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


def logistic_preference_loss(margin: Tensor, label: Tensor | float = 1.0) -> Tensor:
    """Cross-entropy of a choice between two under the Bradley-Terry model, item by item.

        -label log sigmoid(margin) - (1 - label) log sigmoid(-margin)

    Its gradient is sigmoid(margin) - label. At margin 0 it is ln 2 whatever the label; at a soft
    label its least value is the label's entropy, not 0.

    Args:
        margin: [...] how much more the first of the two is liked, with a graph: a difference of
            scores, or beta times one of implicit rewards (DPO).
        label: probability in [0, 1] that the first is preferred; one number (1 - epsilon smooths
            labels), or a tensor of margin's shape, which is taken without its graph.

    Returns:
        [...] of margin's shape, float32 (float64 where margin is).

    *Source:* Bradley and Terry 1952; as a loss Christiano et al. 2017 (arXiv 1706.03741), equation
    1, and Rafailov et al. 2023 (arXiv 2305.18290), equation 7.
    """
    margin = at_least_float32(margin)
    if isinstance(label, Tensor):
        if label.shape != margin.shape:
            raise ValueError(
                f"shapes differ: margin {tuple(margin.shape)}, label {tuple(label.shape)}"
            )
        label = label.detach().to(margin)
    elif not 0 <= label <= 1:
        raise ValueError(f"a label is a probability in [0, 1], not {label}")
    return -label * F.logsigmoid(margin) - (1 - label) * F.logsigmoid(-margin)


def weighted_denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Weighted denoising regression: mean over items of w_i mean over dimensions (p_i - y_i)^2.

    With every weight 1 it is the loss that diffusion models are trained with. Weights are not
    normalised here.

    Args:
        prediction: [B, ...] of the denoiser, with a graph; eps, v, flow or x0.
        target: [B, ...] what a perfect denoiser says (`diffusion.noising.target`).
        weight: [B], finite, at least 0; its graph is ignored.

    Returns:
        0-d, float32 (float64 where the prediction is).

    *Source:* Black et al. 2023 (arXiv 2305.13301), equation 4 with w; Lee et al. 2023 (arXiv
    2302.12192), equation 4.
    """
    if prediction.shape != target.shape or weight.shape != prediction.shape[:1]:
        raise ValueError(
            f"shapes do not fit: prediction {tuple(prediction.shape)}, target "
            f"{tuple(target.shape)}, weight {tuple(weight.shape)}"
        )
    prediction = at_least_float32(prediction)
    errors = (prediction - target.detach().to(prediction)).square().flatten(1).mean(1)
    return (weight.detach().to(errors) * errors).mean()


def at_least_float32(value: Tensor) -> Tensor:
    """The value in float32, or as it is where it is float64."""
    return value if value.dtype == torch.float64 else value.float()
