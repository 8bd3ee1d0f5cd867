"""A picture between reading and scoring: the levels of its file, not yet floating point.

As float32 [3, H, W] a photograph of 24 million pixels holds 288 MB, as 8-bit levels 72. Pictures
wait as levels, and become float32 where they are scored, written straight into their batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FLOAT_BYTES = 3 * 4
"""Of one pixel, as float32 [3]."""


@dataclass(frozen=True)
class Picture:
    """An upright picture as it was read.

    Args:
        levels: uint8 [H, W, 3] of colours; uint8 [H, W, 4], whose last is opacity, to be laid over
            white; or float32 [H, W, 1] in [0, 1], a grey of more than 8 bits.
    """

    levels: Tensor

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        height, width, _ = self.levels.shape
        return height, width

    @property
    def float_bytes(self) -> int:
        """What it holds as float32 [3, H, W]."""
        height, width = self.size
        return height * width * FLOAT_BYTES

    def write(self, out: Tensor) -> None:
        """Fill `out`, float32 [3, H, W], with the picture in [0, 1]."""
        levels = self.levels.permute(2, 0, 1)
        if levels.dtype != torch.uint8:
            out.copy_(levels.expand_as(out))
            return
        out.copy_(levels[:3]).div_(255)
        if len(levels) == 4:
            alpha = levels[3:].float().div_(255)
            out.mul_(alpha).add_(1 - alpha)


def stack(pictures: Sequence[Picture]) -> Tensor:
    """Pictures of one size as float32 [B, 3, H, W] in [0, 1]."""
    batch = torch.empty(len(pictures), 3, *pictures[0].size)
    for picture, out in zip(pictures, batch, strict=True):
        picture.write(out)
    return batch
