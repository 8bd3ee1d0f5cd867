"""The one resize against Pillow and torchvision, and its gradients against finite differences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

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
    """Pillow's bicubic as before Pillow 13: width first (13 turns that round for portraits)."""
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
        ((520, 224), (260, 112)),  # 2.3:1, where Pillow 13 begins with the height
    ],
)
def test_within_one_level_of_pillow(photo, source, target) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(*source)
    ours, theirs = resize_bicubic(tensor(pixels), *target), pillow(pixels, *target)
    assert (ours - theirs).abs().max() <= 1.05 * LEVEL
    assert ours.min() >= 0 and ours.max() <= 1


@pytest.mark.parametrize("size", [(224, 224), (100, 380), (301, 400), (700, 33), (290, 120)])
def test_parity_mode_is_pillow_level_by_level(photo, size) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(300, 400)
    ours = resize_bicubic(tensor(pixels), *size, round_to_uint8=True)
    assert ours.dtype == torch.float32
    assert torch.allclose(ours, pillow(pixels, *size), rtol=0, atol=1e-6)


def test_parity_mode_takes_a_generated_picture_as_pillow_would_get_it() -> None:
    picture = torch.rand(1, 3, 60, 50, generator=torch.Generator().manual_seed(0)) * 1.02 - 0.01
    theirs = pillow(to_uint8(picture)[0].permute(1, 2, 0).numpy(), 24, 20)
    ours = resize_bicubic(picture, 24, 20, round_to_uint8=True)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


def assert_within_the_bars(pixels: np.ndarray, published: Tensor) -> None:
    """What a reward may differ by from the pictures that its authors fed it, in 8-bit levels."""
    for rounded, largest, mean in ((False, 1.25, 0.3), (True, 1e-3, 1e-3)):
        ours = shortest_edge_crop(tensor(pixels), 224, round_to_uint8=rounded)
        levels = (ours - published).abs() * 255
        assert levels.max() <= largest and levels.mean() <= mean, (rounded, levels.max())


@pytest.mark.parametrize("size", [512, 1024])
@pytest.mark.parametrize("kind", ["photo", "noise"])
def test_square_pictures_are_pillows_within_the_bars(photo, kind: str, size: int) -> None:  # type: ignore[no-untyped-def]
    noise = np.random.default_rng(size).integers(0, 256, (size, size, 3)).astype(np.uint8)
    pixels = photo(size, size) if kind == "photo" else noise
    whole = Image.fromarray(pixels).resize((224, 224), Image.Resampling.BICUBIC)
    assert_within_the_bars(pixels, tensor(np.asarray(whole)))


@pytest.mark.parametrize("name", ["cat_aesthetic.png", "cat_normal.png", "hps_demo.jpg"])
def test_real_photographs_are_torchvisions_within_the_bars(published, name: str) -> None:  # type: ignore[no-untyped-def]
    """The authors' own transform: torchvision on a Pillow picture."""
    transforms = pytest.importorskip("torchvision.transforms")
    chain = transforms.Compose(
        [
            transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(224),
        ]
    )
    with Image.open(published(f"images/{name}")) as image:
        cropped = np.asarray(chain(image.convert("RGB")))
    pixels = to_uint8(read_image(published(f"images/{name}"))).permute(1, 2, 0).numpy()
    assert_within_the_bars(pixels, tensor(cropped))


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
    assert torch.autograd.gradcheck(lambda x: letterbox(x, 6, antialias=False), image)


@pytest.mark.parametrize("shape", [(3, 17), (17, 3)])
def test_gradient_of_a_strip_equals_finite_differences(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    image = (0.3 + 0.4 * torch.rand(1, 3, *shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: clip_pixels(x, 4), image)


@pytest.mark.parametrize("size", [512, 1024])
def test_gradient_at_the_real_size_equals_finite_differences(photo, size: int) -> None:  # type: ignore[no-untyped-def]
    """Along a random direction; squeezed away from 0 and 1, where the clamp has its kinks."""
    generator = torch.Generator().manual_seed(size)
    image = (0.3 + 0.4 * tensor(photo(size, size)).double()).requires_grad_()
    weight = torch.randn(1, 3, 224, 224, generator=generator, dtype=torch.float64)
    along = torch.randn(image.shape, generator=generator, dtype=torch.float64)

    def value(pixels: Tensor) -> Tensor:
        return (clip_pixels(pixels, 224) * weight).sum()

    (gradient,) = torch.autograd.grad(value(image), image)
    step = 1e-4
    with torch.no_grad():
        slope = (value(image + step * along) - value(image - step * along)) / (2 * step)
    assert (gradient * along).sum().item() == pytest.approx(slope.item(), rel=1e-6)


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


def naive_crop(images: Tensor, size: int) -> Tensor:
    """The whole picture resized with torch's own kernel, width first, then cut."""
    height, width = images.shape[-2:]
    short = min(height, width)
    new_height, new_width = size * height // short, size * width // short
    wide = F.interpolate(images, (height, new_width), mode="bicubic", antialias=True).clamp(0, 1)
    full = F.interpolate(wide, (new_height, new_width), mode="bicubic", antialias=True).clamp(0, 1)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return full[..., top : top + size, left : left + size]


@pytest.mark.parametrize("size", [16, 33, 70])
@pytest.mark.parametrize("shape", [(31, 157), (157, 31), (10, 200), (200, 10), (1, 9), (80, 400)])
def test_a_strip_is_cropped_as_if_all_of_it_had_been_resized(
    shape: tuple[int, int], size: int
) -> None:
    image = torch.rand(1, 3, *shape, generator=torch.Generator().manual_seed(1)).double()
    naive = naive_crop(image, size)
    assert (shortest_edge_crop(image, size) - naive).abs().max() <= 1e-12
    assert (shortest_edge_crop(image.float(), size) - naive).abs().max() <= 2e-5


@pytest.mark.parametrize("turned", [False, True])
def test_a_strips_parity_mode_is_pillows(photo, turned: bool) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(40, 1000)
    if turned:
        pixels = np.ascontiguousarray(pixels.transpose(1, 0, 2))
    height, width = (64 * side // 40 for side in pixels.shape[:2])
    whole = pillow(pixels, height, width)
    top, left = round((height - 64) / 2), round((width - 64) / 2)
    theirs = whole[..., top : top + 64, left : left + 64]
    ours = shortest_edge_crop(tensor(pixels), 64, round_to_uint8=True)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-6)


class LargestTensor(TorchDispatchMode):
    """The most elements that any operation inside has returned."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self.elements = max(self.elements, leaf.numel())
        return result


def largest(work: Callable[[], Tensor]) -> int:
    with LargestTensor() as seen:
        work()
    return seen.elements


@pytest.mark.parametrize(
    ("frame", "shape"),
    [
        (shortest_edge_crop, (10, 30_000)),
        (shortest_edge_crop, (30_000, 10)),
        (shortest_edge_crop, (1, 30_000)),
        (shortest_edge_crop, (30_000, 1)),
        (letterbox, (10, 30_000)),
        (letterbox, (30_000, 10)),
    ],
)
def test_a_long_strip_needs_no_more_memory_than_it_has(
    frame: Callable[[Tensor, int], Tensor], shape: tuple[int, int]
) -> None:
    """Resized as a whole it would pass through 672,000 x 224 pixels."""
    strip = torch.rand(1, 3, *shape)
    assert frame(strip, 224).shape == (1, 3, 224, 224)
    # The strip itself, or the square and the rows or columns that it is made of.
    assert largest(lambda: frame(strip, 224)) <= max(strip.numel(), 3 * 224 * 240)


def test_the_memory_meter_sees_what_a_whole_resize_takes() -> None:
    assert largest(lambda: naive_crop(torch.rand(1, 3, 10, 300), 224)) == 3 * 224 * 6720


def test_shrinking_further_than_torchs_kernel_can_is_the_same_resize() -> None:
    """On a GPU its kernel ends at about 90 times; on the CPU it has no end, and is the oracle."""
    image = torch.rand(1, 3, 5, 2100, generator=torch.Generator().manual_seed(2)).double()
    theirs = F.interpolate(image, (5, 16), mode="bicubic", antialias=True).clamp(0, 1)
    assert (resize_bicubic(image, 5, 16) - theirs).abs().max() <= 1e-12


SHAPES = [(10, 20), (20, 10), (30, 7), (9, 9), (301, 200), (173, 300), (224, 224)]


@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [16, 33, 224])
@pytest.mark.parametrize("shape", SHAPES)
def test_letterbox_is_the_authors_transform_of_a_float_tensor(
    shape: tuple[int, int], size: int, antialias: bool
) -> None:
    """HPSv2's ResizeMaxSize written in torchvision calls: resize unclamped, pad, then normalise."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    image = (torch.rand(3, *shape, generator=torch.Generator().manual_seed(3)) > 0.5).float()
    height, width = shape
    scale = size / float(max(height, width))
    theirs = image
    if scale != 1:
        new = [round(height * scale), round(width * scale)]
        bicubic = functional.InterpolationMode.BICUBIC
        theirs = functional.resize(image, new, bicubic, antialias=antialias)
        down, right = size - new[0], size - new[1]
        margins = [right // 2, down // 2, right - right // 2, down - down // 2]
        theirs = functional.pad(theirs, margins, fill=0)
    expected = functional.normalize(theirs, CLIP_MEAN, CLIP_STD)
    ours = normalise(letterbox(image[None], size, antialias=antialias))[0]
    assert (ours - expected).abs().max() <= 5e-5


def test_letterbox_overshoots_beside_hard_edges_as_the_authors_does() -> None:
    edges = torch.zeros(1, 3, 64, 64)
    edges[..., 20:44, 20:44] = 1
    boxed = letterbox(edges, 40)
    assert boxed.min() < -0.04 and boxed.max() > 1.04


def test_a_picture_that_is_as_long_as_the_square_is_padded_too() -> None:
    """The authors' code pads only what it resized: 224 x 100 fails there."""
    boxed = letterbox(torch.ones(1, 3, 224, 100), 224)
    assert boxed.shape == (1, 3, 224, 224)
    assert boxed[..., :62].eq(0).all() and boxed[..., 62:162].eq(1).all()


@pytest.mark.parametrize(
    ("shape", "size"), [((10, 20), 8), ((20, 10), 8), ((30, 7), 16), ((9, 9), 5), ((7, 16), 16)]
)
def test_letterbox_pads_black_and_keeps_the_ratio(shape: tuple[int, int], size: int) -> None:
    boxed = letterbox(torch.ones(1, 3, *shape), size)
    assert boxed.shape == (1, 3, size, size)
    rows, columns = (boxed[0, 0] > 0.5).any(1).sum(), (boxed[0, 0] > 0.5).any(0).sum()
    assert rows == round(shape[0] * size / max(shape))
    assert columns == round(shape[1] * size / max(shape))
    above = int((boxed[0, 0].sum(1) > 0).int().argmax())
    assert above == (size - int(rows)) // 2
    outside = boxed[0, 0].sum() - boxed[0, 0][boxed[0, 0] > 0.5].sum()
    assert outside == 0


def test_normalise_is_clips() -> None:
    image = torch.tensor(CLIP_MEAN).view(1, 3, 1, 1) + torch.tensor(CLIP_STD).view(1, 3, 1, 1)
    assert torch.allclose(normalise(image), torch.ones(1, 3, 1, 1))
