"""The part of a reward that trains, as one module whose forward gives what losses take.

Three heads, one interface: `forward(images, texts)` with images for the first pictures of all rows,
then for the second ones (pairs), and texts for each row once. Where a tower is frozen, `images`
and `texts` are its features, computed beforehand; where it trains they are pixels and prompts. The
towers are in eval mode always; a regression head's dropout follows `train()`, and so does an
autocast around: what trains computes as it says, what is validated computes as scores will be.

Outputs are float32 [m N, A]: a regression head's A ratings, or exp(logit_scale) * cos in one
column, so that differences of two are the logits of a choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.aesthetic import AestheticHead, score_embeddings
from reward_models.clip_tower import Cleaning, ClipTower, following_autocast, without_autocast
from reward_models.cross_attention import CrossModel
from reward_models.mps import Reading, condition_tokens, fused_score, read_prompts

# What a network reads of the prompts: features, what a cross head read, or the prompts themselves.
Texts = Tensor | Reading | Sequence[str] | None


class CosineNetwork(nn.Module):
    """exp(logit_scale) * cos(image, text)."""

    def __init__(
        self, tower: ClipTower, *, cleaning: Cleaning, frozen_images: bool, frozen_texts: bool
    ) -> None:
        super().__init__()
        self.model = tower.model
        self._tower, self._cleaning = tower, cleaning
        self._frozen_images, self._frozen_texts = frozen_images, frozen_texts

    def train(self, mode: bool = True) -> CosineNetwork:
        super().train(mode)
        self.model.eval()
        return self

    def factor(self) -> Tensor:
        """What outputs are divided by to be cosines, 0-d."""
        return self.model.logit_scale.exp()  # type: ignore[no-any-return]

    def forward(self, images: Tensor, texts: Any) -> Tensor:
        with _precision(self):
            if self._frozen_images:
                image = images @ self.model.visual.proj
            else:
                image = self._tower.image_features(images)
            if self._frozen_texts:
                text = texts @ self.model.text_projection
            else:
                tokens = self._tower.tokenize(texts, cleaning=self._cleaning)
                text = self._tower.encode_text(tokens.ids)
        text = text.repeat(len(image) // len(text), 1)
        cosine = F.cosine_similarity(image.float(), text.float(), dim=-1)
        return (self.factor() * cosine)[:, None]


class CrossNetwork(nn.Module):
    """exp(logit_scale) * cos(prompt, class token that read the prompt): see `mps`."""

    def __init__(
        self,
        tower: ClipTower,
        cross: CrossModel,
        *,
        condition: str,
        threshold: float,
        frozen_images: bool,
        frozen_texts: bool,
    ) -> None:
        super().__init__()
        self.model = tower.model
        self.head = cross
        self._tower = tower
        self._condition, self._threshold = condition, threshold
        self._frozen_images, self._frozen_texts = frozen_images, frozen_texts

    def train(self, mode: bool = True) -> CrossNetwork:
        super().train(mode)
        self.model.eval()
        return self

    def factor(self) -> Tensor:
        """What outputs are divided by to be cosines, 0-d."""
        return self.model.logit_scale.exp()  # type: ignore[no-any-return]

    def read(self, prompts: Sequence[str]) -> Reading:
        """What the pictures may read of the prompts; with a gradient where the tower trains."""
        condition = condition_tokens(self._tower, self._condition)
        return read_prompts(self._tower, prompts, condition, self._threshold)

    def forward(self, images: Tensor, texts: Any) -> Tensor:
        with _precision(self):
            tokens = images if self._frozen_images else self._tower.image_tokens(images)
            reading = texts if self._frozen_texts else self.read(texts)
        times = len(tokens) // len(reading.usable)
        cosine = fused_score(self.head, tokens, repeated(reading, times), 1.0)
        return (self.factor() * cosine.float())[:, None]


class RegressionNetwork(nn.Module):
    """head(f / |f|) with f the picture's embedding: see `aesthetic`."""

    def __init__(self, tower: ClipTower, head: AestheticHead, *, frozen_images: bool) -> None:
        super().__init__()
        self.model = tower.model
        self.head = head
        self._tower = tower
        self._frozen_images = frozen_images

    def train(self, mode: bool = True) -> RegressionNetwork:
        super().train(mode)
        self.model.eval()
        return self

    def factor(self) -> Tensor:
        """Outputs are scores as they are: 1."""
        return torch.ones((), device=self._tower.device)

    def forward(self, images: Tensor, texts: Any) -> Tensor:
        with _precision(self):
            embeddings = images if self._frozen_images else self._tower.image_features(images)
        scores = score_embeddings(self.head, embeddings).float()
        return scores if scores.ndim == 2 else scores[:, None]


def _precision(network: CosineNetwork | CrossNetwork | RegressionNetwork) -> Any:
    if network.training:
        return following_autocast()
    return without_autocast(network.model.text_projection.device)


def repeated(reading: Reading, times: int) -> Reading:
    """The reading of N prompts as that of `times` N, for pictures that share them."""
    if times == 1:
        return reading
    return Reading(*(torch.cat([value] * times) for value in vars(reading).values()))


def picked(reading: Reading, rows: Tensor) -> Reading:
    """The reading of some of the prompts."""
    return Reading(*(value[rows] for value in vars(reading).values()))


def new_cross(dim: int, layers: int, heads: int, head_dim: int, ff_mult: int) -> CrossModel:
    """An untrained network that at first changes nothing: what each block adds begins at zero."""
    cross = CrossModel(dim, layers, heads, head_dim, ff_mult)
    for layer in cross.layers:
        reading, own = (half.fn for half in layer)  # type: ignore[union-attr, attr-defined]
        for linear in (reading.to_out, reading.ff[-1], own.attn_out, own.ff_out[-1]):
            nn.init.zeros_(linear.weight)
    return cross
