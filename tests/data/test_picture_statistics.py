"""Picture statistics against colorsys, scipy's Sobel and NumPy's histogram."""

from __future__ import annotations

import colorsys
import math

import numpy as np
import pytest
import torch
from scipy import ndimage, stats
from torch import Tensor

from diffusion_align.data.picture_statistics import (
    EDGE_THRESHOLD,
    LEVELS,
    colour_entropy,
    edge_density,
    picture_statistics,
    saturation,
)


def pictures(seed: int, *shape: int) -> Tensor:
    """Smooth and rough ones, with plain stretches, blacks and whites."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(shape, generator=generator)
    contrast = torch.rand(*shape[:-3], 1, 1, 1, generator=generator) * 1.5
    return ((rough - 0.5) * contrast + 0.5).clamp(0, 1).round(decimals=1)


@pytest.mark.parametrize("seed", range(4))
def test_saturation_is_that_of_colorsys(seed: int) -> None:
    batch = pictures(seed, 3, 3, 5, 7)
    batch[0, :, 0, 0] = 0.0  # black has none
    expected = [
        np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in picture.flatten(1).T.tolist()])
        for picture in batch
    ]
    np.testing.assert_allclose(saturation(batch).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("seed", range(4))
def test_edges_are_those_of_scipy(seed: int) -> None:
    batch = pictures(seed, 4, 3, 9, 6).double().float()
    for picture, found in zip(batch, edge_density(batch), strict=True):
        grey = np.tensordot([0.299, 0.587, 0.114], picture.double().numpy(), axes=1)
        across, down = (ndimage.sobel(grey, axis=axis, mode="nearest") for axis in (1, 0))
        magnitude = np.hypot(across, down) / 4
        # Magnitudes that are the threshold up to rounding may fall on either side of it.
        low = (magnitude > EDGE_THRESHOLD + 1e-6).mean()
        high = (magnitude > EDGE_THRESHOLD - 1e-6).mean()
        assert low - 1e-7 <= float(found) <= high + 1e-7
    assert 0.05 < float(edge_density(batch).mean()) < 1  # the pictures are no trivial ones


def test_a_step_has_its_height_as_magnitude() -> None:
    picture = torch.zeros(3, 8, 8)
    picture[:, :, 4:] = 0.5  # the two columns beside the step see all of it
    assert float(edge_density(picture, 0.499)) == 0.25
    assert float(edge_density(picture, 0.501)) == 0.0
    assert float(edge_density(torch.full((3, 8, 8), 0.7))) == 0.0  # no edge along the border


@pytest.mark.parametrize("seed", range(4))
def test_entropy_is_that_of_numpys_histogram(seed: int) -> None:
    batch = pictures(seed, 3, 3, 6, 5) * 0.999  # no value on the border of the last bin
    expected = []
    for picture in batch:
        counts, _ = np.histogramdd(
            picture.flatten(1).T.numpy(), bins=LEVELS, range=[(0.0, 1.0)] * 3
        )
        expected.append(stats.entropy(counts.reshape(-1), base=2))
    np.testing.assert_allclose(colour_entropy(batch).numpy(), expected, rtol=1e-5)


def test_entropy_has_its_known_extremes() -> None:
    assert float(colour_entropy(torch.full((3, 4, 4), 1.0))) == 0.0
    corners = torch.tensor([[0.0, 0.0, 1.0, 1.0], [0.0, 1.0, 0.0, 1.0], [0.0] * 4])
    assert float(colour_entropy(corners.reshape(3, 2, 2))) == pytest.approx(2.0)


@pytest.mark.parametrize("statistic", [saturation, edge_density, colour_entropy])
def test_a_picture_has_the_same_number_in_any_batch_and_shape(statistic: object) -> None:
    assert callable(statistic)
    batch = pictures(7, 6, 3, 8, 8)
    whole = statistic(batch)
    assert whole.shape == (6,) and whole.dtype == torch.float32
    assert torch.equal(torch.stack([statistic(picture) for picture in batch]), whole)
    clip = statistic(batch.reshape(2, 3, 3, 8, 8))  # two clips of three frames
    assert torch.equal(clip, whole.reshape(2, 3))


def test_a_picture_that_is_not_finite_has_no_number_and_harms_no_other() -> None:
    batch = pictures(3, 4, 3, 4, 4)
    alone = picture_statistics(batch[0])
    batch[1, 0, 0, 0] = math.nan
    batch[2, 2, 3, 3] = math.inf
    batch[3, 1, 2, 1] = -math.inf
    found = picture_statistics(batch)
    for name in ("saturation", "edge_density", "colour_entropy"):
        values = getattr(found, name)
        assert float(values[0]) == float(getattr(alone, name))
        assert values.isnan().tolist() == [False, True, True, True]


@pytest.mark.parametrize("shape", [(4, 4), (1, 4, 4), (2, 4, 4, 3)])
def test_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="expected pixels"):
        picture_statistics(torch.zeros(shape))


def test_an_erased_background_moves_them_as_it_was_reported() -> None:
    """The case of an OCR reward: fewer edges, fewer colours, the figure itself untouched."""
    generator = torch.Generator().manual_seed(0)
    before = torch.rand(3, 32, 32, generator=generator)
    after = before.clone()
    after[:, :, 8:] = 1.0
    assert float(edge_density(after)) < 0.4 * float(edge_density(before))
    assert float(colour_entropy(after)) < 0.5 * float(colour_entropy(before))
