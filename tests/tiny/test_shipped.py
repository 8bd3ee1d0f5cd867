"""The weights that travel with the package: whole, small, and as good as the docs say.

The full measurement is `python -m diffusion_align.tiny.build quality`; here a smaller sample is
held against its bars with room for chance.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from diffusion_align.policy.catalogue import MODELS
from diffusion_align.tiny import clip as tiny_clip
from diffusion_align.tiny.build import (
    ASSETS,
    TINY_SD,
    shipped_head,
    shipped_pipeline,
    shipped_tower,
)
from diffusion_align.tiny.quality import (
    measure_aesthetic,
    measure_clip,
    measure_sd,
    measure_vae,
    sample,
)
from reward_models.small_world import captions


@pytest.fixture(scope="module")
def pipeline() -> StableDiffusionPipeline:
    return shipped_pipeline()


def listings() -> Iterator[tuple[Path, Path]]:
    yield TINY_SD, TINY_SD / "SHA256SUMS.json"
    yield ASSETS, ASSETS / "SHA256SUMS"


def test_every_shipped_file_is_listed_with_its_checksum() -> None:
    for folder, listing in listings():
        sums = json.loads(listing.read_text())
        files = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()}
        assert set(sums) == files - {listing.name}
        for name, expected in sums.items():
            assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == expected, name


def test_sizes_stay_within_what_git_should_carry() -> None:
    def megabytes(folder: Path) -> float:
        return sum(p.stat().st_size for p in folder.rglob("*") if p.is_file()) / 1e6

    assert megabytes(TINY_SD) <= 8
    assert megabytes(ASSETS) <= 3


def test_the_vae_keeps_what_a_picture_says(pipeline: StableDiffusionPipeline) -> None:
    trip = measure_vae(pipeline.vae, count=128)
    assert trip.psnr >= 25
    assert trip.per_claim >= 0.97


def test_samples_follow_held_out_captions_far_above_chance(
    pipeline: StableDiffusionPipeline,
) -> None:
    scale = MODELS["tiny-sd"].guidance_scale
    found = measure_sd(pipeline, guidance_scale=scale, count=128)
    # The bar is 25 to 60 % of 512; 128 pictures scatter by 4 points either way.
    assert 0.2 <= found.strict <= 0.65
    assert found.chance_strict < found.strict / 3
    assert found.per_claim > found.chance_per_claim + 0.2


def test_clip_prefers_the_true_caption_to_one_wrong_word() -> None:
    assert measure_clip(shipped_tower()) >= 0.85


def test_the_aesthetic_head_agrees_with_the_crowd_nearly_as_well_as_truth_does(
    pipeline: StableDiffusionPipeline,
) -> None:
    texts = captions(64, 33, "heldout")
    scale = MODELS["tiny-sd"].guidance_scale
    samples = sample(pipeline, texts, guidance_scale=scale, seed=33)
    judged = tiny_clip.judged_pictures(512, 33, "heldout", (samples, texts))
    agreement = measure_aesthetic(shipped_tower(), shipped_head(), judged)
    assert agreement.correlation >= agreement.ceiling - 0.1


def test_the_scorer_and_the_builder_agree_on_a_picture() -> None:
    import reward_models

    judged = tiny_clip.judged_pictures(8, 34, "heldout", None)
    indices = torch.arange(8)
    with torch.no_grad():
        features = tiny_clip.features(shipped_tower(), judged)
        expected = shipped_head()(features)
        scores = reward_models.load("tiny-aesthetic").score(
            judged.images[indices].float() / 255, [""] * 8
        )
    assert torch.allclose(scores.values, expected, atol=1e-4)


def test_the_builder_starts_from_the_shipped_architecture() -> None:
    shipped, new = shipped_tower(), tiny_clip.new_clip()
    assert isinstance(shipped, nn.Module)
    assert {n: p.shape for n, p in shipped.named_parameters()} == {
        n: p.shape for n, p in new.named_parameters()
    }
