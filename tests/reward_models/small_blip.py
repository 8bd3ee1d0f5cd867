"""ImageReward in plain torch, from the formulas and in the published names; and small weights.

What the tests of blip.py and image_reward.py hold transformers' models against.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Size:
    """Sizes of a published layout: widths, hidden widths and depths of both transformers."""

    image_side: int = 32
    patch: int = 8
    image: tuple[int, int, int] = (128, 160, 2)
    text: tuple[int, int, int] = (128, 144, 2)
    words: int = 45
    positions: int = 40
    head: tuple[int, ...] = (128, 32, 24, 16, 8, 1)


SMALL = Size()
FULL = Size(
    image_side=224,
    patch=16,
    image=(1024, 4096, 24),
    text=(768, 3072, 12),
    words=30524,
    positions=512,
    head=(768, 1024, 128, 64, 16, 1),
)

# 43 words; [DEC] and [ENC] come behind them.
_WORDS = (
    "[PAD] [UNK] [CLS] [SEP] [MASK] a an the of on and above red green blue circle square triangle "
    "cafe s ' , . ! - 1 2 large small white black back ##ground ##s ##er ##ly dog dogs run ##ning "
    "un ##likely 犬"
)
WORDS = _WORDS.split()


def published_shapes(size: Size) -> dict[str, tuple[int, ...]]:
    """Every key of ImageReward.pt that is weights, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}

    def linear(name: str, given: int, made: int) -> None:
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (made, given), (made,)

    def norm(name: str, width: int) -> None:
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (width,)

    width, hidden, depth = size.image
    image = "blip.visual_encoder"
    shapes[f"{image}.cls_token"] = (1, 1, width)
    shapes[f"{image}.pos_embed"] = (1, 1 + (size.image_side // size.patch) ** 2, width)
    shapes[f"{image}.patch_embed.proj.weight"] = (width, 3, size.patch, size.patch)
    shapes[f"{image}.patch_embed.proj.bias"] = (width,)
    for index in range(depth):
        block = f"{image}.blocks.{index}"
        norm(f"{block}.norm1", width)
        linear(f"{block}.attn.qkv", width, 3 * width)
        linear(f"{block}.attn.proj", width, width)
        norm(f"{block}.norm2", width)
        linear(f"{block}.mlp.fc1", width, hidden)
        linear(f"{block}.mlp.fc2", hidden, width)
    norm(f"{image}.norm", width)

    seen, (width, hidden, depth) = width, size.text
    text = "blip.text_encoder"
    shapes[f"{text}.embeddings.word_embeddings.weight"] = (size.words, width)
    shapes[f"{text}.embeddings.position_embeddings.weight"] = (size.positions, width)
    norm(f"{text}.embeddings.LayerNorm", width)
    for index in range(depth):
        layer = f"{text}.encoder.layer.{index}"
        for kind, given in (("attention", width), ("crossattention", seen)):
            linear(f"{layer}.{kind}.self.query", width, width)
            linear(f"{layer}.{kind}.self.key", given, width)
            linear(f"{layer}.{kind}.self.value", given, width)
            linear(f"{layer}.{kind}.output.dense", width, width)
            norm(f"{layer}.{kind}.output.LayerNorm", width)
        linear(f"{layer}.intermediate.dense", width, hidden)
        linear(f"{layer}.output.dense", hidden, width)
        norm(f"{layer}.output.LayerNorm", width)

    linear("blip.vision_proj", seen, 256)
    linear("blip.text_proj", width, 256)
    steps = zip((0, 2, 4, 6, 7), size.head[:-1], size.head[1:], strict=True)
    for index, given, made in steps:
        linear(f"mlp.layers.{index}", given, made)
    return shapes


def random_tensors(size: Size, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights of a size that keeps activations near one, so that every part is felt."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for key, shape in published_shapes(size).items():
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        if "norm" in key.lower():
            noise = 0.3 * noise + (1.0 if key.endswith("weight") else 0.0)
        elif key.endswith("weight") and "embeddings" not in key:
            noise = noise / math.sqrt(math.prod(shape[1:]))
        else:
            noise = 0.5 * noise
        tensors[key] = noise.to(dtype)
    return tensors


def class_states(tensors: dict[str, Tensor], pixels: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """BERT's state of the first token [B, D], by the formulas, in the dtype of the tensors.

    Args:
        pixels: [B, 3, S, S], normalised.
        ids, mask: [B, L].
    """
    return _read(tensors, ids, mask, _look(tensors, pixels))[:, 0]


def head(tensors: dict[str, Tensor], states: Tensor) -> Tensor:
    """The five linear layers, nothing between them: [B, D] to [B]."""
    for index in (0, 2, 4, 6, 7):
        states = _linear(tensors, f"mlp.layers.{index}", states)
    return states[:, 0]


def _look(tensors: dict[str, Tensor], pixels: Tensor) -> Tensor:
    at = "blip.visual_encoder"
    kernel = tensors[f"{at}.patch_embed.proj.weight"]
    patch = kernel.shape[-1]
    cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # [B, 3, rows, columns, P, P]
    patches = torch.einsum("bcijpq,wcpq->bijw", cut, kernel).flatten(1, 2)
    patches = patches + tensors[f"{at}.patch_embed.proj.bias"]
    first = tensors[f"{at}.cls_token"].expand(len(pixels), 1, -1)
    x = torch.cat([first, patches], dim=1) + tensors[f"{at}.pos_embed"]
    index = 0
    while f"{at}.blocks.{index}.norm1.weight" in tensors:
        block = f"{at}.blocks.{index}"
        mixed = _linear(tensors, f"{block}.attn.qkv", _norm(tensors, f"{block}.norm1", x, 1e-6))
        query, key, value = mixed.chunk(3, dim=-1)
        x = x + _linear(tensors, f"{block}.attn.proj", _attend(query, key, value, None))
        hidden = _linear(tensors, f"{block}.mlp.fc1", _norm(tensors, f"{block}.norm2", x, 1e-6))
        x = x + _linear(tensors, f"{block}.mlp.fc2", _gelu(hidden))
        index += 1
    return _norm(tensors, f"{at}.norm", x, 1e-6)


def _read(tensors: dict[str, Tensor], ids: Tensor, mask: Tensor, seen: Tensor) -> Tensor:
    at = "blip.text_encoder"
    x = tensors[f"{at}.embeddings.word_embeddings.weight"][ids]
    x = x + tensors[f"{at}.embeddings.position_embeddings.weight"][: ids.shape[1]]
    x = _norm(tensors, f"{at}.embeddings.LayerNorm", x, 1e-12)
    index = 0
    while f"{at}.encoder.layer.{index}.output.dense.weight" in tensors:
        layer = f"{at}.encoder.layer.{index}"
        for kind, source, keep in (("attention", None, mask), ("crossattention", seen, None)):
            from_ = x if source is None else source
            query, key, value = (
                _linear(tensors, f"{layer}.{kind}.self.{role}", x if role == "query" else from_)
                for role in ("query", "key", "value")
            )
            x = x + _linear(
                tensors, f"{layer}.{kind}.output.dense", _attend(query, key, value, keep)
            )
            x = _norm(tensors, f"{layer}.{kind}.output.LayerNorm", x, 1e-12)
        hidden = _gelu(_linear(tensors, f"{layer}.intermediate.dense", x))
        x = x + _linear(tensors, f"{layer}.output.dense", hidden)
        x = _norm(tensors, f"{layer}.output.LayerNorm", x, 1e-12)
        index += 1
    return x


def _attend(query: Tensor, key: Tensor, value: Tensor, keep: Tensor | None) -> Tensor:
    """Heads of 64, one after the other; masked tokens are left out, not merely made unlikely."""
    parts = []
    for start in range(0, query.shape[-1], 64):
        q, k, v = (x[..., start : start + 64] for x in (query, key, value))
        weight = (q @ k.transpose(1, 2) / 8.0).exp()
        if keep is not None:
            weight = weight * keep[:, None, :]
        parts.append(weight / weight.sum(-1, keepdim=True) @ v)
    return torch.cat(parts, dim=-1)


def _linear(tensors: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]


def _norm(tensors: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scale = ((centred**2).mean(-1, keepdim=True) + eps).sqrt()
    return centred / scale * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]


def _gelu(x: Tensor) -> Tensor:
    return 0.5 * x * (1.0 + torch.erf(x / math.sqrt(2.0)))
