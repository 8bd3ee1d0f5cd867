"""BLIP as ImageReward uses it: a picture encoder, and a BERT that looks at the picture.

    picture [3, 224, 224] -> ViT-L/16 -> 197 tokens of 1024
    35 word pieces       -> BERT-base with cross-attention to these tokens -> state of [CLS]

The models are transformers' `BlipVisionModel` and `BlipTextModel`, filled from the published file,
whose keys are those of BLIP's own code. BERT's names are the same in both; the picture encoder's
are translated by `published_key`. Sizes are read from the file's shapes.

transformers builds the cross-attention only where the config says `is_decoder`, and masks causally
unless `is_decoder=False` is passed to forward: ImageReward needs the former without the latter.

Source: Li et al. 2022, "BLIP" (arXiv 2201.12086), salesforce/BLIP; zai-org/ImageReward, which
differs from it in the first token (see `wordpiece`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from reward_models.base import RewardError
from reward_models.weights import load_strict
from reward_models.weights.layouts import recognise
from reward_models.wordpiece import PROMPT_TOKENS, PromptTokens

IMAGE = "blip.visual_encoder."
TEXT = "blip.text_encoder."
# BLIP's contrastive projections are in the published file, and ImageReward has no use for them.
UNUSED = tuple(
    f"blip.{side}_proj.{part}" for side in ("vision", "text") for part in ("weight", "bias")
)

_HEAD_WIDTH = 64  # of every attention head, in ViT-L/16 and BERT-base alike
# transformers' name, BLIP's name.
_RENAMED = (
    ("encoder.layers.", "blocks."),
    (".self_attn.projection.", ".attn.proj."),
    (".self_attn.", ".attn."),
    (".layer_norm", ".norm"),
    ("post_layernorm.", "norm."),
    ("embeddings.class_embedding", "cls_token"),
    ("embeddings.position_embedding", "pos_embed"),
    ("embeddings.patch_embedding.", "patch_embed.proj."),
)


@dataclass(frozen=True)
class BlipSize:
    """What differs between two such models; depths count blocks, sides pixels."""

    image_side: int
    patch_side: int
    image_width: int
    image_hidden: int
    image_depth: int
    text_width: int
    text_hidden: int
    text_depth: int
    vocabulary: int
    positions: int


class Blip:
    """The two transformers, frozen and without dropout.

    Args:
        image: transformers' BlipVisionModel.
        text: transformers' BlipTextModel with cross-attention.
    """

    def __init__(self, image: Any, text: Any) -> None:
        self.image = image.eval().requires_grad_(False)
        self.text = text.eval().requires_grad_(False)

    @property
    def image_size(self) -> int:
        """The side of the picture that it takes."""
        return int(self.image.config.image_size)

    @property
    def width(self) -> int:
        """D, the length of a text state."""
        return int(self.text.config.hidden_size)

    @property
    def vocabulary(self) -> int:
        """How many different tokens it knows."""
        return int(self.text.config.vocab_size)

    @property
    def device(self) -> torch.device:
        device: torch.device = self.image.post_layernorm.weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.image.post_layernorm.weight.dtype
        return dtype

    def class_states(self, pixels: Tensor, tokens: PromptTokens) -> Tensor:
        """What BERT made of [CLS], having looked at the picture.

        Args:
            pixels: float [B, 3, S, S], prepared (`preprocess.clip_pixels`); the gradient reaches
                them.
            tokens: of the B prompts.

        Returns:
            [B, D]; half-precision models answer in float32.
        """
        seen = self.image(pixel_values=pixels.to(self.device, self.dtype)).last_hidden_state
        read = self.text(
            input_ids=tokens.ids.to(self.device),
            attention_mask=tokens.mask.to(self.device),
            encoder_hidden_states=seen,
            is_decoder=False,
        )
        states: Tensor = read.last_hidden_state[:, 0]
        return states if self.dtype == torch.float64 else states.float()


def blip_from_tensors(tensors: Mapping[str, Tensor], path: Path) -> Blip:
    """Fill the two transformers with the tensors `blip.*` of an ImageReward file; others stay.

    Args:
        path: named in errors.

    Raises:
        RewardError: naming what is missing, of another shape, or not known here.
    """
    if not any(key.startswith((IMAGE, TEXT)) for key in tensors):
        other = recognise(tensors)
        raise RewardError(
            "is no ImageReward checkpoint" + (f"; it looks like {other}" if other else ""),
            where=str(path),
            fix="ImageReward.pt of THUDM/ImageReward is wanted",
        )
    image, text = _empty_models(size_of(tensors, path))
    image_keys = {key: IMAGE + published_key(key) for key in image.state_dict()}
    text_keys = {key: TEXT + key for key in text.state_dict()}
    wanted = {*image_keys.values(), *text_keys.values()}
    given = {key for key in tensors if key.startswith("blip.")} - {*UNUSED}
    refuse_leftovers(missing=wanted - given, unexpected=given - wanted, path=path)
    for model, keys in ((image, image_keys), (text, text_keys)):
        load_strict(model, {key: tensors[name] for key, name in keys.items()}, path, assign=True)
    text.embeddings.position_ids = torch.arange(text.config.max_position_embeddings)[None]
    _refuse_unfilled(image, text)
    return Blip(image, text)


def refuse_leftovers(missing: set[str], unexpected: set[str], path: Path) -> None:
    """Name the keys, as the file spells them, by which it differs from ImageReward.

    Raises:
        RewardError: if there is any.
    """
    problems = [
        f"{what} {', '.join(sorted(keys)[:5])}"
        + (f" and {len(keys) - 5} more" if len(keys) > 5 else "")
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if problems:
        raise RewardError(
            "its keys do not fit ImageReward: " + "; ".join(problems),
            where=str(path),
            fix="is it the right file? ImageReward.pt of THUDM/ImageReward is wanted",
        )


def published_key(key: str) -> str:
    """What BLIP's own code calls a tensor of transformers' BlipVisionModel."""
    for ours, theirs in _RENAMED:
        key = key.replace(ours, theirs)
    return key


def size_of(tensors: Mapping[str, Tensor], path: Path) -> BlipSize:
    """Read the sizes off the shapes; attention heads are 64 wide.

    Raises:
        RewardError: a tensor that decides is missing, or its shape makes no such model.
    """

    def shape(key: str, axes: int) -> torch.Size:
        if key not in tensors:
            refuse_leftovers(missing={key}, unexpected=set(), path=path)
        if tensors[key].ndim != axes:
            raise RewardError(f"{key} has the shape {list(tensors[key].shape)}", where=str(path))
        return tensors[key].shape

    def depth(prefix: str) -> int:
        found = (re.match(re.escape(prefix) + r"(\d+)\.", key) for key in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    _, places, image_width = shape(f"{IMAGE}pos_embed", 3)
    patch_side = shape(f"{IMAGE}patch_embed.proj.weight", 4)[-1]
    vocabulary, text_width = shape(f"{TEXT}embeddings.word_embeddings.weight", 2)
    positions = shape(f"{TEXT}embeddings.position_embeddings.weight", 2)[0]
    side = isqrt(places - 1)
    if side**2 != places - 1 or image_width % _HEAD_WIDTH or text_width % _HEAD_WIDTH:
        raise RewardError(
            f"its {places - 1} patches of width {image_width} and words of width {text_width} "
            f"make no BLIP (a square of patches, widths divisible by {_HEAD_WIDTH})",
            where=str(path),
        )
    if positions < PROMPT_TOKENS:
        raise RewardError(
            f"reads {positions} tokens, prompts have {PROMPT_TOKENS}", where=str(path)
        )
    return BlipSize(
        image_side=side * patch_side,
        patch_side=patch_side,
        image_width=image_width,
        image_hidden=shape(f"{IMAGE}blocks.0.mlp.fc1.weight", 2)[0],
        image_depth=depth(f"{IMAGE}blocks."),
        text_width=text_width,
        text_hidden=shape(f"{TEXT}encoder.layer.0.intermediate.dense.weight", 2)[0],
        text_depth=depth(f"{TEXT}encoder.layer."),
        vocabulary=vocabulary,
        positions=positions,
    )


def _empty_models(size: BlipSize) -> tuple[Any, Any]:
    """Both transformers on the meta device: no memory, no random numbers."""
    from transformers import BlipTextConfig, BlipVisionConfig, BlipVisionModel
    from transformers.models.blip.modeling_blip_text import BlipTextModel

    with torch.device("meta"):
        image = BlipVisionModel(
            BlipVisionConfig(
                image_size=size.image_side,
                patch_size=size.patch_side,
                hidden_size=size.image_width,
                intermediate_size=size.image_hidden,
                num_hidden_layers=size.image_depth,
                num_attention_heads=size.image_width // _HEAD_WIDTH,
                hidden_act="gelu",
                layer_norm_eps=1e-6,
            )
        )
        text = BlipTextModel(
            BlipTextConfig(
                vocab_size=size.vocabulary,
                hidden_size=size.text_width,
                encoder_hidden_size=size.image_width,
                intermediate_size=size.text_hidden,
                num_hidden_layers=size.text_depth,
                num_attention_heads=size.text_width // _HEAD_WIDTH,
                max_position_embeddings=size.positions,
                hidden_act="gelu",
                layer_norm_eps=1e-12,
                is_decoder=True,
                bos_token_id=None,  # for generating text; smaller vocabularies have no such ids
                sep_token_id=None,
            ),
            add_pooling_layer=False,
        )
    return image, text


def _refuse_unfilled(*models: nn.Module) -> None:
    """A buffer left on the meta device would only show when it is used."""
    empty = [name for model in models for name, buffer in model.named_buffers() if buffer.is_meta]
    if empty:
        raise RuntimeError(f"this transformers keeps tensors that no file holds: {empty}")
