"""Several named scores of a picture at once: a regression head with one output for each attribute.

The reward's value is the attribute called "overall" where there is one, else the mean of all; the
parts are every attribute by its name. With one attribute `aesthetic.AestheticReward` is the class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reward_models.aesthetic import AestheticHead, score_embeddings
from reward_models.base import RewardError, RewardInfo, Scores, score_kept
from reward_models.clip_tower import ClipTower
from reward_models.weights import load_strict

OVERALL = "overall"


class AttributesReward:
    """A head with K outputs over a CLIP tower; differentiable from the pixels on.

    Args:
        head: `AestheticHead` whose last width is K.
        attributes: K names.

    Raises:
        RewardError: head, tower and names that do not fit together.
    """

    def __init__(
        self, info: RewardInfo, tower: ClipTower, head: AestheticHead, attributes: Sequence[str]
    ) -> None:
        where = f"reward {info.name}"
        if head.width != tower.width:
            raise RewardError(
                f"its head takes embeddings of {head.width}, the tower gives {tower.width}",
                where=where,
            )
        outputs = head.layers[-1].out_features
        if outputs != len(attributes) or len(attributes) < 2:
            raise RewardError(f"{outputs} outputs for {len(attributes)} attributes", where=where)
        self.info = info
        self.tower = tower
        self.head = head.eval().requires_grad_(False)
        self.attributes = tuple(attributes)

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1]; prompts are not looked at."""

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Scores:
            columns = score_embeddings(self.head, self.tower.embed(images)).unbind(dim=1)
            parts = dict(zip(self.attributes, columns, strict=True))
            return Scores(summary(parts), parts)

        return score_kept(media, prompts, self.info, judge)


def summary(parts: Mapping[str, Tensor]) -> Tensor:
    """One score [B] of the attributes' [B]: "overall" where there is one, else their mean."""
    if OVERALL in parts:
        return parts[OVERALL]
    return sum(parts.values()) / len(parts)  # type: ignore[return-value]


def attributes_head(tensors: Mapping[str, Tensor], *, relu: bool, path: Path) -> AestheticHead:
    """The head that a file's tensors `layers.<n>.{weight,bias}` describe; float32, dropout off.

    Raises:
        RewardError: keys or shapes that make no such head.
    """
    weights = {
        int(key.split(".")[1]): tensor
        for key, tensor in tensors.items()
        if key.startswith("layers.") and key.endswith(".weight") and tensor.ndim == 2
    }
    if not weights:
        raise RewardError("holds no head: no tensor layers.<n>.weight", where=str(path))
    ordered = [weights[index] for index in sorted(weights)]
    head = AestheticHead([ordered[0].shape[1], *(weight.shape[0] for weight in ordered)], relu=relu)
    load_strict(head, {key: tensor.float() for key, tensor in tensors.items()}, path)
    return head.eval().requires_grad_(False)
