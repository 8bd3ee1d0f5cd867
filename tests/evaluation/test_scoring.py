"""Pictures and clips handed to a reward: what it is told about them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.generate import Pictures
from diffusion_align.evaluation.scoring import score_pictures
from reward_models.base import RewardInfo, Scores


class Paced:
    """A temporal reward: it cannot work without a frame rate."""

    info = RewardInfo(
        name="paced", modality="video", differentiable=False, range="any", licence="", source=""
    )

    def __init__(self) -> None:
        self.seen: list[float | None] = []

    def score(
        self, media: Tensor, prompts: Any, *, fps: float | None = None, metadata: Any = None
    ) -> Scores:
        self.seen.append(fps)
        return Scores(torch.full((len(media),), float(fps or 0)))


@pytest.mark.parametrize("fps", [8.0, None])
def test_a_reward_of_clips_is_told_their_frame_rate(fps: float | None) -> None:
    pixels = torch.zeros(2, 3, 5, 3, 8, 8, dtype=torch.uint8)
    clips = Pictures(pixels, torch.ones(2, 3, dtype=torch.bool))
    reward = Paced()
    scored = score_pictures(
        reward, "paced", clips, [Prompt("a"), Prompt("b")], batch_size=4, fps=fps
    )
    assert reward.seen == [fps, fps]
    assert scored["paced"].tolist() == [[fps or 0.0] * 3] * 2
