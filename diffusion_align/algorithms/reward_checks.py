"""Whether judgements, loss and reward fit together, said before anything is loaded or trained."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from diffusion_align.algorithms.reward_inputs import RewardInputs
from diffusion_align.algorithms.reward_losses import REWARD_LOSSES
from diffusion_align.data.judgements import Judgements
from diffusion_align.errors import UserError
from reward_models.plan import HeadKind, RewardPlan


def completed(given: RewardPlan | str, judgements: Judgements) -> RewardPlan:
    """A plan with what the judgements say: the attributes, and the head that ratings need."""
    plan = given if isinstance(given, RewardPlan) else RewardPlan(start=given)
    if judgements.kind == "ratings" and plan.head is None:
        plan = replace(plan, head="regression")
    if plan.attributes is None and (plan.head == "regression" or len(judgements.attributes) == 1):
        plan = replace(plan, attributes=judgements.attributes)
    return plan


def check_loss(
    loss: str, head: HeadKind, judgements: Judgements, validation: Judgements | None
) -> None:
    """Refuse a loss for another kind of judgements or of head.

    Raises:
        UserError: with the losses that fit.
    """
    wanted = REWARD_LOSSES[loss].kind
    for given, what in ((judgements, "judgements"), (validation, "validation")):
        if given is not None and given.kind != wanted:
            fitting = [name for name, row in REWARD_LOSSES.items() if row.kind == given.kind]
            raise UserError(
                f"loss {loss} learns from {wanted}, but the {what} are {given.kind}",
                where="algorithm.loss",
                fix=f"for {given.kind}: {', '.join(fitting)}",
            )
    if loss == "regression" and head != "regression":
        raise UserError(
            f"a {head} head gives no ratings",
            where="algorithm.loss",
            fix="use a loss for pairs, or reward.head=regression",
        )


def usable_rows(loss: str, inputs: RewardInputs) -> Tensor:
    """The rows int64 [n] with a label that the loss learns from.

    Raises:
        UserError: there are none, or labels that the loss does not take.
    """
    row = REWARD_LOSSES[loss]
    zeros = [torch.zeros_like(inputs.labels)] * inputs.sides
    row.function(*zeros, inputs.labels, inputs.mask, inputs.weights)  # looks at the labels
    rows = row.used(inputs.labels, inputs.mask).any(dim=1).nonzero().flatten()
    if len(rows):
        return rows
    raise UserError(
        f"loss {loss} learns from none of these judgements",
        where="algorithm.loss",
        fix="all are ties: use bradley-terry-ties or soft-label"
        if row.ties == "dropped"
        else "no row judges what the reward learns",
    )
