"""The LAION aesthetic predictors: how beautiful would people call this picture?

score = head(f / |f|), f the CLIP image embedding. Three published heads over ViT-L/14, told apart
by the keys of their file:

    linear      weight, bias                 v1: one linear layer
    linear MSE  layers.{0,2,4,6,7}           v2: 768 > 1024 > 128 > 64 > 16 > 1, no activations
    ReLU        layers.{0,3,6,9,11}          the same with ReLU between

Widths are read from the file, so `tiny-aesthetic` (the ReLU layout on `tiny-clip`) is the same
class. Without activations v2 is exactly affine: w.f + 5.2366 with |w| = 17.996.

Heads run in float32 and without dropout whatever the tower's dtype: bfloat16 costs up to 0.018
points, and dropout left on adds noise of 0.145. A caller's `torch.autocast` does not reach them.

Source: christophschuhmann/improved-aesthetic-predictor, LAION-AI/aesthetic-predictor. We differ in
the resize (float, differentiable, within one uint8 level of Pillow's).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from reward_models.backbones import ReadOnce, load_tower, torch_device
from reward_models.base import RewardError, RewardInfo, Scores, score_kept
from reward_models.clip_tower import ClipTower, without_autocast
from reward_models.table import LoadOptions, Row
from reward_models.weights import load_strict, locate, read_tensors
from reward_models.weights.layouts import recognise

# Which entries of `layers` are linear; a gap holds dropout, or ReLU and dropout.
_LINEAR = (0,)
_LINEAR_MSE = (0, 2, 4, 6, 7)
_RELU = (0, 3, 6, 9, 11)
_DROPOUT = (0.2, 0.2, 0.1)
_KEYS = {
    _LINEAR: "weight and bias",
    _LINEAR_MSE: "layers.{0,2,4,6,7}",
    _RELU: "layers.{0,3,6,9,11}",
}
# The layout of each reward of the catalogue: what another layout scores is another reward.
_LAYOUT = {"aesthetic": _LINEAR_MSE, "aesthetic-relu": _RELU, "aesthetic-v1": _LINEAR}


class AestheticHead(nn.Module):
    """Normalised embeddings [B, D] to scores [B].

    Args:
        widths: D, the hidden widths, 1.
        relu: ReLU between the layers (the published ReLU variant) or nothing but dropout.
    """

    def __init__(self, widths: Sequence[int], *, relu: bool) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for index, (before, after) in enumerate(pairwise(widths)):
            modules.append(nn.Linear(before, after))
            if relu and index < len(widths) - 2:
                modules.append(nn.ReLU())
            if index < len(_DROPOUT) and index < len(widths) - 2:
                modules.append(nn.Dropout(_DROPOUT[index]))
        self.layers = nn.Sequential(*modules)

    @property
    def width(self) -> int:
        """D, the length of the embeddings it was trained on."""
        first = self.layers[0]
        return int(first.in_features)  # type: ignore[arg-type]

    def forward(self, embeddings: Tensor) -> Tensor:
        """[B, D] of length 1 to [B]."""
        scores: Tensor = self.layers(embeddings)
        return scores.squeeze(-1)


HEADS_READ: ReadOnce[AestheticHead] = ReadOnce()


class AestheticReward:
    """A head over a CLIP tower; differentiable from the pixels on.

    Args:
        round_to_uint8: parity with the published pipeline, bit by bit: the resized picture is
            rounded to uint8 levels as Pillow does (the gradient passes straight through).
    """

    def __init__(
        self,
        info: RewardInfo,
        tower: ClipTower,
        head: AestheticHead,
        *,
        round_to_uint8: bool = False,
    ) -> None:
        if head.width != tower.width:
            raise RewardError(
                f"its head takes embeddings of {head.width}, the tower gives {tower.width}",
                where=f"reward {info.name}",
            )
        self.info = info
        self.tower = tower
        self.round_to_uint8 = round_to_uint8
        self.head = head.eval().requires_grad_(False)

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
            return self.score_embeddings(self.embed(images))

        return score_kept(media, prompts, self.info, judge)

    def embed(self, images: Tensor) -> Tensor:
        """CLIP embeddings [B, D] of images [B, 3, H, W] in [0, 1], not normalised."""
        return self.tower.embed(images, round_to_uint8=self.round_to_uint8)

    def score_embeddings(self, embeddings: Tensor) -> Tensor:
        """Scores [B] of CLIP image embeddings [B, D] of any length (they are normalised here)."""
        return score_embeddings(self.head, embeddings)


def score_embeddings(head: AestheticHead, embeddings: Tensor) -> Tensor:
    """head(f / |f|) for embeddings [B, D], in the head's dtype (float32) even under autocast."""
    weight = next(head.parameters())
    with without_autocast(weight.device):
        return head(F.normalize(embeddings.to(weight.device, weight.dtype), dim=-1))  # type: ignore[no-any-return]


def head_from_tensors(tensors: Mapping[str, Tensor], path: Path, reward: str = "") -> AestheticHead:
    """Build the head that a file's keys describe; float32, dropout off.

    Args:
        path: named in errors.
        reward: a name of the catalogue, whose layout the file must have; "" takes any of the three.

    Raises:
        RewardError: keys of no known layout, or of another reward's, or widths that do not chain.
    """
    named = {f"layers.0.{k}" if k in ("weight", "bias") else k: v for k, v in tensors.items()}
    weights = {
        int(key.split(".")[1]): tensor
        for key, tensor in named.items()
        if key.startswith("layers.") and key.endswith(".weight") and tensor.ndim == 2
    }
    indices = tuple(sorted(weights))
    other = recognise(tensors)
    looks = f"; it looks like {other}" if other else ""
    if indices not in _KEYS:
        raise RewardError(
            f"is no aesthetic head: its keys have none of the three published layouts{looks}",
            where=str(path),
            fix=f"expected {', or '.join(_KEYS.values())}",
        )
    wanted = _LAYOUT.get(reward, indices)
    if indices != wanted:
        fits = next(known for known, layout in _LAYOUT.items() if layout == indices)
        raise RewardError(
            f"is no head of {reward}{looks}",
            where=str(path),
            fix=f"load it as {fits}; the keys of {reward} are {_KEYS[wanted]}",
        )
    widths = [weights[0].shape[1], *(weights[index].shape[0] for index in indices)]
    if widths[-1] != 1:
        raise RewardError(f"gives {widths[-1]} numbers per image, not one", where=str(path))
    head = AestheticHead(widths, relu=indices == _RELU)
    load_strict(head, {key: tensor.float() for key, tensor in named.items()}, path)
    return head.eval().requires_grad_(False)


def load_aesthetic(row: Row, options: LoadOptions) -> AestheticReward:
    """The factory that the catalogue names; head and tower are read once per process."""
    if row.weights is None:
        raise ValueError(f"the row {row.info.name} names no head")
    weights, name = row.weights, row.info.name
    device = torch_device(options.device)

    def read(path: Path) -> AestheticHead:
        return head_from_tensors(read_tensors(path), path, name).to(device)

    # The head first: a damaged small file is found before gigabytes are read.
    head = HEADS_READ.get(lambda: locate(weights, options.weights), (name, str(device)), read)
    tower = load_tower(row.tower, device=options.device, dtype=options.dtype, given=options.tower)
    exact = bool(row.settings["round_to_uint8"])
    return AestheticReward(row.info, tower, head, round_to_uint8=exact)
