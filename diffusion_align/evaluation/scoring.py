"""Scores of generated pictures, arranged by prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.generate import Pictures
from diffusion_align.evaluation.statistics import Floats
from reward_models.base import check_scores

if TYPE_CHECKING:
    import torch

    from reward_models.base import Reward


FRAMES = "uniform:8"
"""Frames of a clip that an image reward looks at; their mean is the clip's score."""


def score_pictures(
    reward: Reward,
    name: str,
    pictures: Pictures,
    prompts: Sequence[Prompt],
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 32,
    fps: float | None = None,
) -> dict[str, Floats]:
    """Score `pictures` of P `prompts` with one reward.

    Args:
        name: what the reward is called in the result.
        device: where the pixels are put for the scorer.
        fps: of clips, frames per second; None where unknown.
        batch_size: pictures per call; a reward of scope `group` gets one prompt's samples a call.

    Returns:
        float64 `[P, S]` under `name`, and under `name/part` for each named sub-score; NaN where a
        picture could not be scored or its pixels were not finite.

    Raises:
        RewardError: the reward broke its contract.
    """
    count, seeds = pictures.valid.shape
    flat = pictures.pixels.flatten(0, 1)
    if flat.ndim == 5 and reward.info.modality == "image":
        from reward_models.video.reward import FrameReward

        reward = FrameReward(reward, FRAMES)
    texts = [prompt.text for prompt in prompts for _ in range(seeds)]
    metadata = [prompt.metadata for prompt in prompts for _ in range(seeds)]
    told = any(metadata)
    size = seeds if reward.info.scope == "group" else batch_size
    columns: dict[str, Floats] = {}
    for start in range(0, len(flat), size):
        rows = slice(start, start + size)
        media = flat[rows].to(device).float() / 255.0
        scores = check_scores(
            reward.score(media, texts[rows], fps=fps, metadata=metadata[rows] if told else None),
            len(media),
            name,
        )
        named: dict[str, torch.Tensor] = {name: scores.values}
        named |= {f"{name}/{part}": values for part, values in scores.parts.items()}
        for column, values in named.items():
            # A part that some call did not return stays NaN for its pictures.
            filled = columns.setdefault(column, np.full(len(flat), np.nan))
            filled[rows] = values.detach().cpu().double().numpy()
    valid = pictures.valid.numpy()
    return {
        column: np.where(valid, values.reshape(count, seeds), np.nan)
        for column, values in columns.items()
    }
