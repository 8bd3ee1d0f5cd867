"""Scorers that are a cosine: how near are the picture and its prompt in CLIP's space?

score = scale * cos(image, text). CLIPScore is the plain cosine (Hessel et al. 2021 print
2.5 * max(cos, 0) after the prefix "A photo depicts"; torchmetrics prints 100 * max(cos, 0); both
cut the gradient off below zero, so neither is done here). HPS and PickScore are the same on towers
of their own: `hps`, `pickscore`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from reward_models.backbones import load_tower
from reward_models.base import RewardInfo, Scores, score_kept
from reward_models.clip_tower import Cleaning, ClipTower, Framing, without_autocast
from reward_models.table import LoadOptions, Row


class CosineReward:
    """scale * cos(image, text) on a CLIP tower; differentiable from the pixels on.

    Args:
        scale: 1, or the tower's own logit scale.
        framing: how a picture is made square: CLIP's centre crop or HPS's letterbox.
        round_to_uint8, antialias: see `ClipTower.prepare`.
        cleaning: of the prompts, see `ClipTower.tokenize`.
    """

    def __init__(
        self,
        info: RewardInfo,
        tower: ClipTower,
        *,
        scale: float = 1.0,
        framing: Framing = "crop",
        round_to_uint8: bool = False,
        antialias: bool = True,
        cleaning: Cleaning = "ftfy",
    ) -> None:
        self.info = info
        self.tower = tower
        self.scale = scale
        self.framing: Framing = framing
        self.round_to_uint8 = round_to_uint8
        self.antialias = antialias
        self.cleaning: Cleaning = cleaning

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1] against their B prompts."""

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Scores:
            image = self.tower.embed(
                images,
                framing=self.framing,
                round_to_uint8=self.round_to_uint8,
                antialias=self.antialias,
            )
            text = self.tower.text_features(texts, cleaning=self.cleaning)
            with without_autocast(self.tower.device):
                values = self.scale * F.cosine_similarity(image, text, dim=-1)
            truncated = self.tower.count_truncated(texts, cleaning=self.cleaning)
            return Scores(values, truncated=truncated)

        return score_kept(media, prompts, self.info, judge)


def load_clip_score(row: Row, options: LoadOptions) -> CosineReward:
    """Build ``clip`` or ``tiny-clip``: the plain cosine."""
    tower = load_tower(row.tower, device=options.device, dtype=options.dtype, given=options.tower)
    return CosineReward(row.info, tower, round_to_uint8=bool(row.settings["round_to_uint8"]))
