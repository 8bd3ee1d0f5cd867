"""Latents to pixels, pixels to latents, and dL/dpixels to dL/dlatents, for every family.

Images go item by item, clips item by item and chunk of latent frames by chunk (`clips.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.policy.causal import CAUSAL
from diffusion_align.policy.clips import clips_gradient, decode_clips
from diffusion_align.policy.families import Family
from diffusion_align.policy.latents import decode_scaled, encode_scaled


def decode(
    vae: Any,
    family: Family,
    x_0: Tensor,
    *,
    chunk: int | None,
    checkpoint: bool,
    frames: Sequence[int] | None,
) -> Tensor:
    """See `Policy.decode`."""
    if family.frames is not None and getattr(vae, "use_slicing", False):
        chunk = 1
    parts = [
        _decode(vae, family, part, checkpoint=checkpoint, frames=frames)
        for part in x_0.split(chunk or max(1, x_0.shape[0]))
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def decode_gradient(
    vae: Any,
    family: Family,
    x_0: Tensor,
    pixel_gradient: Tensor,
    *,
    chunk: int | None,
    frames: Sequence[int] | None,
) -> Tensor:
    """See `Policy.decode_gradient`."""
    size = chunk or 1
    pairs = zip(x_0.split(size), pixel_gradient.split(size), strict=True)
    return torch.cat([_gradient(vae, family, x, g, frames) for x, g in pairs])


def encode(vae: Any, family: Family, pixels: Tensor) -> Tensor:
    """See `Policy.encode_pixels`."""
    if family.frames is None:
        return encode_scaled(vae, pixels)
    clips = (pixels.transpose(1, 2) * 2.0 - 1.0).to(vae.dtype)
    z = vae.encode(clips, return_dict=False)[0].mode()
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    return CAUSAL[family.decode].denormalise(vae, z).movedim(2, family.frames.axis)


def _decode(
    vae: Any, family: Family, x_0: Tensor, *, checkpoint: bool, frames: Sequence[int] | None
) -> Tensor:
    if family.frames is None:
        if frames is not None:
            raise ValueError(f"{family.name} makes images: there are no frames to choose")
        return decode_scaled(vae, x_0, checkpoint=checkpoint)
    if getattr(vae, "use_tiling", False):
        raise UserError(
            "clips are decoded in chunks of frames, not in tiles",
            where="model.vae_tiling",
            fix="set model.vae_tiling=false",
        )
    return decode_clips(
        CAUSAL[family.decode],
        vae,
        x_0.movedim(family.frames.axis, 2),
        ratio=family.frames.ratio,
        frames=frames,
        checkpoint=checkpoint,
    )


def _gradient(
    vae: Any, family: Family, x_0: Tensor, pixel_gradient: Tensor, frames: Sequence[int] | None
) -> Tensor:
    if family.frames is not None and not getattr(vae, "use_tiling", False):
        axis = family.frames.axis
        gradient = clips_gradient(
            CAUSAL[family.decode],
            vae,
            x_0.detach().movedim(axis, 2),
            pixel_gradient,
            ratio=family.frames.ratio,
            frames=frames,
        )
        return gradient.movedim(2, axis)
    leaf = x_0.detach().requires_grad_()
    with torch.enable_grad():
        pixels = _decode(vae, family, leaf, checkpoint=False, frames=frames)
    return torch.autograd.grad(pixels, leaf, pixel_gradient.to(pixels))[0]
