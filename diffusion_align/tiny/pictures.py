"""Training pictures for the embedded models: rendered once from a seed, kept as uint8."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from reward_models.small_world import Caption, random_caption, random_scene, render


@dataclass(frozen=True)
class Pictures:
    """``images`` uint8 [N, 3, 64, 64] and the caption of each."""

    images: Tensor
    captions: tuple[Caption, ...]

    def batch(self, indices: Tensor) -> Tensor:
        """float32 [n, 3, 64, 64] in [0, 1]."""
        return self.images[indices].float() / 255


def draw_pictures(count: int, seed: int, split: str) -> Pictures:
    """Render ``count`` scenes of a split ("train" | "heldout"), the same for the same seed."""
    rng = np.random.default_rng(np.random.Philox(key=seed))
    images = np.empty((count, 3, 64, 64), np.uint8)
    captions = []
    for i in range(count):
        caption = random_caption(rng, split)  # type: ignore[arg-type]
        images[i] = np.round(render(random_scene(caption, rng)) * 255)
        captions.append(caption)
    return Pictures(torch.from_numpy(images), tuple(captions))
