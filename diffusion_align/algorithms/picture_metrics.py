"""Picture statistics of an iteration's samples, taken chunk by chunk while they are made.

Pixels never pile up: of a chunk only four numbers per picture stay, and the pictures of the prompt
that the next chunk may go on with, because diversity compares all samples of one prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import groupby

import torch
from torch import Tensor

from diffusion_align.data.diversity import pixel_diversity
from diffusion_align.data.picture_statistics import picture_statistics


@dataclass(frozen=True)
class PictureMetrics:
    """What N samples look like: float32 [N] each, on the CPU, NaN where there is no number.

    The first three are those of `data/picture_statistics.py` (of a clip: the mean of its frames).
    diversity is that of all samples of the item's prompt (`data/diversity.py`, pixel space), the
    same for each of them, so that a mean over items is one over prompts.
    """

    saturation: Tensor
    edge_density: Tensor
    colour_entropy: Tensor
    diversity: Tensor

    def means(self) -> dict[str, float]:
        """``picture/saturation`` and so on, over the items that have a number."""
        result = {}
        for column in fields(self):
            values = getattr(self, column.name)
            known = values[values.isfinite()].double()
            if len(known):
                result[f"picture/{column.name}"] = float(known.mean())
        return result


class PictureMeter:
    """Takes chunks of an iteration's samples in their order; those of one prompt stand together."""

    def __init__(self) -> None:
        self._chunks: list[tuple[Tensor, Tensor, Tensor]] = []
        self._diversity: list[float] = []
        self._position: int | None = None
        self._samples: list[Tensor] = []

    def add(self, pixels: Tensor, positions: Sequence[int]) -> None:
        """pixels: float [B, 3, H, W] (or clips [B, F, 3, H, W]) in [0, 1] on any device;
        positions: which prompt of the plan each belongs to."""
        found = picture_statistics(pixels)
        numbers = torch.stack([found.saturation, found.edge_density, found.colour_entropy])
        if pixels.ndim == 5:
            numbers = numbers.mean(dim=2)
        numbers = numbers.cpu()  # one transfer for all three
        self._chunks.append((numbers[0], numbers[1], numbers[2]))
        start = 0
        for position, members in groupby(positions):
            end = start + len(list(members))
            if position != self._position:
                self._finish()
                self._position = position
            self._samples.append(pixels[start:end].detach().clone())
            start = end

    def take(self) -> PictureMetrics:
        """The numbers of all that was added, maybe nothing; the meter is empty afterwards."""
        self._finish()
        none = (torch.empty(0),) * 3  # a rank may have had no prompt at all
        saturation, edges, entropy = (
            torch.cat(parts) for parts in zip(none, *self._chunks, strict=True)
        )
        diversity = torch.tensor(self._diversity, dtype=torch.float32)
        self._chunks, self._diversity, self._position = [], [], None
        return PictureMetrics(saturation, edges, entropy, diversity)

    def _finish(self) -> None:
        """The last prompt's samples are all there."""
        count = sum(map(len, self._samples))
        value = pixel_diversity(torch.cat(self._samples)) if count > 1 else math.nan
        self._diversity += [value] * count
        self._samples = []
