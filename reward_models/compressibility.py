"""JPEG size as a reward: DDPO's two weight-free tasks.

incompressibility = kilobytes (1000 bytes) of the picture as a JPEG of quality 95;
compressibility is the same with the sign turned. Sizes grow with resolution, so scores compare
only between pictures of one size. Not differentiable.

Source: Black et al., "Training Diffusion Models with Reinforcement Learning" (2023), section 5.1,
and its ddpo-pytorch `rewards.py`.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from reward_models.base import RewardInfo, Scores, score_kept
from reward_models.media import to_uint8
from reward_models.table import LoadOptions, Row

QUALITY = 95


class JpegSizeReward:
    """Kilobytes at JPEG quality 95, times `sign` (-1: small files are good)."""

    overlaps = True  # Pillow encodes on one core of the CPU, whatever else runs

    def __init__(self, info: RewardInfo, sign: int) -> None:
        self.info = info
        self.sign = sign

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1]; prompts are not looked at."""

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Tensor:
            pictures = to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()
            sizes = [jpeg_bytes(Image.fromarray(picture)) / 1000 for picture in pictures]
            return torch.tensor(sizes) * self.sign

        return score_kept(media, prompts, self.info, judge)


def jpeg_bytes(image: Image.Image) -> int:
    """The size of an RGB picture as a baseline JPEG of quality 95, in bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.tell()


def load_compressibility(row: Row, options: LoadOptions) -> JpegSizeReward:
    """Build ``compressibility``: small files score high."""
    return JpegSizeReward(row.info, sign=-1)


def load_incompressibility(row: Row, options: LoadOptions) -> JpegSizeReward:
    """Build ``incompressibility``: large files score high."""
    return JpegSizeReward(row.info, sign=+1)
