"""Video files as rewards see them: which frames are read, and what every reward gets of them.

A file is read once for all rewards: what is decoded is the union of the frames that they look at.
Image rewards look at chosen ones (`video.FrameReward`), video rewards at the whole clip. Only where
the whole clip is too large to be held do temporal rewards walk through the file by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from reward_models.base import Reward, Scores, check_scores
from reward_models.video.files import probe_video, read_frames
from reward_models.video.frames import FrameChoice, parse_pool
from reward_models.video.reward import FrameReward, frames_for, score_video_file
from reward_models.video.temporal import TemporalReward

LARGEST_WHOLE = 2**30
"""Bytes of a clip that are held; while one is scored, the next one is read."""

Look = tuple[int, ...]
"""The frames that a reward looks at."""


@dataclass(frozen=True)
class Clip:
    """The frames of one video that some reward looks at.

    Args:
        path: its file.
        count: how many frames it has.
        fps: frames per second; None where the file does not say.
        pieces: float32 [k, 3, H, W] in [0, 1] by look, in batches. The very tensors, so that
            scorers on one tower embed them once (`clip_tower.one_pass`). A look that is not there
            was too large.
    """

    path: Path
    count: int
    fps: float | None
    pieces: Mapping[Look, tuple[Tensor, ...]]


@dataclass(frozen=True)
class ClipView:
    """How rewards look at videos.

    Args:
        frames: which frames image rewards see: all, first, uniform:n, random:n (`frames`).
        pool: how their scores of frames become one: mean, min, softmin:tau.
        seed: of a random choice, which also depends on the name of the file.
        batch_size: how many frames are scored at once.

    Raises:
        RewardError: an unknown choice or pooling.
    """

    frames: str = "uniform:8"
    pool: str = "mean"
    seed: int = 0
    batch_size: int = 16

    def __post_init__(self) -> None:
        FrameChoice.parse(self.frames)
        parse_pool(self.pool)

    def on_clips(self, reward: Reward) -> Reward:
        """A reward that scores clips: itself, or an image reward on chosen frames."""
        if reward.info.modality == "video":
            return reward
        return FrameReward(
            reward, self.frames, self.pool, seed=self.seed, batch_size=self.batch_size
        )

    def read(self, path: Path, rewards: Iterable[Reward]) -> Clip:
        """Read what these rewards look at.

        Raises:
            RewardError: naming the file, when it cannot be read or holds too much.
        """
        info = probe_video(path)
        looks: dict[Look, None] = {}
        for reward in map(self.on_clips, rewards):
            look = tuple(frames_for(reward, info.frames, key=path.name))
            size = len(look) * info.width * info.height * 3 * 4
            if size <= LARGEST_WHOLE or not _walks_by_itself(reward):
                looks[look] = None
        pieces: dict[Look, tuple[Tensor, ...]] = {}
        if looks:
            numbers = sorted({number for look in looks for number in look})
            pixels = read_frames(path, numbers)
            places = {number: place for place, number in enumerate(numbers)}
            for look in looks:
                rows = [places[number] for number in look]
                chosen = pixels if len(rows) == len(pixels) else pixels[rows]
                pieces[look] = chosen.split(self.batch_size)
        fps = info.fps if math.isfinite(info.fps) else None
        return Clip(path, info.frames, fps, pieces)

    def score(self, reward: Reward, clip: Clip, prompts: Sequence[str]) -> Scores:
        """Scores [B] of one clip against B prompts, without a gradient."""
        with torch.no_grad():
            each = [self._score_once(self.on_clips(reward), clip, prompt) for prompt in prompts]
        parts = {name: torch.cat([scores.parts[name] for scores in each]) for name in each[0].parts}
        values = torch.cat([scores.values for scores in each])
        return Scores(values, parts, sum(scores.truncated for scores in each))

    def _score_once(self, reward: Reward, clip: Clip, prompt: str) -> Scores:
        pieces = clip.pieces.get(tuple(frames_for(reward, clip.count, key=clip.path.name)))
        if pieces is None:
            scores = score_video_file(clip.path, reward, prompt, key=clip.path.name)
        elif isinstance(reward, FrameReward):
            scores = reward.score_frames(pieces, prompt)
        elif isinstance(reward, TemporalReward):
            scores = reward.score_frames(pieces, fps=clip.fps)
        else:
            scores = reward.score(torch.cat(pieces)[None], [prompt], fps=clip.fps)
        return check_scores(scores, 1, reward.info.name)


def _walks_by_itself(reward: Reward) -> bool:
    return isinstance(reward, FrameReward | TemporalReward)
