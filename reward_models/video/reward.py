"""Image rewards on video: score some frames, and pool their scores.

`FrameReward(hpsv2.1, frames="uniform:8", pool="mean")` is a video reward of its own, differentiable
where the image reward is, through the chosen frames only. Frames are scored in batches of bounded
size, each against the clip's prompt.

Image rewards do not see time: a clip that stands still loses nothing, and what is trained on them
tends to move less. Watch `motion` (`reward_models.video.temporal`) beside them.

From a file only the frames that a reward looks at are decoded: `frames_for` says which these are,
`score_video_file` scores one file piece by piece.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from reward_models.base import Reward, RewardError, Scores, check_scores, score_kept
from reward_models.video.files import FilePath, probe_video, read_frames, walk_frames
from reward_models.video.frames import FrameChoice, parse_pool, pool
from reward_models.video.temporal import TemporalReward

BATCH_SIZE = 16


class FrameReward:
    """An image reward on the chosen frames of a clip.

    Sub-scores: `frame_mean` and `frame_min` of the frames' scores, and the image reward's own
    sub-scores, pooled like its score.

    Args:
        image_reward: any reward of images that scores each by itself.
        frames: `all`, `first`, `uniform:n` or `random:n` (`reward_models.video.frames`).
        pool: `mean`, `min` or `softmin:tau`.
        seed: of a random choice. `metadata[i]["key"]` (int or str) names the clip; clips without a
            key and of equal length share their choice.
        batch_size: frames scored at once.

    Raises:
        RewardError: an unknown choice or pooling, or a reward that is not of single images.
    """

    def __init__(
        self,
        image_reward: Reward,
        frames: str = "uniform:8",
        pool: str = "mean",
        *,
        seed: int = 0,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        inner = image_reward.info
        where = f"reward {inner.name}"
        if inner.modality != "image":
            raise RewardError("scores clips already, not their frames", where=where)
        if inner.scope != "item":
            raise RewardError("compares samples, so it cannot score single frames", where=where)
        if batch_size < 1:
            raise RewardError(f"batch_size {batch_size} is not at least 1", where=where)
        parse_pool(pool)
        self.image_reward = image_reward
        self.choice = FrameChoice.parse(frames)
        self.pool = pool.strip().lower()
        self.seed = seed
        self.batch_size = batch_size
        self.info = replace(
            inner,
            name=f"{inner.name}@{self.choice}/{self.pool}",
            modality="video",
            range=f"{inner.range}; {self.pool} over frames {self.choice}",
            components=inner.components or (inner.name,),
        )

    def indices(self, count: int, *, key: int | str = 0) -> list[int]:
        """Which frames of a clip with `count` frames it looks at, upwards."""
        return self.choice.indices(count, seed=self.seed, key=key)

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, F, 3, H, W] in [0, 1] against B prompts.

        Args:
            metadata: one mapping per clip; goes to the image reward too.
        """

        if metadata is not None and len(metadata) != len(prompts):
            raise RewardError(
                f"metadata of {len(metadata)} clips for {len(prompts)}",
                where=f"reward {self.info.name}",
            )

        def judge(clips: Tensor, texts: list[str], kept: list[int]) -> Scores:
            about = [{} if metadata is None else metadata[place] for place in kept]
            chosen = [self.indices(clips.shape[1], key=entry.get("key", 0)) for entry in about]
            each = len(chosen[0])
            rows = torch.arange(len(clips), device=clips.device)[:, None]
            frames = clips[rows, torch.tensor(chosen, device=clips.device)].flatten(0, 1)
            found = []
            for start in range(0, len(frames), self.batch_size):
                piece = frames[start : start + self.batch_size]
                owners = [place // each for place in range(start, start + len(piece))]
                found.append(
                    self._frame_scores(
                        piece,
                        [texts[owner] for owner in owners],
                        None if metadata is None else [about[owner] for owner in owners],
                    )
                )
            return self._pooled(found, len(clips))

        return score_kept(media, prompts, self.info, judge)

    def score_frames(self, pieces: Iterable[Tensor], prompt: str) -> Scores:
        """Score one clip whose frames are chosen already: `values` is [1].

        Args:
            pieces: float [k, 3, H, W] in [0, 1], each scored as one batch. Scorers on one tower
                that get the very same tensors share its forward pass (`clip_tower.one_pass`).
        """
        found = [self._frame_scores(piece, [prompt] * len(piece), None) for piece in pieces]
        if not found:
            raise RewardError("no frame to score", where=f"reward {self.info.name}")
        return self._pooled(found, 1)

    def _frame_scores(
        self, frames: Tensor, prompts: list[str], metadata: Sequence[Mapping[str, Any]] | None
    ) -> Scores:
        scores = self.image_reward.score(frames, prompts, metadata=metadata)
        return check_scores(scores, len(frames), self.image_reward.info.name)

    def _pooled(self, found: Sequence[Scores], clips: int) -> Scores:
        """Scores [clips] from those of their frames, clip after clip."""
        values = torch.cat([scores.values for scores in found]).unflatten(0, (clips, -1))
        parts = {}
        for name in found[0].parts:
            part = torch.cat([scores.parts[name] for scores in found])
            parts[name] = pool(part.unflatten(0, (clips, -1)), self.pool)
        parts |= {"frame_mean": pool(values, "mean"), "frame_min": pool(values, "min")}
        # A long prompt is cut once, however many frames it is read with.
        truncated = sum(scores.truncated for scores in found) // values.shape[1]
        return Scores(pool(values, self.pool), parts, truncated)


def frames_for(reward: Reward, count: int, *, key: int | str = 0) -> list[int]:
    """Which frames of a clip with `count` frames a video reward looks at, upwards.

    Several rewards on one file read the union of theirs once.

    Args:
        key: names the clip, for random choices.

    Raises:
        RewardError: a reward of images, which nobody told at which frames to look.
    """
    if reward.info.modality != "video":
        raise RewardError(
            "scores images, not clips",
            where=f"reward {reward.info.name}",
            fix="FrameReward(reward, frames='uniform:8') scores chosen frames",
        )
    if isinstance(reward, FrameReward):
        return reward.indices(count, key=key)
    return list(range(count))


def score_video_file(
    path: FilePath, reward: Reward, prompt: str = "", *, key: int | str = 0
) -> Scores:
    """Score one video file with one video reward; `values` is [1]. Without a gradient.

    Only the frames that the reward looks at are decoded, and only a batch of them is held, for
    rewards of this package. Others get the whole clip.

    Raises:
        RewardError: naming the file that cannot be read or scored, or the reward of images.
    """
    info = probe_video(path)
    numbers = frames_for(reward, info.frames, key=key)
    fps = info.fps if math.isfinite(info.fps) else None
    try:
        with torch.no_grad():
            if isinstance(reward, FrameReward):
                return reward.score_frames(_pieces(path, numbers, reward.batch_size), prompt)
            if isinstance(reward, TemporalReward):
                return reward.score_frames(_pieces(path, numbers, reward.batch_size), fps=fps)
            scores = reward.score(read_frames(path, numbers)[None], [prompt], fps=fps)
            return check_scores(scores, 1, reward.info.name)
    except RewardError as error:
        if str(path) in error.where:
            raise
        raise RewardError(f"{error.where}: {error.what}", where=str(path), fix=error.fix) from error


def _pieces(path: FilePath, numbers: Sequence[int], size: int) -> Iterator[Tensor]:
    piece: list[Tensor] = []
    for _, frame in walk_frames(path, numbers):
        piece.append(frame)
        if len(piece) == size:
            yield torch.stack([piece.pop(0) for _ in range(size)])  # held once, not twice
    if piece:
        yield torch.stack(piece)
