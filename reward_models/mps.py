"""MPS: a CLIP ViT-H/14 whose picture reads the prompt, trained on people's overall preference.

A token of the prompt is kept if it has to do with what people judge by, the condition: token i has
s_i = max_j <t_i, c_j>, with t the prompt's and c the condition's projected text tokens (raw dot
products, padding included), and is kept where s_i / max_k s_k > threshold. The image tokens read
the kept ones (`cross_attention`), and

    score = exp(logit_scale) * cos(e, x_0)

with e the prompt's text feature at its end token and x_0 the class token after reading.

Prompts are read as the fast CLIP tokenizer of transformers does, which the authors' AutoTokenizer
loads: no ftfy, no HTML entities.

Where we differ from the authors' code:
- The maximum is the prompt's own. Theirs is over the batch, so that their scores depend on the
  prompts scored along; for one picture, as in their evaluation, both are the same.
- The threshold is 0.3, as in both of their evaluation scripts. Their module's own forward, which
  their README and other ports call, has 0.01.
- float32 where they force float16.

Source: Zhang et al. 2024, "Learning Multi-dimensional Human Preference for Text-to-Image
Generation" (arXiv 2405.14705); Kwai-Kolors/MPS.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from reward_models.backbones import (
    ReadOnce,
    build_tower,
    place_tower,
    torch_device,
    torch_dtype,
    tower_config,
)
from reward_models.base import RewardError, RewardInfo, Scores, score_kept
from reward_models.clip_tower import END, Cleaning, ClipTower, to_remember, without_autocast
from reward_models.cross_attention import CrossModel, cross_model_from
from reward_models.table import LoadOptions, Row
from reward_models.weights import locate, read_tensors
from reward_models.weights.layouts import recognise

# The authors' words for "overall", with their full stop: it is a token and takes part.
CONDITION = (
    "light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
    "structure, instance, texture, quantity, attributes, position, number, location, word, things."
)
THRESHOLD = 0.3
# Prompts and condition are read as transformers' fast CLIP tokenizer reads them.
CLEANING: Cleaning = "nfc"
# Which of `towers.TOWERS` has the shape of the tower that the published files carry.
PUBLISHED_TOWER = "clip-h"
# The newest prompts are kept encoded; each takes 0.3 MB at full size.
REMEMBERED_PROMPTS = 128

_TOWER, _CROSS = "model.", "cross_model."
_MIRROR = "mps."  # RE-N-Y/mpsv1 puts it before every key


@dataclass(frozen=True)
class Reading:
    """What the score takes from the prompts.

    Args:
        ends: [B, D], the text features at the end tokens, not normalised.
        tokens: [B, L, D], every projected text token.
        mask: bool [B, L], the tokens that the picture may read, at least one per item.
        usable: bool [B], false where nothing could be read; such an item has no score.
    """

    ends: Tensor
    tokens: Tensor
    mask: Tensor
    usable: Tensor


class MPSReward:
    """The fusion network over its own CLIP tower; differentiable from the pixels on.

    Args:
        condition: what people judge by; its tokens choose among the prompt's.
        threshold: share of the prompt's best match that a token must exceed, 0 to below 1. The
            best token itself always does.
        round_to_uint8: pixels as the published pipeline rounds them, see `AestheticReward`.

    Raises:
        RewardError: network and tower of different widths, or such options.
    """

    def __init__(
        self,
        info: RewardInfo,
        tower: ClipTower,
        cross: CrossModel,
        *,
        condition: str = CONDITION,
        threshold: float = THRESHOLD,
        round_to_uint8: bool = False,
    ) -> None:
        where = f"reward {info.name}"
        if cross.dim != tower.width:
            raise RewardError(
                f"its network reads tokens of {cross.dim}, the tower gives {tower.width}",
                where=where,
            )
        if not 0 <= threshold < 1:
            raise RewardError(
                f"threshold is {threshold}", where=where, fix="from 0 to below 1; published: 0.3"
            )
        if not condition.strip() or tower.count_truncated([condition], cleaning=CLEANING):
            raise RewardError(
                f"the condition is empty or longer than {tower.context_length} tokens", where=where
            )
        self.info = info
        self.tower = tower
        self.cross = cross.eval().requires_grad_(False)
        self.condition = condition
        self.threshold = threshold
        self.round_to_uint8 = round_to_uint8
        self._condition_tokens: dict[tuple[object, ...], Tensor] = {}
        self._known: OrderedDict[tuple[object, ...], Reading] = OrderedDict()

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1] against B prompts; those over L tokens are cut."""

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Scores:
            pixels = self.tower.prepare(images, round_to_uint8=self.round_to_uint8)
            tokens = self.tower.image_tokens(pixels)
            values = fused_score(self.cross, tokens, self.read(texts), self.tower.logit_scale)
            truncated = self.tower.count_truncated(texts, cleaning=CLEANING)
            return Scores(values, truncated=truncated)

        return score_kept(media, prompts, self.info, judge)

    def read(self, prompts: Sequence[str]) -> Reading:
        """Encode prompts, without a gradient; each only once while it is remembered."""
        how = (self.tower.device, self.tower.dtype)
        wanted = {prompt: self._known.get((prompt, *how)) for prompt in prompts}
        missing = [prompt for prompt, reading in wanted.items() if reading is None]
        if missing:
            with to_remember():
                if how not in self._condition_tokens:
                    self._condition_tokens[how] = condition_tokens(self.tower, self.condition)
                condition = self._condition_tokens[how]
                new = read_prompts(self.tower, missing, condition, self.threshold)
                items = [_item(new, index) for index in range(len(missing))]
            wanted |= zip(missing, items, strict=True)
        for prompt, reading in wanted.items():
            key = (prompt, *how)
            self._known[key] = reading  # type: ignore[assignment]
            self._known.move_to_end(key)
        while len(self._known) > REMEMBERED_PROMPTS:
            self._known.popitem(last=False)
        return _joined([wanted[prompt] for prompt in prompts])  # type: ignore[misc]


def condition_tokens(tower: ClipTower, condition: str) -> Tensor:
    """The projected tokens [L, D] of the condition, padding included."""
    return tower.text_tokens(tower.tokenize([condition], pad=END, cleaning=CLEANING).ids)[0]


def read_prompts(
    tower: ClipTower, prompts: Sequence[str], condition: Tensor, threshold: float = THRESHOLD
) -> Reading:
    """Encode prompts and choose what of them the picture may read.

    Prompts are padded to L with the end token and nothing masks the padding: it takes part, so
    another padding gives another score.

    Args:
        condition: [L, D] of `condition_tokens`.
    """
    ids = tower.tokenize(prompts, pad=END, cleaning=CLEANING).ids
    tokens = tower.text_tokens(ids)
    first_end = (ids == END).long().cumsum(dim=1).eq(0).sum(dim=1)
    ends = tokens[torch.arange(len(ids), device=ids.device), first_end]
    with without_autocast(tokens.device):
        match = (tokens @ condition.T).amax(dim=-1)
    # Prompt and condition begin with the same token, and text looks back only. So a maximum is at
    # least that token's squared length, it is positive, and the best token stays. Where it does
    # not (features of zero or NaN, which the reference's softmax would turn to NaN), the item has
    # no score; all its tokens are read instead, so that no NaN enters a gradient.
    mask = match / match.amax(dim=-1, keepdim=True) > threshold
    usable = mask.any(dim=-1)
    return Reading(ends, tokens, mask | ~usable[:, None], usable)


def fused_score(
    cross: CrossModel, image_tokens: Tensor, reading: Reading, logit_scale: float
) -> Tensor:
    """Scores [B] of image tokens [B, N, D] against what was read, in the network's dtype.

    Args:
        image_tokens: projected, the class token first, before the tower's last norm.
        logit_scale: the factor of the cosine, e.g. 100.
    """
    weight = next(cross.parameters())
    tokens, texts, ends = (
        tensor.to(weight.device, weight.dtype)
        for tensor in (image_tokens, reading.tokens, reading.ends)
    )
    with without_autocast(weight.device):
        fused = cross.class_token(tokens, texts, reading.mask.to(weight.device))
        values = logit_scale * F.cosine_similarity(fused, ends, dim=-1)
    return values.masked_fill(~reading.usable.to(weight.device), float("nan"))


def mps_from_tensors(
    tensors: Mapping[str, Tensor], path: Path, config: Mapping[str, Any]
) -> tuple[ClipTower, CrossModel]:
    """Tower and network of a published file, whichever of its three forms.

    Args:
        tensors: `model.*` (transformers' CLIPModel) and `cross_model.*`, all under `mps.` in the
            mirror; strict, nothing is left over.
        path: named in errors.
        config: the tower's, as `backbones.build_tower` takes it.

    Raises:
        RewardError: a checkpoint of something else.
    """
    if all(key.startswith(_MIRROR) for key in tensors):
        tensors = {key.removeprefix(_MIRROR): tensor for key, tensor in tensors.items()}
    model, cross = _split(tensors, (_TOWER, _CROSS), path)
    if not model or not cross:
        looks = recognise(model or tensors)
        raise RewardError(
            f"is no MPS checkpoint: it has no {_CROSS if model else _TOWER}*",
            where=str(path),
            fix=f"it looks like {looks}" if looks else "is it the right file for this reward?",
        )
    # The small network first: what is wrong with it is found before the tower is built.
    network = cross_model_from(cross, path)
    return build_tower(config, model, path), network


def load_mps(row: Row, options: LoadOptions) -> MPSReward:
    """Build ``mps``; its file is read once per process, device and dtype."""
    if row.weights is None:
        raise ValueError(f"the row {row.info.name} names no weights")
    torch_dtype(options.dtype)  # refused before gigabytes are read
    where, dtype, weights = str(torch_device(options.device)), options.dtype, row.weights

    def read(path: Path) -> tuple[ClipTower, CrossModel]:
        tensors = read_tensors(path, pickled_module=True)
        tower, cross = mps_from_tensors(tensors, path, tower_config(PUBLISHED_TOWER))
        return place_tower(tower, where, dtype), cross.to(where)

    found = _PUBLISHED_READ.get(lambda: locate(weights, options.weights), (where, dtype), read)
    tower, cross = found
    return MPSReward(
        row.info,
        tower,
        cross,
        threshold=float(row.settings["threshold"]),  # type: ignore[arg-type]
        round_to_uint8=bool(row.settings["round_to_uint8"]),
    )


_PUBLISHED_READ: ReadOnce[tuple[ClipTower, CrossModel]] = ReadOnce()


def _split(
    tensors: Mapping[str, Tensor], prefixes: tuple[str, str], path: Path
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A file's two halves by prefix, without it."""
    parts: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    foreign = []
    for key, tensor in tensors.items():
        prefix = next((p for p in prefixes if key.startswith(p)), "")
        if prefix:
            parts[prefix][key.removeprefix(prefix)] = tensor
        else:
            foreign.append(key)
    if foreign and any(parts.values()):
        raise RewardError(
            f"holds tensors that MPS has not: {', '.join(foreign[:5])}"
            + (f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""),
            where=str(path),
        )
    return parts[prefixes[0]], parts[prefixes[1]]


def _joined(readings: Sequence[Reading]) -> Reading:
    columns = zip(*(vars(reading).values() for reading in readings), strict=True)
    return Reading(*(torch.cat(column) for column in columns))


def _item(reading: Reading, index: int) -> Reading:
    """One prompt's part, in memory of its own: it may be remembered longer than its batch."""
    return Reading(*(value[index : index + 1].clone() for value in vars(reading).values()))
