"""A LoRA folded into its base model: one pipeline that needs no LoRA support to be loaded.

W' = W + alpha / r * up @ down, computed in float32 by peft (`fuse_lora` of diffusers), whatever
type the result is stored in. The merged pipeline keeps the base model's own scheduler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from diffusion_align.errors import UserError
from diffusion_align.policy.adapter import loader_notices_off
from diffusion_align.policy.catalogue import resolve
from diffusion_align.policy.loading import dtype_of, library_bars, load_pipeline


def merge(model: str, lora: Path, *, revision: str | None = None) -> Any:
    """The pipeline of `model` with the LoRA in its weights, float32 on the CPU.

    Args:
        model: the base model: a name, a folder or a hub id.
        lora: a LoRA's file.
        revision: of a hub id.

    Raises:
        UserError: a model that cannot be loaded, or a LoRA that does not fit it.
    """
    pipeline, family = load_pipeline(
        resolve(model), revision=revision, dtype=torch.float32, denoiser_dtype=torch.float32
    )
    try:
        with loader_notices_off():
            pipeline.load_lora_weights(str(lora.parent), weight_name=lora.name)
            pipeline.fuse_lora(components=[family.denoiser], safe_fusing=True)
            pipeline.unload_lora_weights()
    except (RuntimeError, ValueError, KeyError, OSError, SafetensorError) as error:
        raise UserError(
            f"this LoRA cannot be merged into {model}: {str(error).splitlines()[0]}",
            where=str(lora),
            fix="name the model that it was trained on",
        ) from error
    return pipeline


def save_merged(pipeline: Any, out: Path, dtype: str = "float32") -> None:
    """Write a merged pipeline as `save_pretrained` does.

    Args:
        pipeline: of `merge`; it is changed to `dtype`.
        out: a folder.
        dtype: of the stored weights, as `ModelOptions.dtype` names it.

    Raises:
        UserError: an unknown dtype, or a folder that cannot be written.
    """
    storage = dtype_of(dtype)
    try:
        with library_bars(shown=False), loader_notices_off():
            stored = pipeline if storage == torch.float32 else pipeline.to(storage)
            stored.save_pretrained(out, safe_serialization=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot be written: {error}", where=str(out)) from error
