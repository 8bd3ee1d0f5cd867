"""LoRA files in the key layout that ComfyUI reads.

ComfyUI names the layers of a UNet twice: by its own (LDM) names and by those of diffusers. A LoRA
key is `lora_unet_` and the layer's diffusers name with `_` for every dot; its tensors are
`.lora_down.weight` [r, in] (lora_A), `.lora_up.weight` [out, r] (lora_B) and `.alpha`, and the
weight grows by alpha / r * up @ down (convolutions: both flattened after their first axis). The
same keys are read by the loaders of kohya-ss, A1111 and diffusers.

Source: ComfyUI, comfy/lora.py (`model_lora_keys_unet`), comfy/utils.py (`unet_to_diffusers`) and
comfy/weight_adapter/lora.py. Layers outside that map are ignored by ComfyUI with a line in its log;
here they are refused by name, because what is left out would change the pictures.
"""

from __future__ import annotations

import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.policy.families import Family
from diffusion_align.policy.tuned import LORA_FILE
from diffusion_align.publish.contents import COMFYUI_FILE

FAMILIES = ("stable-diffusion", "stable-diffusion-xl")
"""Families whose layout is known; both are UNets with ComfyUI's map of names."""

_TRANSFORMER = r"transformer_blocks\.\d+\.(attn[12]\.(to_[qkv]|to_out\.0)|ff\.net\.(0\.proj|2))"
_ATTENTION = rf"attentions\.\d+\.(proj_in|proj_out|{_TRANSFORMER})"
_RESNET = r"resnets\.\d+\.(conv1|conv2|time_emb_proj|conv_shortcut)"
_LAYERS = re.compile(
    rf"(down_blocks|up_blocks)\.\d+\.({_ATTENTION}|{_RESNET})"
    rf"|mid_block\.({_ATTENTION}|{_RESNET})"
    r"|down_blocks\.\d+\.downsamplers\.0\.conv|up_blocks\.\d+\.upsamplers\.0\.conv"
    r"|conv_in|conv_out|(time_embedding|add_embedding)\.linear_[12]"
)
_METADATA = "lora_adapter_metadata"


def comfyui_name(layer: str) -> str:
    """`down_blocks.0.attentions.0.proj_in` -> `lora_unet_down_blocks_0_attentions_0_proj_in`.

    Raises:
        UserError: ComfyUI knows no such layer.
    """
    if not _LAYERS.fullmatch(layer):
        raise UserError(
            f"ComfyUI has no name for the layer {layer}, so a LoRA of it cannot be written",
            where="lora.targets",
            fix="train attention, ff, projection, resnet or sampler layers, or use the LoRA with "
            "diffusers only",
        )
    return f"lora_unet_{layer.replace('.', '_')}"


def comfyui_layout(
    tensors: Mapping[str, Tensor], settings: Mapping[str, Any], *, prefix: str = "unet."
) -> dict[str, Tensor]:
    """The tensors of a LoRA under ComfyUI's keys, with an alpha for each layer.

    Args:
        tensors: `<prefix><layer>.lora_A.weight` and `.lora_B.weight`, as `Policy.save` writes them.
        settings: of the adapter as peft states them (`r`, `lora_alpha`, `alpha_pattern`,
            `use_rslora` ...); without `lora_alpha` the scale is 1, as diffusers takes it.
        prefix: of the denoiser's keys.

    Returns:
        {key: tensor}; alphas are float32 of shape ().

    Raises:
        UserError: DoRA, biases, tensors of another kind, or a layer that ComfyUI does not know.
    """
    for name in ("use_dora", "lora_bias"):
        if settings.get(name):
            raise UserError(
                f"the LoRA has {name}, which has no place in this layout",
                where=COMFYUI_FILE,
                fix="train without it, or use the LoRA with diffusers only",
            )
    down = _of(tensors, prefix, ".lora_A.weight")
    up = _of(tensors, prefix, ".lora_B.weight")
    known = {f"{prefix}{layer}{end}" for layer in down for end in (".lora_A.weight", _UP)}
    if down.keys() != up.keys() or (others := sorted(set(tensors) - known)):
        odd = sorted(down.keys() ^ up.keys()) or others
        raise UserError(
            f"{len(odd)} of its tensors are no pair of LoRA matrices, first {odd[0]}",
            where=LORA_FILE,
        )
    layout: dict[str, Tensor] = {}
    for layer, first in down.items():
        key = comfyui_name(layer)
        layout[f"{key}.lora_down.weight"] = first.contiguous()
        layout[f"{key}.lora_up.weight"] = up[layer].contiguous()
        alpha = _scale(layer, first.shape[0], settings) * first.shape[0]
        layout[f"{key}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return layout


def write_comfyui(lora: Path, family: Family, target: Path | None = None) -> Path:
    """Write the LoRA file `lora` in ComfyUI's layout, whole or not at all.

    Args:
        lora: `pytorch_lora_weights.safetensors` of this family.
        family: only UNets of Stable Diffusion and SDXL have a known layout.
        target: None is `comfyui_lora.safetensors` beside it.

    Raises:
        UserError: another family (named), a file that cannot be read or written, and whatever
            `comfyui_layout` refuses.
    """
    if family.name not in FAMILIES:
        raise UserError(
            f"the key layout of {family.name} in ComfyUI is not known here",
            where=str(lora),
            fix=f"use the LoRA with diffusers; known families: {', '.join(FAMILIES)}",
        )
    prefix = f"{family.denoiser}."
    tensors, settings = read_lora(lora, prefix)
    layout = comfyui_layout(tensors, settings, prefix=prefix)
    target = target or lora.with_name(COMFYUI_FILE)
    try:
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".saving-") as unfinished:
            path = Path(unfinished) / target.name
            save_file(layout, path, metadata={"format": "pt"})
            os.replace(path, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be written: {error}", where=str(target)) from error
    return target


def read_lora(path: Path, prefix: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors of a LoRA file of diffusers, and its adapter's settings without their prefix.

    Raises:
        UserError: no safetensors file, or damaged metadata.
    """
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_METADATA, "{}")
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        settings = json.loads(text)
        named = {key.removeprefix(prefix): value for key, value in settings.items()}
    except (OSError, SafetensorError, ValueError, AttributeError) as error:
        raise UserError(f"this LoRA cannot be read: {error}", where=str(path)) from error
    return tensors, named


_UP = ".lora_B.weight"


def _of(tensors: Mapping[str, Tensor], prefix: str, ending: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix).removesuffix(ending): tensor
        for key, tensor in tensors.items()
        if key.startswith(prefix) and key.endswith(ending)
    }


def _scale(layer: str, rank: int, settings: Mapping[str, Any]) -> float:
    """What peft multiplies up @ down with."""
    alpha = settings.get("lora_alpha", rank)
    patterns = settings.get("alpha_pattern") or {}
    alpha = patterns.get(get_pattern_key(patterns.keys(), layer), alpha)
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
