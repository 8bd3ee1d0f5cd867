"""Temporal scores of clips: flicker, consistency, motion, and steady motion, which pairs them.

All are means over neighbouring frames x_t, x_{t+1}:

    flicker       1 - mean |x_{t+1} - x_t|                       VBench's (255 - MAE) / 255
    consistency   (max(0, cos(f_t, f_0)) + max(0, cos(f_t, f_{t-1}))) / 2    f: CLIP embeddings
    motion        how far the picture moves (`reward_models.video.motion`)
    steady-motion consistency x flicker x min(motion / target, 1)

WARNING: stillness games flicker and consistency; a frozen picture scores 1 on both. Never train on
one of them alone, and never report them without motion. In steady-motion quality counts only up to
and together with motion: a frozen clip scores 0, and motion beyond the target earns nothing, but
costs some flicker. The target of the catalogue, 0.02 diagonals per second on average over the
picture, is what a slow pan (0.04) or somebody walking by (0.01 to 0.03) reaches.

Source: VBench (Huang et al. 2024), temporal flickering and subject / background consistency. We
differ in the embeddings (there DINO and CLIP-B/32, here the tower of the row), in float pixels, and
in motion (there RAFT and a threshold, which has no gradient).

Clips pass through in pieces of `batch_size` frames (at least one of each clip);
`TemporalReward.score_frames` takes a clip that is read piece by piece, so its length costs no
memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_models.backbones import ClipTower, load_tower
from reward_models.base import RewardError, RewardInfo, Scores, check_images, score_kept
from reward_models.table import LoadOptions, Row
from reward_models.video.motion import displacement, grey_copy

BATCH_SIZE = 16


@dataclass(frozen=True)
class Measure:
    """A number for each pair of neighbouring frames; a clip's is their mean.

    Args:
        name: of the sub-score.
        features: frames [N, 3, H, W] -> [N, ...], what the pairs are judged by.
        pairs: (before [B, n, ...], after [B, n, ...], the clip's first [B, 1, ...]) -> [B, n].
    """

    name: str
    features: Callable[[Tensor], Tensor]
    pairs: Callable[[Tensor, Tensor, Tensor], Tensor]


def _flicker_pairs(before: Tensor, after: Tensor, first: Tensor) -> Tensor:
    return 1 - (after - before).abs().mean(dim=(2, 3, 4))


def _consistency_pairs(before: Tensor, after: Tensor, first: Tensor) -> Tensor:
    def cosine(other: Tensor) -> Tensor:
        return (after * other).sum(dim=-1).clamp(min=0)

    return (cosine(first) + cosine(before)) / 2


def _motion_pairs(before: Tensor, after: Tensor, first: Tensor) -> Tensor:
    moved = displacement(before.flatten(0, 1), after.flatten(0, 1))
    return moved.unflatten(0, after.shape[:2])


FLICKER = Measure("flicker", lambda frames: frames, _flicker_pairs)
MOTION = Measure("motion", grey_copy, _motion_pairs)


def consistency_measure(tower: ClipTower) -> Measure:
    """Consistency of a tower's image embeddings."""

    def features(frames: Tensor) -> Tensor:
        return F.normalize(tower.embed(frames), dim=-1).to(frames.device)

    return Measure("consistency", features, _consistency_pairs)


def measure(measures: Sequence[Measure], pieces: Iterable[Tensor]) -> dict[str, Tensor]:
    """Every measure of clips that come in pieces, in order.

    Args:
        pieces: float [B, k, 3, H, W] in [0, 1], k may vary.

    Returns:
        name -> [B], in the precision of the pixels.

    Raises:
        RewardError: fewer than two frames.
    """
    firsts: list[Tensor] = []
    lasts: list[Tensor] = []
    sums: list[Tensor | int] = [0] * len(measures)
    pairs = -1
    for piece in pieces:
        found = [m.features(piece.flatten(0, 1)).unflatten(0, piece.shape[:2]) for m in measures]
        if not firsts:
            # Copies: a view would hold its whole piece.
            firsts = lasts = [features[:, :1].clone() for features in found]
            found = [features[:, 1:] for features in found]
        pairs += piece.shape[1]
        for place, (m, after) in enumerate(zip(measures, found, strict=True)):
            if after.shape[1]:
                before = torch.cat([lasts[place], after[:, :-1]], dim=1)
                sums[place] = sums[place] + m.pairs(before, after, firsts[place]).sum(dim=1)
        if found and found[0].shape[1]:
            lasts = [features[:, -1:].clone() for features in found]
    if pairs < 1:
        raise RewardError(
            f"a clip of {pairs + 1} frame{'s' * (pairs < 0)} has no temporal score",
            fix="score clips of two frames or more, or use an image reward",
        )
    return {m.name: total / pairs for m, total in zip(measures, sums)}  # type: ignore[misc]


# (measured name -> [B], frames per second if known) -> scores.
Combine = Callable[[Mapping[str, Tensor], float | None], Scores]


class TemporalReward:
    """Measures of a clip, combined to one score; differentiable with respect to every frame.

    Args:
        measures: all of them become sub-scores.
        combine: what the score is.
        batch_size: how many frames are looked at together.
    """

    def __init__(
        self,
        info: RewardInfo,
        measures: Sequence[Measure],
        combine: Combine,
        *,
        batch_size: int = BATCH_SIZE,
    ) -> None:
        self.info = info
        self.measures = tuple(measures)
        self.combine = combine
        self.batch_size = batch_size

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, F, 3, H, W] in [0, 1], F at least 2; prompts are not looked at.

        Raises:
            RewardError: clips of one frame, or a rate that is no rate (or is needed and missing).
        """

        def judge(clips: Tensor, texts: list[str], kept: list[int]) -> Scores:
            step = max(1, self.batch_size // len(clips))
            return self._judge(clips.split(step, dim=1), fps)

        return score_kept(media, prompts, self.info, judge)

    def score_frames(self, pieces: Iterable[Tensor], *, fps: float | None = None) -> Scores:
        """Score one clip that comes in pieces float [k, 3, H, W]: `values` is [1].

        Raises:
            RewardError: as `score`.
        """
        return self._judge((self._checked(piece)[None] for piece in pieces), fps)

    def _judge(self, pieces: Iterable[Tensor], fps: float | None) -> Scores:
        if fps is not None and not 0 < fps < math.inf:
            raise RewardError(f"{fps} frames per second", where=f"reward {self.info.name}")
        try:
            return self.combine(measure(self.measures, pieces), fps)
        except RewardError as error:
            where = error.where or f"reward {self.info.name}"
            raise RewardError(error.what, where=where, fix=error.fix) from error

    def _checked(self, piece: Tensor) -> Tensor:
        check_images(piece, [""] * len(piece), self.info)
        return piece


def load_flicker(row: Row, options: LoadOptions) -> TemporalReward:
    """Build ``flicker``. WARNING: a frozen picture scores 1, the maximum."""
    return TemporalReward(row.info, [FLICKER], lambda found, fps: Scores(found["flicker"]))


def load_consistency(row: Row, options: LoadOptions) -> TemporalReward:
    """Build ``consistency`` on the row's tower. WARNING: a frozen picture scores 1, the maximum."""
    wanted = [consistency_measure(_tower(row, options))]
    return TemporalReward(row.info, wanted, lambda found, fps: Scores(found["consistency"]))


def load_motion(row: Row, options: LoadOptions) -> TemporalReward:
    """Build ``motion``: diagonals of the picture per second, or per frame where fps is unknown.

    The sub-score ``per_frame`` is always per frame.
    """
    return TemporalReward(row.info, [MOTION], _speed)


def load_steady_motion(row: Row, options: LoadOptions) -> TemporalReward:
    """Build ``steady-motion``: consistency x flicker x min(motion / target, 1).

    It needs fps, because its target is a speed; the row's setting `target` is that speed.
    """
    target = float(row.settings["target"])  # type: ignore[arg-type]
    if not 0 < target < math.inf:
        raise RewardError(f"setting target is {target}", where=f"reward {row.info.name}")
    wanted = [consistency_measure(_tower(row, options)), FLICKER, MOTION]
    return TemporalReward(row.info, wanted, partial(steady_motion, target=target))


def steady_motion(found: Mapping[str, Tensor], fps: float | None, *, target: float) -> Scores:
    """Quality, as far as something moves.

    Args:
        found: `consistency`, `flicker` and `motion` (per frame), each [B].
        target: diagonals per second beyond which motion earns nothing more.

    Raises:
        RewardError: fps is unknown.
    """
    if fps is None:
        raise RewardError(
            "needs the clip's frames per second: its target is a speed",
            fix="call score(..., fps=...)",
        )
    motion = found["motion"] * fps
    values = found["consistency"] * found["flicker"] * (motion / target).clamp(max=1)
    return Scores(values, {**found, "motion": motion})


def _speed(found: Mapping[str, Tensor], fps: float | None) -> Scores:
    moved = found["motion"]
    return Scores(moved if fps is None else moved * fps, {"per_frame": moved})


def _tower(row: Row, options: LoadOptions) -> ClipTower:
    if not row.tower:
        raise ValueError(f"the row {row.info.name} names no tower")
    return load_tower(row.tower, device=options.device, dtype=options.dtype, given=options.tower)
