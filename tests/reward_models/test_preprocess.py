"""The one resize against Pillow, and its gradients against finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models.media import read_image, to_uint8
from reward_models.preprocess import (
    CLIP_MEAN,
    CLIP_STD,
    clip_pixels,
    letterbox,
    normalise,
    resize_bicubic,
    shortest_edge_crop,
)

LEVEL = 1 / 255


def tensor(pixels: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def pillow(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """Pillow's bicubic, width first: Pillow 13 begins with the height where that shrinks more."""
    wide = Image.fromarray(pixels).resize((width, len(pixels)), Image.Resampling.BICUBIC)
    return tensor(np.asarray(wide.resize((width, height), Image.Resampling.BICUBIC)))


def test_the_oracle_is_pillows_own_resize_where_the_ratio_is_kept(photo) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(300, 400)
    whole = Image.fromarray(pixels).resize((299, 224), Image.Resampling.BICUBIC)
    assert torch.equal(tensor(np.asarray(whole)), pillow(pixels, 224, 299))


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ((512, 512), (224, 224)),
        ((300, 173), (224, 129)),
        ((40, 64), (64, 103)),
        ((97, 31), (33, 80)),
    ],
)
def test_within_one_level_of_pillow(photo, source, target) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(*source)
    ours, theirs = resize_bicubic(tensor(pixels), *target), pillow(pixels, *target)
    assert (ours - theirs).abs().max() <= 1.05 * LEVEL
    assert ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (100, 380)])
def test_parity_mode_is_pillow_up_to_rounding_ties(photo, size) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(300, 400)
    ours = resize_bicubic(tensor(pixels), *size, round_to_uint8=True)
    off = (ours - pillow(pixels, *size)).abs() > LEVEL / 2
    assert off.float().mean() < 1e-3


@pytest.mark.parametrize("name", ["cat_aesthetic.png", "cat_normal.png", "hps_demo.jpg"])
def test_real_photographs_are_within_one_level(published, name: str) -> None:  # type: ignore[no-untyped-def]
    image = read_image(published(f"images/{name}"))[None]
    pixels = to_uint8(image)[0].permute(1, 2, 0).numpy()
    difference = (resize_bicubic(image, 224, 224) - pillow(pixels, 224, 224)).abs()
    assert difference.max() <= 1.05 * LEVEL


def test_a_single_unclamped_pass_would_be_far_off(photo) -> None:  # type: ignore[no-untyped-def]
    """Why there are two passes: the oracle can tell the difference."""
    pixels = photo(512, 512)
    single = torch.nn.functional.interpolate(
        tensor(pixels), size=(224, 224), mode="bicubic", antialias=True
    )
    assert (single - pillow(pixels, 224, 224)).abs().max() > 3 * LEVEL


def test_the_same_size_changes_nothing() -> None:
    image = torch.rand(1, 3, 12, 9)
    assert resize_bicubic(image, 12, 9) is image


def test_half_precision_is_computed_in_float32() -> None:
    image = torch.rand(1, 3, 20, 20, dtype=torch.float16)
    assert resize_bicubic(image, 8, 8).dtype == torch.float32


@pytest.mark.parametrize("size", [(9, 13), (5, 4), (16, 6)])
def test_gradient_equals_finite_differences(size: tuple[int, int]) -> None:
    torch.manual_seed(0)
    # Away from 0 and 1, so that no clamp has its kink within the step.
    image = 0.3 + 0.4 * torch.rand(1, 3, 7, 8, dtype=torch.float64)
    image.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resize_bicubic(x, *size), image)
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, 6), image)
    assert torch.autograd.gradcheck(lambda x: letterbox(x, 6), image)


def test_rounding_passes_the_gradient_straight_through() -> None:
    image = (0.3 + 0.4 * torch.rand(1, 3, 16, 16)).requires_grad_()
    weight = torch.randn(1, 3, 6, 6)
    (smooth,) = torch.autograd.grad((resize_bicubic(image, 6, 6) * weight).sum(), image)
    rounded_image = resize_bicubic(image, 6, 6, round_to_uint8=True)
    (rounded,) = torch.autograd.grad((rounded_image * weight).sum(), image)
    assert torch.allclose(smooth, rounded, atol=1e-6)


@pytest.mark.parametrize("shape", [(40, 60), (60, 40), (33, 47), (8, 8), (5, 31)])
def test_shortest_edge_crop_keeps_the_centre(shape: tuple[int, int]) -> None:
    ramp = torch.linspace(0, 1, shape[1]).expand(1, 3, *shape)
    cropped = shortest_edge_crop(ramp, 16)
    assert cropped.shape == (1, 3, 16, 16)
    assert (cropped.mean() - 0.5).abs() < 0.03


@pytest.mark.parametrize(
    ("shape", "size"), [((10, 20), 8), ((20, 10), 8), ((30, 7), 16), ((9, 9), 5)]
)
def test_letterbox_pads_black_and_keeps_the_ratio(shape: tuple[int, int], size: int) -> None:
    boxed = letterbox(torch.ones(1, 3, *shape), size)
    assert boxed.shape == (1, 3, size, size)
    rows, columns = (boxed[0, 0] > 0.5).any(1).sum(), (boxed[0, 0] > 0.5).any(0).sum()
    assert rows == round(shape[0] * size / max(shape))
    assert columns == round(shape[1] * size / max(shape))
    above = int((boxed[0, 0].sum(1) > 0).int().argmax())
    assert above == (size - int(rows)) // 2


def test_normalise_is_clips() -> None:
    image = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1) + torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    assert torch.allclose(normalise(image), torch.ones(1, 3, 1, 1))
