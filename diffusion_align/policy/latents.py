"""Latents of images to pixels and back, and the tokens that some denoisers see of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as run_checkpointed


def decode_scaled(vae: Any, x_0: Tensor, *, checkpoint: bool = False) -> Tensor:
    """Pixels of latents, z = x_0 * std / scaling_factor + mean; differentiable.

    std and mean are the VAE config's `latents_std` and `latents_mean` where it has them; otherwise
    1 and its `shift_factor`, or 0. Values the VAE puts outside [0, 1] are clamped, as the pipelines
    do, and carry no gradient there.

    Args:
        vae: a diffusers autoencoder.
        x_0: float [B, C, h, w].
        checkpoint: recompute the decoder in the backward pass instead of keeping activations.

    Returns:
        float32 [B, 3, H, W] in [0, 1] (float64 for a float64 VAE).
    """
    mean, std = _statistics(vae, x_0)
    z = (x_0 * std / vae.config.scaling_factor + mean).to(vae.dtype)

    def run(latent: Tensor) -> Tensor:
        return vae.decode(latent, return_dict=False)[0]

    pixels = run_checkpointed(run, z, use_reentrant=False) if checkpoint else run(z)
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32))
    return (pixels * 0.5 + 0.5).clamp(0.0, 1.0)


def encode_scaled(vae: Any, pixels: Tensor) -> Tensor:
    """The inverse of `decode_scaled`, by the mean of the encoder's posterior.

    Args:
        vae: a diffusers autoencoder.
        pixels: float [B, 3, H, W] in [0, 1].

    Returns:
        float32 [B, C, h, w] (float64 for a float64 VAE).
    """
    z = vae.encode((pixels * 2.0 - 1.0).to(vae.dtype), return_dict=False)[0].mode()
    z = z.to(torch.promote_types(z.dtype, torch.float32))
    mean, std = _statistics(vae, z)
    return (z - mean) * vae.config.scaling_factor / std


def _statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    mean = getattr(vae.config, "latents_mean", None)
    std = getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        shift = getattr(vae.config, "shift_factor", None) or 0.0
        return like.new_full((), shift), like.new_ones(())
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def tokens_of(x: Tensor) -> Tensor:
    """[B, C, h, w], h and w even, as tokens [B, h/2 * w/2, 4C] of 2 x 2 latent pixels."""
    return functional.pixel_unshuffle(x, 2).flatten(2).transpose(1, 2)


def latent_of(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `tokens_of`, for a latent of `height` x `width`."""
    grid = tokens.transpose(1, 2).unflatten(2, (height // 2, width // 2))
    return functional.pixel_shuffle(grid, 2)
