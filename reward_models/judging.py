"""What rewards say of pictures and clips that were read: scores, or why there are none."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from reward_models.base import Reward, RewardError, Scores, check_scores
from reward_models.clip_tower import one_pass
from reward_models.clips import Clip, ClipView
from reward_models.inputs import is_video

NO_VIDEO = "scores videos, and this is an image"


@dataclass
class Judged:
    """What became of one item: its scores, and the reasons of rewards that have none to give."""

    scores: dict[str, float | None] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass
class Judges:
    """Rewards by name, and the count of the prompts that they had to cut.

    Args:
        view: how they look at videos.
        parts: keep sub-scores, as `name/part` behind `name`.
    """

    rewards: Mapping[str, Reward]
    view: ClipView
    parts: bool
    truncated: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.truncated = dict.fromkeys(self.rewards, 0)

    def standing_error(self, path: Path) -> str | None:
        """The error of an image whatever its pixels are: video rewards do not look at it."""
        if is_video(path):
            return None
        names = [name for name, r in self.rewards.items() if r.info.modality == "video"]
        return error_of({}, dict.fromkeys(names, NO_VIDEO))

    def judge(self, media: Tensor | Clip, texts: Sequence[str]) -> list[Judged]:
        """Judge pictures [B, 3, H, W] with their B prompts, or one clip with each of B prompts."""
        table = [Judged() for _ in texts]
        with torch.no_grad(), one_pass():
            for name, reward in self.rewards.items():
                scores = self._scores(media, texts, reward)
                if isinstance(scores, RewardError):
                    for row in table:
                        row.scores[name] = None
                        row.reasons[name] = scores.what
                    continue
                scores = check_scores(scores, len(texts), name)
                self.truncated[name] += scores.truncated
                _enter(table, name, scores, self.parts)
        return table

    def _scores(
        self, media: Tensor | Clip, texts: Sequence[str], reward: Reward
    ) -> Scores | RewardError:
        """The scores of one reward; an error where it cannot look at such media."""
        if isinstance(media, Tensor):
            if reward.info.modality == "video":
                return RewardError(NO_VIDEO)
            return reward.score(media, texts)
        try:
            return self.view.score(reward, media, texts)
        except RewardError as error:
            # A temporal reward refuses clips that others can score, for instance of one frame.
            if reward.info.modality == "video":
                return error
            raise


def error_of(scores: Mapping[str, float | None], reasons: Mapping[str, str]) -> str | None:
    """What the row of a file that could be read says about scores that are missing."""
    blind = [name for name, value in scores.items() if value is None and name not in reasons]
    problems = [f"could not be scored by {', '.join(blind)}"] if blind else []
    problems += [f"{name}: {reason}" for name, reason in reasons.items()]
    return "; ".join(problems) or None


def _enter(table: Sequence[Judged], name: str, scores: Scores, parts: bool) -> None:
    """Write a reward's scores, and its parts behind them if wanted, into the rows' tables."""
    columns = {name: scores.values}
    if parts:
        columns |= {f"{name}/{part}": values for part, values in scores.parts.items()}
    for key, values in columns.items():
        for row, value in zip(table, values.tolist(), strict=True):
            row.scores[key] = None if math.isnan(value) else value
