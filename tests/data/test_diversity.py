"""Diversity: mean pairwise distance between the samples of one prompt."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from diffusion_align.data.diversity import diversity, feature_diversity, pixel_diversity


def test_pixel_distance_is_the_mean_rms_of_all_pairs() -> None:
    samples = torch.rand(4, 3, 5, 5)
    pairs = [
        ((samples[i] - samples[j]) ** 2).mean().sqrt().item()
        for i, j in itertools.combinations(range(4), 2)
    ]
    assert pixel_diversity(samples) == pytest.approx(sum(pairs) / 6)


def test_black_against_white_is_one_and_equal_pictures_are_zero() -> None:
    picture = torch.rand(1, 3, 4, 4)
    assert pixel_diversity(torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)])) == 1.0
    assert pixel_diversity(picture.expand(3, 3, 4, 4)) == 0.0


def test_feature_distance_ignores_length_and_counts_the_angle() -> None:
    features = torch.tensor([[2.0, 0.0], [0.0, 5.0], [-1.0, 0.0]])
    assert feature_diversity(features) == pytest.approx((1 + 2 + 1) / 3)


def test_a_feature_extractor_chooses_the_space() -> None:
    samples = torch.rand(3, 3, 4, 4)
    assert diversity(samples, lambda pixels: torch.ones(len(pixels), 7)) == pytest.approx(
        0, abs=1e-6
    )
    assert diversity(samples) == pixel_diversity(samples)


@pytest.mark.parametrize("count", [0, 1])
def test_fewer_than_two_samples_have_no_diversity(count: int) -> None:
    assert math.isnan(pixel_diversity(torch.rand(count, 3, 4, 4)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_sample_that_is_not_finite_takes_no_part(value: float) -> None:
    samples = torch.rand(3, 3, 4, 4)
    broken = torch.cat([samples, samples[:1]])
    broken[3, 1, 2, 3] = value
    assert pixel_diversity(broken) == pytest.approx(pixel_diversity(samples))
