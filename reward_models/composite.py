"""A weighted sum of rewards as one reward, built from `0.7*hpsv2.1 + 0.3*aesthetic`.

    value = sum over terms of weight * (scale * score + offset)

scale and offset come from a named preset (`presets`), 1 and 0 without one. Scorers on one tower
share its forward pass, and each term's raw score stays readable as a part.

Nothing here imports torch before a picture is scored.
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from reward_models.base import (
    Reward,
    RewardError,
    RewardInfo,
    Scores,
    check_scores,
    spread,
)
from reward_models.expression import is_expression, parse_expression, write_sum
from reward_models.presets import Normalisation, normalisation

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["CompositeReward", "WeightedReward", "is_expression", "load_composite"]

# Weight, normalisation (None keeps the raw score) and the reward.
WeightedReward = tuple[float, Normalisation | None, Reward]


class CompositeReward:
    """The weighted sum of normalised scores.

    An item that any of the terms could not score is NaN as a whole: part of a sum is another
    reward. `Scores.parts` holds, for reading, every term's raw score under its reward's name and
    that one's own parts as `name/part`; they carry no gradient.

    The sum has a gradient only if all terms have one: that of some terms is another reward's.

    Args:
        terms: at least one; a negative weight punishes.
        name: what it is reported as; default is the expression that builds it.

    Raises:
        RewardError: no term, a weight of 0, images beside clips, or one reward twice.
    """

    def __init__(self, terms: Sequence[WeightedReward], name: str = "") -> None:
        self.terms = tuple(terms)
        self.info = _joint_info(self.terms, name or _written(self.terms))
        _check_weights(self.terms, self.info.name)

    @property
    def without_gradient(self) -> tuple[str, ...]:
        """The names of those terms that cannot be back-propagated through."""
        return tuple(r.info.name for _, _, r in self.terms if not r.info.differentiable)

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score media as the terms take it: float [B, 3, H, W], clips [B, F, 3, H, W], in [0, 1].

        `truncated` is the largest of the terms' counts, for they all read the same prompts.
        """
        import torch

        from reward_models.backbones import one_pass

        # Gradients of unscored items are cut off in front of all terms: a zero that comes back from
        # the sum turns into NaN inside a term that could not score (0 * inf).
        # Without gradients the terms get the caller's own tensor, by which an outer pass knows it.
        whole = self.info.differentiable
        guard = whole and torch.is_grad_enabled() and getattr(media, "requires_grad", False)
        guarded = media.view_as(media) if guard else media
        found: list[Scores] = []
        with one_pass():
            for _, _, reward in self.terms:
                scores = reward.score(guarded, prompts, fps=fps, metadata=metadata)
                found.append(check_scores(scores, len(media), reward.info.name))
        values = [scores.values.to(media.device) for scores in found]
        keep = ~functools.reduce(operator.or_, (value.isnan() for value in values))
        if guard:
            dropped = (~keep).view(-1, *[1] * (media.ndim - 1))
            guarded.register_hook(lambda gradient: gradient.masked_fill(dropped, 0))
        total = functools.reduce(
            operator.add,
            (
                weight * _normalised(value[keep], rule)
                for (weight, rule, _), value in zip(self.terms, values, strict=True)
            ),
        )
        return Scores(
            spread(total if whole else total.detach(), keep),
            self._parts(found),
            max(scores.truncated for scores in found),
        )

    def _parts(self, found: Sequence[Scores]) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        for (_, _, reward), scores in zip(self.terms, found, strict=True):
            name = reward.info.name
            parts[name] = scores.values.detach()
            parts |= {f"{name}/{key}": part.detach() for key, part in scores.parts.items()}
        return parts


def load_composite(text: str, load: Callable[[str], Reward]) -> CompositeReward:
    """Build the reward of an expression.

    Args:
        text: e.g. `0.7*percent(hpsv2.1) + 0.3*aesthetic`, see `expression`.
        load: builds one of the named rewards.

    Raises:
        RewardError: a mistake in the expression, with its place; whatever `load` raises.
    """
    expression = parse_expression(text)
    terms: list[WeightedReward] = [
        (
            term.weight,
            normalisation(term.preset, term.name) if term.preset else None,
            load(term.name),
        )
        for term in expression.terms
    ]
    return CompositeReward(terms, str(expression))


def _normalised(values: Tensor, rule: Normalisation | None) -> Tensor:
    return values if rule is None else rule.scale * values + rule.offset


def _written(terms: Sequence[WeightedReward]) -> str:
    """The sum as text; a nested one stands in parentheses, which only Python can build."""
    names = [reward.info.name for _, _, reward in terms]
    if not names:
        return "composite"
    return write_sum(
        [
            (weight, rule.preset if rule else "", f"({name})" if " " in name and not rule else name)
            for (weight, rule, _), name in zip(terms, names, strict=True)
        ]
    )


def _check_weights(terms: Sequence[WeightedReward], name: str) -> None:
    for weight, _, reward in terms:
        if not math.isfinite(weight) or weight == 0:
            raise RewardError(
                f"the weight of {reward.info.name} is {weight:g}",
                where=f"reward {name}",
                fix="a weight is a finite number other than 0; leave the term out instead",
            )


def _joint_info(terms: Sequence[WeightedReward], name: str) -> RewardInfo:
    """What is true of the sum, from what is true of its terms."""
    infos = [reward.info for _, _, reward in terms]
    names = [info.name for info in infos]
    where = f"reward {name}"
    if not infos:
        raise RewardError("has no terms", where=where)
    if twice := [known for known in dict.fromkeys(names) if names.count(known) > 1]:
        raise RewardError(
            f"{twice[0]} is in it twice", where=where, fix="name it once, with the summed weight"
        )
    by_modality = {kind: [i.name for i in infos if i.modality == kind] for kind in _MODALITIES}
    if all(by_modality.values()):
        images, clips = (", ".join(by_modality[kind]) for kind in _MODALITIES)
        raise RewardError(
            f"{images} score images and {clips} clips: they cannot be added",
            where=where,
            fix="score clips with an image reward by choosing their frames",
        )
    leaves = [leaf for info in infos for leaf in (info.components or (info.name,))]
    return RewardInfo(
        name=name,
        modality=infos[0].modality,
        differentiable=all(info.differentiable for info in infos),
        range="weighted sum; " + "; ".join(f"{info.name}: {info.range}" for info in infos),
        licence=_joined(info.licence for info in infos),
        source=_joined(info.source for info in infos),
        scope="group" if any(info.scope == "group" for info in infos) else "item",
        needs_prompt=any(info.needs_prompt for info in infos),
        components=tuple(dict.fromkeys(leaves)),
        deterministic=all(info.deterministic for info in infos),
    )


_MODALITIES = ("image", "video")


def _joined(texts: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(texts))
