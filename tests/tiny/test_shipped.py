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
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn

from diffusion_align.policy.catalogue import MODELS
from diffusion_align.tiny import clip as tiny_clip
from diffusion_align.tiny.build import ASSETS, TINY_SD, shipped_pipeline, shipped_tower
from diffusion_align.tiny.quality import (
    Agreement,
    Choices,
    measure_clip,
    measure_sd,
    measure_vae,
)
from diffusion_align.tiny.rewards import TWINS, drawn_samples, measure_twin


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


@pytest.fixture(scope="module")
def samples(
    pipeline: StableDiffusionPipeline, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tensor, list[str]]:
    """Pictures that no reward has seen, of captions of the held-out split."""
    return drawn_samples(pipeline, tmp_path_factory.mktemp("samples"), "heldout", 48, seed=33)


@pytest.mark.parametrize("name", ["tiny-hps", "tiny-mps"])
def test_a_twin_agrees_with_its_crowd_nearly_as_well_as_truth_does(
    name: str, samples: tuple[Tensor, list[str]]
) -> None:
    found = measure_twin(name, samples, count=1000, seed=34)
    assert isinstance(found, Choices)
    # The bar is 5 points on 4,600 pairs; a quarter of them scatters by one point more or less.
    assert found.accuracy >= found.ceiling - 0.075
    assert found.accuracy > 0.7


def test_the_aesthetic_twin_agrees_with_its_crowd(samples: tuple[Tensor, list[str]]) -> None:
    found = measure_twin("tiny-aesthetic", samples, count=1000, seed=34)
    assert isinstance(found, Agreement)
    assert found.correlation >= found.ceiling - 0.1
    assert found.pairs >= found.pairs_ceiling - 0.075


def test_the_twins_share_one_tower_and_keep_only_what_changed() -> None:
    import reward_models

    base = reward_models.load("tiny-clip").tower.model.state_dict()  # type: ignore[attr-defined]
    for name in TWINS:
        own = reward_models.load(name).tower.model.state_dict()  # type: ignore[attr-defined]
        shared = sum(own[key].data_ptr() == base[key].data_ptr() for key in base)
        assert shared > len(base) / 4, name
        assert own["token_embedding.weight"].data_ptr() == base["token_embedding.weight"].data_ptr()


def test_the_builder_starts_from_the_shipped_architecture() -> None:
    shipped, new = shipped_tower(), tiny_clip.new_clip()
    assert isinstance(shipped, nn.Module)
    assert {n: p.shape for n, p in shipped.named_parameters()} == {
        n: p.shape for n, p in new.named_parameters()
    }
