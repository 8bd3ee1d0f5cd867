"""The VAE of ``tiny-sd``: diffusers' AutoencoderKL, 64x64 pictures to 8x8x4 latents."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from diffusion_align.tiny.fit import fit
from diffusion_align.tiny.pictures import Pictures, draw_pictures

STEPS = 4500
_KL_WEIGHT = 1e-5  # per latent value: enough to keep latents centred, too little to blur


def new_vae() -> AutoencoderKL:
    """An untrained VAE with 0.6 M parameters."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 48, 48),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=64,
    )


def train_vae(work: Path, *, steps: int = STEPS, seed: int = 1, batch: int = 32) -> AutoencoderKL:
    """Train the VAE (absolute + squared error, a light KL) and set its scaling factor.

    Args:
        work: folder of the resumable checkpoint.
    """
    torch.manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    pictures = draw_pictures(20_000, seed, "train")

    def step(generator: torch.Generator) -> Tensor:
        indices = torch.randint(len(pictures.captions), (batch,), generator=generator)
        x = (pictures.batch(indices) * 2 - 1).contiguous(memory_format=torch.channels_last)
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
        return (
            (y - x).abs().mean() + 2 * (y - x).square().mean() + _KL_WEIGHT * posterior.kl().mean()
        )

    fit(
        vae,
        step,
        steps=steps,
        learning_rate=2e-3,
        checkpoint=work / "vae.pt",
        seed=seed,
        ema_decay=0.998,
    )
    vae.register_to_config(scaling_factor=float(1 / encode_all(vae, pictures, 2000).std()))
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, pictures: Pictures, count: int) -> Tensor:
    """Posterior means float32 [count, 4, 8, 8] of the first pictures (not scaled)."""
    means = []
    for indices in torch.arange(count).split(128):
        x = (pictures.batch(indices) * 2 - 1).contiguous(memory_format=torch.channels_last)
        means.append(vae.encode(x).latent_dist.mean.contiguous())
    return torch.cat(means)
