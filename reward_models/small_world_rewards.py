"""Rewards with a known truth: the small world's verifier and its taste.

Both read a picture back (`reward_models.small_world`) and compare it with its caption, so they
know nothing outside small-world captions: any other prompt is a misconfiguration and raises.
Neither is differentiable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from reward_models.base import RewardError, RewardInfo, Scores, score_kept
from reward_models.small_world import parse_caption, taste, verify
from reward_models.table import LoadOptions, Row

# (image [3, H, W], caption) -> the score first, then its parts.
Judge = Callable[[Tensor, str], dict[str, float]]


class SmallWorldReward:
    """One judgement per picture; the judgement named `headline` is the score, all are parts."""

    def __init__(self, info: RewardInfo, judge: Judge, headline: str) -> None:
        self.info = info
        self.judge = judge
        self.headline = headline

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1] against their B small-world captions.

        Raises:
            RewardError: a prompt outside the small world's language.
        """
        if not isinstance(prompts, str):
            self._check_captions(prompts)

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Scores:
            pictures = images.detach().float().cpu()
            judged = [self.judge(p, text) for p, text in zip(pictures, texts, strict=True)]
            parts = {key: torch.tensor([row[key] for row in judged]) for key in judged[0]}
            return Scores(parts[self.headline], parts)

        return score_kept(media, prompts, self.info, judge)

    def _check_captions(self, prompts: Sequence[str]) -> None:
        for prompt in dict.fromkeys(prompts):
            try:
                parse_caption(prompt)
            except ValueError as error:
                raise RewardError(str(error), where=f"reward {self.info.name}") from error


def load_verifier(row: Row, options: LoadOptions) -> SmallWorldReward:
    """Build ``verifier``: the share of the caption's claims that hold."""
    return SmallWorldReward(row.info, _verify, headline="per_claim")


def load_taste(row: Row, options: LoadOptions) -> SmallWorldReward:
    """Build ``taste``: the written truth about a small-world picture."""
    return SmallWorldReward(row.info, _taste, headline="total")


def _verify(image: Tensor, caption: str) -> dict[str, float]:
    claims = verify(image, caption)
    return {"per_claim": float(claims.fraction), "strict": float(claims.strict)}


def _taste(image: Tensor, caption: str) -> dict[str, float]:
    judged = taste(image, caption)
    return {
        "total": float(judged.total),
        "claims": float(judged.claims),
        "neatness": float(judged.neatness),
        "palette": float(judged.palette),
    }
