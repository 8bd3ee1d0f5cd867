"""How guidance branches are run and joined: one function per rule of `Family.guidance`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from diffusion_align.policy.conditioning import Branch, Conditioning, join
from diffusion_align.policy.families import Family
from diffusion_align.policy.options import GuidanceGradient

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


def in_two_calls(
    forward: Forward, x_t: Tensor, timestep: Tensor, branches: Sequence[Branch], scale: float
) -> Tensor:
    """The same guidance by two calls of B items, as Wan's pipeline makes them."""
    positive = forward(x_t, timestep, branches[1].arguments())
    negative = forward(x_t, timestep, branches[0].arguments())
    return negative + scale * (positive - negative)


def through_conditional(
    forward: Forward, x_t: Tensor, timestep: Tensor, branches: Sequence[Branch], scale: float
) -> Tensor:
    """The same value with a gradient through the positive branch alone, which is `scale` times its.

    Half the graph of both branches, and another gradient: the negative branch counts as a
    constant. Without gradients it is `in_two_calls`. Source: the detached unconditional branch of
    FlowBP's trainers; whether to divide by `scale` is the caller's choice.

    Args:
        forward, x_t, timestep, branches, scale: as `in_one_call`.
    """
    # The positive branch goes first: autocast would keep weights that were cast without a graph.
    positive = forward(x_t, timestep, branches[1].arguments())
    with torch.no_grad():
        negative = forward(x_t, timestep, branches[0].arguments())
    return negative + scale * (positive - negative)


def embedded(
    forward: Forward,
    x_t: Tensor,
    timestep: Tensor,
    branch: Branch,
    scale: float,
    argument: str,
) -> Tensor:
    """One call that is told the scale; a denoiser that was trained without one is told nothing.

    Args:
        forward, x_t, timestep, scale: as `in_one_call`.
        branch: the positive one, the only one.
        argument: of the denoiser, which carries the scale.
    """
    arguments = branch.arguments()
    if arguments.get(argument) is not None:
        arguments[argument] = torch.full_like(arguments[argument], scale)
    return forward(x_t, timestep, arguments)


RULES: dict[str, GuidanceRule] = {"cat": in_one_call, "two": in_two_calls}


def guided_prediction(
    family: Family,
    forward: Forward,
    x_t: Tensor,
    timestep: Tensor,
    cond: Conditioning,
    scale: float,
    gradient: GuidanceGradient,
) -> Tensor:
    """The prediction as the family runs guidance; arguments as `Policy.predict`.

    Raises:
        ValueError: guidance for prompts that were encoded without.
    """
    if family.guidance == "embedded":
        branch = cond.branches[-1]
        return embedded(forward, x_t, timestep, branch, scale, family.guidance_argument)
    if scale <= 1.0:
        return forward(x_t, timestep, cond.branches[-1].arguments())
    if not cond.guided:
        raise ValueError("prompts were encoded without guidance; encode with this scale")
    rule = through_conditional if gradient == "conditional" else RULES[family.guidance]
    return rule(forward, x_t, timestep, cond.branches, scale)
