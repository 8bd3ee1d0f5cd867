"""ImageReward: how well does a picture please, given its prompt?

score = (MLP(c) - 0.16717) / 1.03334, c the state of [CLS] in a BERT that has read the prompt and
looked at the picture through cross-attention (`blip`). The two constants are the mean and the
deviation over the authors' training data, so 0 is an average picture and most lie within -2 and 2.
The MLP is 768 > 1024 > 128 > 64 > 16 > 1 without activations, with dropout in training: the stack
of the LAION aesthetic predictor (`aesthetic.AestheticHead`), whose input is not normalised here.

The head runs in float32 and without dropout whatever the dtype of the transformers, and a caller's
`torch.autocast` reaches neither. Prompts are cut at 35 tokens, as in training; how many were is
counted.

Source: Xu et al. 2023, "ImageReward" (arXiv 2304.05977); zai-org/ImageReward. We differ in the
resize (float, differentiable, within one uint8 level of Pillow's).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from reward_models.aesthetic import AestheticHead, head_from_tensors
from reward_models.backbones import ReadOnce, torch_device, torch_dtype
from reward_models.base import RewardError, RewardInfo, Scores, score_kept
from reward_models.blip import Blip, blip_from_tensors, refuse_leftovers
from reward_models.clip_tower import without_autocast
from reward_models.preprocess import clip_pixels
from reward_models.table import LoadOptions, Row
from reward_models.weights import WeightFile, locate, read_tensors
from reward_models.wordpiece import PromptTokenizer, PromptTokens, read_vocabulary

MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072

_HEAD = "mlp."
_HEAD_KEYS = {
    f"{_HEAD}layers.{index}.{part}" for index in (0, 2, 4, 6, 7) for part in ("weight", "bias")
}


class ImageReward:
    """ImageReward's transformers and head; differentiable from the pixels on.

    Args:
        round_to_uint8: parity with the published pipeline, bit by bit: the resized picture is
            rounded to uint8 levels as Pillow does (the gradient passes straight through).

    Raises:
        RewardError: the parts do not belong together.
    """

    def __init__(
        self,
        info: RewardInfo,
        blip: Blip,
        head: AestheticHead,
        tokenizer: PromptTokenizer,
        *,
        round_to_uint8: bool = False,
    ) -> None:
        where = f"reward {info.name}"
        if head.width != blip.width:
            raise RewardError(
                f"its head takes states of {head.width}, BERT gives {blip.width}", where=where
            )
        if tokenizer.vocabulary != blip.vocabulary:
            raise RewardError(
                f"the vocabulary has {tokenizer.vocabulary} words, the model {blip.vocabulary}",
                where=where,
                fix="vocab.txt and the checkpoint belong to different models",
            )
        self.info = info
        self.blip = blip
        self.head = head.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.round_to_uint8 = round_to_uint8

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        """Score float [B, 3, H, W] in [0, 1] against their B prompts."""

        def judge(images: Tensor, texts: list[str], kept: list[int]) -> Scores:
            tokens = self.tokenizer(texts)
            with without_autocast(self.blip.device):
                pixels = clip_pixels(
                    images.to(self.blip.device),
                    self.blip.image_size,
                    round_to_uint8=self.round_to_uint8,
                )
            return Scores(self.score_pixels(pixels, tokens), truncated=tokens.truncated)

        return score_kept(media, prompts, self.info, judge)

    def score_pixels(self, pixels: Tensor, tokens: PromptTokens) -> Tensor:
        """Scores [B], in the head's dtype, of prepared pixels [B, 3, S, S] and their B prompts."""
        with without_autocast(self.blip.device):
            states = self.blip.class_states(pixels, tokens)
            weight = next(self.head.parameters())
            raw: Tensor = self.head(states.to(weight.dtype))
        return (raw - MEAN) / DEVIATION


MODELS_READ: ReadOnce[tuple[Blip, AestheticHead]] = ReadOnce()
TOKENIZERS_READ: ReadOnce[PromptTokenizer] = ReadOnce()


def model_from_tensors(tensors: Mapping[str, Tensor], path: Path) -> tuple[Blip, AestheticHead]:
    """Transformers and head of an ImageReward file, whose keys are `blip.*` and `mlp.*`.

    Raises:
        RewardError: another model's file, or one with a key too few or too many.
    """
    blip = blip_from_tensors(tensors, path)
    others = {key for key in tensors if not key.startswith("blip.")}
    refuse_leftovers(missing=_HEAD_KEYS - others, unexpected=others - _HEAD_KEYS, path=path)
    head = head_from_tensors({key.removeprefix(_HEAD): tensors[key] for key in _HEAD_KEYS}, path)
    return blip, head


def load_image_reward(row: Row, options: LoadOptions) -> ImageReward:
    """Build ``image-reward``; checkpoint and vocabulary are read once per process."""
    if row.weights is None or len(row.extra) != 1:
        raise ValueError(f"the row {row.info.name} names no checkpoint or no vocabulary")
    weights, words = row.weights, row.extra[0]
    device, dtype = torch_device(options.device), torch_dtype(options.dtype)

    def read(path: Path) -> tuple[Blip, AestheticHead]:
        blip, head = model_from_tensors(read_tensors(path), path)
        blip.image.to(device, dtype)
        blip.text.to(device, dtype)
        return blip, head.to(device)

    # The checkpoint first: who gave another model's file need not hear of a vocabulary.
    blip, head = MODELS_READ.get(
        lambda: locate(weights, options.weights), (str(device), dtype), read
    )
    tokenizer = TOKENIZERS_READ.get(
        lambda: locate_vocabulary(words, options.weights), (), read_vocabulary
    )
    exact = bool(row.settings["round_to_uint8"])
    return ImageReward(row.info, blip, head, tokenizer, round_to_uint8=exact)


def locate_vocabulary(
    vocabulary: WeightFile, weights: str | os.PathLike[str] | None = None
) -> Path:
    """The vocabulary's path: beside the checkpoint that the user gave, else as any weight file's.

    Raises:
        RewardError: it cannot be had (with the command that fetches it) or is damaged.
    """
    folder = None if weights is None else Path(weights).expanduser().parent
    names = (vocabulary.name, *vocabulary.files) if folder else ()
    beside = (folder / name for name in names if folder and (folder / name).is_file())
    return locate(vocabulary, next(beside, None))
