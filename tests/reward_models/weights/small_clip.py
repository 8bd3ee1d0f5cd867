"""CLIPs of transformers and of open_clip, in full size (on the meta device) and small."""

from __future__ import annotations

from typing import Any

import open_clip
import torch
import transformers
from torch import nn

# hidden size, MLP, blocks, heads of text and vision, projection, open_clip's name, parameters
LARGE = (768, 3072, 12, 12), (1024, 4096, 24, 16), 768, "ViT-L-14", 427_616_513
HUGE = (1024, 4096, 24, 16), (1280, 5120, 32, 16), 1024, "ViT-H-14", 986_109_441


def hf_clip(
    text: tuple[int, int, int, int],
    vision: tuple[int, int, int, int],
    projection: int,
    *,
    vocabulary: int = 49408,
    image: int = 224,
    act: str = "gelu",
) -> Any:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    end = {"eos_token_id": vocabulary - 1, "bos_token_id": vocabulary - 2, "pad_token_id": 0}
    config = transformers.CLIPConfig(
        text_config={
            **dict(zip(names, text)),
            **end,
            "vocab_size": vocabulary,
            "hidden_act": act,
            "max_position_embeddings": 77,
        },
        vision_config={
            **dict(zip(names, vision)),
            "image_size": image,
            "patch_size": 14,
            "hidden_act": act,
        },
        projection_dim=projection,
    )
    return transformers.CLIPModel(config)


def small_open_clip() -> nn.Module:
    with torch.device("meta"):
        model: nn.Module = open_clip.CLIP(
            embed_dim=8,
            vision_cfg={"image_size": 28, "patch_size": 14, "width": 64, "layers": 1},
            text_cfg={"width": 8, "heads": 1, "layers": 1, "vocab_size": 20, "context_length": 7},
        )
    return model
