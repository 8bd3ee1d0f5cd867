"""Layouts of weight files: CLIP in transformers' keys to open_clip's, and what a file looks like.

Both libraries hold the same tensors. open_clip keeps query, key and value of an attention in one
matrix, [3 width, width] in that order, and its two projections as [width, embedding], the transpose
of transformers' linear layers. `pre_layrnorm` is transformers' own spelling.

Sources of the keys: transformers `CLIPModel`, open_clip `CLIP`, and the published files that
`recognise` knows. Only names and shapes are taken from them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from reward_models.base import RewardError

_HF_TO_OPEN_CLIP = {
    "text_model.embeddings.token_embedding.weight": "token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "positional_embedding",
    "text_model.final_layer_norm.weight": "ln_final.weight",
    "text_model.final_layer_norm.bias": "ln_final.bias",
    "vision_model.embeddings.class_embedding": "visual.class_embedding",
    "vision_model.embeddings.patch_embedding.weight": "visual.conv1.weight",
    "vision_model.embeddings.position_embedding.weight": "visual.positional_embedding",
    "vision_model.pre_layrnorm.weight": "visual.ln_pre.weight",
    "vision_model.pre_layrnorm.bias": "visual.ln_pre.bias",
    "vision_model.post_layernorm.weight": "visual.ln_post.weight",
    "vision_model.post_layernorm.bias": "visual.ln_post.bias",
}
_TRANSPOSED = {
    "text_projection.weight": "text_projection",
    "visual_projection.weight": "visual.proj",
}
_BLOCKS = {
    "text_model.encoder.layers.": "transformer.resblocks.",
    "vision_model.encoder.layers.": "visual.transformer.resblocks.",
}
_IN_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "self_attn.out_proj": "attn.out_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
_BLOCK = re.compile(r"((?:text|vision)_model\.encoder\.layers\.)(\d+)\.(.+)\.(weight|bias)")

_HF_STARTS = ("text_model.", "vision_model.", "visual_projection.", "text_projection.")
_OPEN_CLIP_STARTS = ("visual.", "transformer.", "token_embedding.", "ln_final.")
_OPEN_CLIP_NAMES = ("positional_embedding", "text_projection")


def to_open_clip(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A CLIP's tensors under open_clip's keys.

    Args:
        tensors: of transformers' CLIPModel, or already open_clip's, which pass unchanged. Keys of
            neither are kept, so that a strict load reports them; `position_ids` are dropped.

    Raises:
        RewardError: keys of both layouts, or parts of one attention that do not fit together.
    """
    if not any(key.startswith(_HF_STARTS) for key in tensors):
        return dict(tensors)
    ours = [key for key in tensors if _is_open_clip(key)]
    if ours:
        raise RewardError(
            f"is half converted: beside transformers' CLIP keys it holds open_clip's {ours[0]}",
            where="the weights",
            fix="use the file as it was published",
        )
    converted: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in _TRANSPOSED and tensor.ndim == 2:
            converted[_TRANSPOSED[key]] = tensor.t().contiguous()
        elif match := _BLOCK.fullmatch(key):
            converted.update(_block_entry(match, tensors))
        elif not key.endswith(".position_ids"):
            converted[_HF_TO_OPEN_CLIP.get(key, key)] = tensor
    return converted


def _is_open_clip(key: str) -> bool:
    return key.startswith(_OPEN_CLIP_STARTS) or key in _OPEN_CLIP_NAMES


def _block_entry(match: re.Match[str], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """One tensor of a transformer block under its new key; nothing for a part already joined."""
    key = match[0]
    start, number, part, ending = match.groups()
    block = f"{_BLOCKS[start]}{number}."
    if part in _IN_BLOCK:
        return {f"{block}{_IN_BLOCK[part]}.{ending}": tensors[key]}
    names = [f"{start}{number}.self_attn.{which}_proj.{ending}" for which in "qkv"]
    if key not in names or not all(name in tensors for name in names):
        return {key: tensors[key]}  # unknown, or a part is missing: the strict load says so
    if key != names[0]:
        return {}
    parts = [tensors[name] for name in names]
    if any(p.shape != parts[0].shape or p.dtype != parts[0].dtype for p in parts):
        raise RewardError(
            f"query, key and value of {start}{number} differ in shape or dtype",
            where="the weights",
            fix="use the file as it was published",
        )
    return {f"{block}attn.in_proj_{ending}": torch.cat(parts)}


# (width, patch, blocks) of a vision transformer -> what the CLIP around it is called.
_VISION = {
    (768, 32, 12): "ViT-B/32",
    (768, 16, 12): "ViT-B/16",
    (1024, 14, 24): "ViT-L/14",
    (1280, 14, 32): "ViT-H/14",
    (1408, 14, 40): "ViT-g/14",
    (1664, 14, 48): "ViT-bigG/14",
}
_LAION_HEADS: dict[tuple[int, ...], str] = {
    (0, 2, 4, 6, 7): "a LAION aesthetic head (v2, linear MSE)",
    (0, 3, 6, 9, 11): "a LAION aesthetic head (ReLU)",
}
# The first row whose every pattern is found at the start of some key names the file.
_SIGNS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA of a diffusion model", (r"(unet|transformer|lora_unet|lora_te).*lora",)),
    ("the LoRA of VideoReward (Qwen2-VL)", (r".*rm_head", r".*lora_")),
    ("a LoRA", (r".*lora_(A|B|up|down|embedding)",)),
    ("HPSv3 or VideoReward (Qwen2-VL with a reward head)", (r".*rm_head", r"(model\.)?visual\.")),
    ("a Qwen2-VL", (r"(model\.)?visual\.(blocks|merger)", r"model\.(language_model\.)?layers")),
    ("MPS (a CLIP with a cross-attention head)", (r"cross_model\.layers",)),
    ("ImageReward (BLIP with a head)", (r"blip\.visual_encoder", r"mlp\.layers")),
    ("a BLIP", (r"visual_encoder\.blocks", r"text_(en|de)coder")),
    ("a BLIP in transformers' layout", (r"vision_model\.encoder\.layers\.0\.self_attn\.qkv",)),
    ("a Stable Diffusion checkpoint", (r"model\.diffusion_model\.", r"first_stage_model\.")),
    ("a diffusion model's denoiser", (r"model\.diffusion_model\.",)),
    ("a diffusion UNet", (r"down_blocks\.", r"time_embedding\.")),
    ("a diffusion UNet", (r"input_blocks\.", r"time_embed\.")),
    ("a diffusion transformer", (r"(transformer_blocks|joint_blocks|double_blocks)\.0\.",)),
    ("a diffusion transformer", (r"blocks\.0\.", r"(condition_embedder|time_embedding)\.")),
    ("a VAE", (r"encoder\.(down_blocks|down|conv_in)", r"decoder\.(up_blocks|up|conv_in)")),
    ("the head of aesthetic predictor v2.5 (over SigLIP)", (r"scoring_head\.",)),
    ("a SigLIP", (r"(vision_model\.)?head\.probe",)),
    ("a SigLIP in open_clip's layout", (r"visual\.trunk\.attn_pool",)),
    ("a language model", (r"model\.layers\.0\.self_attn",)),
)


def recognise(tensors: Mapping[str, Tensor]) -> str:
    """What a weight file looks like from its keys and shapes, for errors; "" when unknown.

    Args:
        tensors: plain names, as `reading.read_tensors` gives them.
    """
    if tensors and all(key.startswith(("tower.", "head.")) for key in tensors):
        return "a reward that was trained with this package"
    for what, patterns in _SIGNS:
        if all(any(re.match(pattern, key) for key in tensors) for pattern in patterns):
            return what
    return _recognise_head(tensors) or _recognise_clip(tensors)


def _recognise_head(tensors: Mapping[str, Tensor]) -> str:
    if set(tensors) == {"weight", "bias"} and tuple(tensors["weight"].shape)[:1] == (1,):
        return "a LAION aesthetic head (v1, linear)"
    found = (re.fullmatch(r"layers\.(\d+)\.weight", key) for key in tensors)
    return _LAION_HEADS.get(tuple(sorted(int(match[1]) for match in found if match)), "")


def _recognise_clip(tensors: Mapping[str, Tensor]) -> str:
    if "visual.layer1.0.conv1.weight" in tensors:
        return "a CLIP with a ResNet"
    for layout, patches, blocks, fame in (
        ("open_clip's", "visual.conv1.weight", "visual.transformer.resblocks.", "HPS"),
        (
            "transformers'",
            "vision_model.embeddings.patch_embedding.weight",
            "vision_model.encoder.layers.",
            "PickScore",
        ),
    ):
        if patches not in tensors or tensors[patches].ndim != 4:
            continue
        width, _, _, patch = tensors[patches].shape
        count = len({k[len(blocks) :].partition(".")[0] for k in tensors if k.startswith(blocks)})
        name = _VISION.get(
            (width, patch, count), f"ViT of width {width}, patch {patch}, {count} blocks"
        )
        known = f", as {fame} is" if name == "ViT-H/14" else ""
        return f"a CLIP {name} in {layout} layout{known}"
    text = r"(text_model\.)?embeddings\.token_embedding\.weight"
    if any(re.fullmatch(text, key) for key in tensors):
        return "the text half of a CLIP in transformers' layout"
    return ""
