"""Statistics of an iteration's samples: the same however the samples come in chunks."""

from __future__ import annotations

import itertools
from dataclasses import fields
from types import ModuleType

import pytest
import torch

from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.picture_metrics import PictureMeter, PictureMetrics
from diffusion_align.data.diversity import pixel_diversity
from diffusion_align.data.picture_statistics import picture_statistics
from diffusion_align.sampling.options import SamplingOptions

POSITIONS = [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]


def measured(pixels: torch.Tensor, size: int) -> PictureMetrics:
    meter = PictureMeter()
    for start in range(0, len(pixels), size):
        meter.add(pixels[start : start + size], POSITIONS[start : start + size])
    return meter.take()


@pytest.mark.parametrize("size", [1, 2, 4, 10])
def test_chunks_do_not_matter(size: int) -> None:
    pixels = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    found = measured(pixels, size)
    alone = picture_statistics(pixels)
    assert torch.equal(found.saturation, alone.saturation)
    assert torch.equal(found.edge_density, alone.edge_density)
    assert torch.equal(found.colour_entropy, alone.colour_entropy)
    expected = [pixel_diversity(pixels[i : i + 3]) for i in (0, 3, 6) for _ in range(3)]
    assert found.diversity[:9].tolist() == pytest.approx(expected)
    assert found.diversity[9].isnan()  # one sample alone is not diverse


def test_what_is_logged_are_means_over_what_has_a_number() -> None:
    pixels = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    pixels[4] = torch.nan
    means = measured(pixels, 4).means()
    kept = [i for i in range(10) if i != 4]
    assert means["picture/saturation"] == pytest.approx(
        float(picture_statistics(pixels[kept]).saturation.mean())
    )
    # The prompt's other two samples are still compared with each other.
    pairs = [list(itertools.combinations(group, 2)) for group in ((0, 1, 2), (3, 5), (6, 7, 8))]
    by_prompt = [
        sum(float((pixels[i] - pixels[j]).square().mean().sqrt()) for i, j in group) / len(group)
        for group in pairs
    ]
    assert means["picture/diversity"] == pytest.approx(sum(by_prompt) / 3, rel=1e-5)


def test_one_sample_per_prompt_leaves_diversity_out() -> None:
    meter = PictureMeter()
    meter.add(torch.rand(3, 3, 4, 4), [0, 1, 2])
    assert set(meter.take().means()) == {
        "picture/saturation",
        "picture/edge_density",
        "picture/colour_entropy",
    }


def test_a_clip_counts_as_the_mean_of_its_frames() -> None:
    clips = torch.rand(2, 4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    meter = PictureMeter()
    meter.add(clips, [0, 0])
    found = meter.take()
    frames = picture_statistics(clips.flatten(0, 1)).saturation
    assert torch.allclose(found.saturation, frames.reshape(2, 4).mean(1))
    assert float(found.diversity[0]) == pytest.approx(
        float((clips[0] - clips[1]).square().mean().sqrt()), rel=1e-6
    )


def test_a_meter_is_empty_after_it_was_read() -> None:
    pixels = torch.rand(10, 3, 4, 4, generator=torch.Generator().manual_seed(3))
    meter = PictureMeter()
    meter.add(pixels[:3], [0, 0, 0])
    meter.take()
    meter.add(pixels[3:5], [0, 0])
    found = meter.take()
    assert all(len(getattr(found, column.name)) == 2 for column in fields(found))
    assert float(found.diversity[0]) == pytest.approx(pixel_diversity(pixels[3:5]))


@pytest.mark.parametrize("batch_size", [3, 64])
def test_an_online_method_logs_them_of_its_samples(toy: ModuleType, batch_size: int) -> None:
    policy = toy.ToyPolicy()
    drawn: list[torch.Tensor] = []
    decode = policy.decode

    def remembered(x: torch.Tensor) -> torch.Tensor:
        drawn.append(decode(x))
        return drawn[-1]

    policy.decode = remembered
    algorithm = DDPO(
        policy,
        toy.Brightness(),
        ["a", "bb"],
        options=DDPOOptions(prompts_per_iteration=2, samples_per_prompt=4, train_batch_size=4),
        sampling=SamplingOptions(steps=3, guidance_scale=1.0, batch_size=batch_size),
    )
    metrics = algorithm.collect(0).metrics
    pixels = torch.cat(drawn)[:8]
    expected = sum(pixel_diversity(pixels[i : i + 4]) for i in (0, 4)) / 2
    assert metrics["picture/diversity"] == pytest.approx(expected, rel=1e-6)
    entropy = picture_statistics(pixels).colour_entropy.double().mean()
    assert metrics["picture/colour_entropy"] == pytest.approx(float(entropy))
