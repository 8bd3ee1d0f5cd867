"""Which tensors of a CLIP tower train. Names are those of open_clip's CLIP.

A trained tower tensor is one that reaches the score: what does not (a text tower under a regression
head, `ln_post` under a cross head, which reads the tokens before it) would have no gradient, and
distributed training waits for every gradient.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from reward_models.base import RewardError
from reward_models.plan import HeadKind, RewardPlan

# Of a cosine head the projections are all of it that is not the towers.
IMAGE_PROJECTION, TEXT_PROJECTION, SCALE = "visual.proj", "text_projection", "logit_scale"
_IMAGE = "visual."


def unlocked(plan: RewardPlan, head: HeadKind, keys: Iterable[str]) -> list[str]:
    """The keys, in their order, of a tower's tensors that train.

    Args:
        keys: every key of the tower's state dict.

    Raises:
        RewardError: more blocks than there are.
    """
    keys = list(keys)
    image = [key for key in keys if key.startswith(_IMAGE)]
    text = [key for key in keys if not key.startswith(_IMAGE) and key != SCALE]
    wanted = _side(plan, image, plan.image_blocks, "image_blocks", "visual.ln_post", head)
    if head == "cross":
        wanted -= {key for key in image if key.startswith("visual.ln_post")}
    if head != "regression":
        wanted |= _side(plan, text, plan.text_blocks, "text_blocks", "ln_final", head)
        wanted.add(SCALE)
    return [key for key in keys if key in wanted]


def frozen_below(head: HeadKind, trained: Iterable[str], *, image: bool) -> bool:
    """Whether what a side gives to the head never changes, so that it is computed only once.

    Of a cosine head that is what its projection is applied to.
    """
    own = {key for key in trained if key != SCALE and key.startswith(_IMAGE) == image}
    return not own - ({IMAGE_PROJECTION, TEXT_PROJECTION} if head == "cosine" else set())


def _side(
    plan: RewardPlan, keys: list[str], blocks: int, field: str, norm: str, head: HeadKind
) -> set[str]:
    """What trains of one tower, whose keys these are."""
    if plan.trains == "all":
        return set(keys)
    projection = {key for key in keys if key in (IMAGE_PROJECTION, TEXT_PROJECTION)}
    if not blocks:
        return projection if head == "cosine" else set()
    numbers = {key: int(m[1]) for key in keys if (m := re.search(r"resblocks\.(\d+)\.", key))}
    there = max(numbers.values(), default=-1) + 1
    if blocks > there:
        raise RewardError(
            f"{blocks} blocks, but this tower has {there}",
            where=field,
            fix=f"1 to {there}, or trains: all",
        )
    last = {key for key, number in numbers.items() if number >= there - blocks}
    return last | projection | {key for key in keys if key.startswith(f"{norm}.")}
