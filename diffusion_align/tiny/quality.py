"""What the embedded models can do, measured on captions and pictures that they never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from torch import Tensor, nn

from diffusion_align.tiny.clip import Judged, features, judged_renders
from diffusion_align.tiny.pictures import draw_pictures
from reward_models.small_world import captions, change_one_attribute, verify


@dataclass(frozen=True)
class RoundTrip:
    """VAE quality on held-out renders: mean PSNR in dB, share of claims and of whole captions."""

    psnr: float
    per_claim: float
    strict: float


@dataclass(frozen=True)
class Accuracy:
    """Verifier accuracy of samples, and of the same samples read against shuffled captions."""

    strict: float
    per_claim: float
    chance_strict: float
    chance_per_claim: float
    by_claim: dict[str, float]


@torch.no_grad()
def measure_vae(vae: AutoencoderKL, *, count: int = 512, seed: int = 77) -> RoundTrip:
    """Encode and decode held-out renders."""
    pictures = draw_pictures(count, seed, "heldout")
    x = pictures.batch(torch.arange(count))
    parts = [vae.decode(vae.encode(part * 2 - 1).latent_dist.mean).sample for part in x.split(64)]
    y = (torch.cat(parts) / 2 + 0.5).clamp(0, 1)
    psnr = -10 * torch.log10((x - y).square().mean(dim=(1, 2, 3)))
    claims = [verify(image, caption) for image, caption in zip(y, pictures.captions, strict=True)]
    return RoundTrip(
        float(psnr.mean()),
        float(np.mean([claim.fraction for claim in claims])),
        float(np.mean([claim.strict for claim in claims])),
    )


def sample(
    pipeline: StableDiffusionPipeline,
    prompts: list[str],
    *,
    guidance_scale: float,
    steps: int = 12,
    seed: int = 0,
    batch: int = 64,
) -> Tensor:
    """Samples float32 [N, 3, H, W] in [0, 1], each from a generator seeded by its place."""
    pipeline.set_progress_bar_config(disable=True)
    pictures = []
    for start in range(0, len(prompts), batch):
        chunk = prompts[start : start + batch]
        generators = [
            torch.Generator().manual_seed(seed * 1_000_003 + start + i) for i in range(len(chunk))
        ]
        pictures.append(
            pipeline(
                chunk,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="pt",
            ).images
        )
    return torch.cat(pictures)


def measure_sd(
    pipeline: StableDiffusionPipeline, *, guidance_scale: float, count: int = 512, seed: int = 5
) -> Accuracy:
    """Strict and per-claim accuracy on held-out captions, 12 DDIM steps."""
    prompts = captions(count, seed, "heldout")
    pictures = sample(pipeline, prompts, guidance_scale=guidance_scale, seed=seed)
    claims = [verify(picture, text) for picture, text in zip(pictures, prompts, strict=True)]
    shuffled = np.random.default_rng(seed).permutation(count)
    chance = [verify(picture, prompts[i]) for picture, i in zip(pictures, shuffled, strict=True)]
    kinds: dict[str, list[bool]] = {}
    for claim in claims:
        for name, holds in claim.held.items():
            kinds.setdefault(name.split()[0], []).append(holds)
    return Accuracy(
        float(np.mean([claim.strict for claim in claims])),
        float(np.mean([claim.fraction for claim in claims])),
        float(np.mean([claim.strict for claim in chance])),
        float(np.mean([claim.fraction for claim in chance])),
        {name: float(np.mean(values)) for name, values in kinds.items()},
    )


@torch.no_grad()
def measure_clip(clip: CLIP, *, count: int = 1024, seed: int = 78) -> float:
    """How often held-out renders prefer their caption to one with exactly one word changed."""
    rng = np.random.default_rng(seed)
    tokenize = open_clip.get_tokenizer("ViT-B-32")
    judged = judged_renders(captions(count, seed, "heldout"), seed)
    wrong = [str(change_one_attribute(caption, rng)) for caption in judged.captions]
    image = features(clip, judged)
    right = [str(caption) for caption in judged.captions]
    near = clip.encode_text(tokenize(right), normalize=True)
    far = clip.encode_text(tokenize(wrong), normalize=True)
    return float(((image * near).sum(1) > (image * far).sum(1)).float().mean())


@dataclass(frozen=True)
class Agreement:
    """Pearson correlations: head with noisy ratings, the ceiling (truth with the same ratings),
    and head with the noiseless truth."""

    correlation: float
    ceiling: float
    truth: float


@torch.no_grad()
def measure_aesthetic(clip: CLIP, head: nn.Module, judged: Judged) -> Agreement:
    """Agreement of the head with a crowd that rated pictures it never saw."""
    felt = head(features(clip, judged)).numpy()
    ratings, truth = judged.ratings.numpy(), judged.opinions.numpy()
    return Agreement(
        float(np.corrcoef(felt, ratings)[0, 1]),
        float(np.corrcoef(truth, ratings)[0, 1]),
        float(np.corrcoef(felt, truth)[0, 1]),
    )
