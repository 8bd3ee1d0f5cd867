"""How guidance branches are run and joined: one function per rule of `Family.guidance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_align.policy.conditioning import Branch, join

Forward = Callable[[Tensor, Tensor, dict[str, Any]], Tensor]
"""(x_t [N, ...], timestep [N], the denoiser's other arguments) -> prediction [N, ...]."""


class GuidanceRule(Protocol):
    """Runs `forward` on both branches and joins the predictions."""

    def __call__(
        self,
        forward: Forward,
        x_t: Tensor,
        timestep: Tensor,
        branches: Sequence[Branch],
        scale: float,
    ) -> Tensor: ...


def in_one_call(
    forward: Forward, x_t: Tensor, timestep: Tensor, branches: Sequence[Branch], scale: float
) -> Tensor:
    """Classifier-free guidance by one call of 2B items, negative + scale * (positive - negative).

    The order [negative, positive] and the arithmetic are the Stable Diffusion pipelines' own.

    Args:
        forward: the denoiser.
        x_t: float [B, ...].
        timestep: [B].
        branches: (negative, positive).
        scale: guidance scale.
    """
    doubled = forward(
        torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), join(branches).arguments()
    )
    negative, positive = doubled.chunk(2)
    return negative + scale * (positive - negative)


RULES: dict[str, GuidanceRule] = {"cat": in_one_call}
