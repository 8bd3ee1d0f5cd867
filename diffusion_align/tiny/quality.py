"""What the embedded models can do, measured on captions and pictures that they never saw."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import open_clip
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline
from open_clip.model import CLIP
from torch import Tensor

from diffusion_align.tiny.clip import features
from diffusion_align.tiny.pictures import draw_pictures
from reward_models.base import Reward
from reward_models.small_world import (
    JudgedPairs,
    JudgedRatings,
    captions,
    change_one_attribute,
    parse_caption,
    random_scene,
    render,
    verify,
)


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
    right = captions(count, seed, "heldout")
    wrong = [str(change_one_attribute(parse_caption(text), rng)) for text in right]
    image = features(clip, renders(right, seed))
    near = clip.encode_text(tokenize(right), normalize=True)
    far = clip.encode_text(tokenize(wrong), normalize=True)
    return float(((image * near).sum(1) > (image * far).sum(1)).float().mean())


def renders(texts: list[str], seed: int) -> np.ndarray:
    """One clean render of each caption: uint8 [N, 3, 64, 64]."""
    rng = np.random.default_rng(np.random.Philox(key=seed))
    images = [render(random_scene(parse_caption(text), rng)) for text in texts]
    return np.round(np.stack(images) * 255).astype(np.uint8)


@dataclass(frozen=True)
class Agreement:
    """Pearson correlations: scores with noisy ratings, the ceiling (truth with the same ratings),
    and scores with the noiseless truth; and the same in pairs.

    In pairs: of two of the pictures, how often the higher score got the higher rating; the ceiling
    is the truth's own accuracy.
    """

    correlation: float
    ceiling: float
    truth: float
    pairs: float
    pairs_ceiling: float


def measure_ratings(scores: np.ndarray, judged: JudgedRatings, *, seed: int = 0) -> Agreement:
    """Agreement of scores [N] with a crowd that rated pictures the scorer never saw."""
    ratings, truth = judged.ratings, judged.opinions
    order = np.random.default_rng(seed).permutation(len(ratings))
    a, b = order[::2][: len(order) // 2], order[1::2]
    above = ratings[a] > ratings[b]
    return Agreement(
        float(np.corrcoef(scores, ratings)[0, 1]),
        float(np.corrcoef(truth, ratings)[0, 1]),
        float(np.corrcoef(scores, truth)[0, 1]),
        float(np.mean((scores[a] > scores[b]) == above)),
        float(np.mean((truth[a] > truth[b]) == above)),
    )


@dataclass(frozen=True)
class Choices:
    """Accuracy on a crowd's choices, the accuracy of the crowd's own noiseless opinions on the same
    choices (the noise ceiling), and how often scores and noiseless opinions prefer the same."""

    accuracy: float
    ceiling: float
    truth: float


def measure_choices(first: np.ndarray, second: np.ndarray, judged: JudgedPairs) -> Choices:
    """Agreement of scores [N] of both pictures with choices between pairs never seen."""
    true = judged.opinion_first > judged.opinion_second
    return Choices(
        float(np.mean((first > second) == judged.preferred)),
        float(np.mean(true == judged.preferred)),
        float(np.mean((first > second) == true)),
    )


@torch.no_grad()
def scores_of(reward: Reward, images: np.ndarray, prompts: list[str]) -> np.ndarray:
    """Scores [N] of uint8 [N, 3, 64, 64] with their captions."""
    parts = []
    for start in range(0, len(images), 256):
        batch = torch.from_numpy(images[start : start + 256]).float() / 255
        parts.append(reward.score(batch, prompts[start : start + 256]).values)
    return torch.cat(parts).numpy()
