"""From pictures in [0, 1] to what a tower eats: the one resize, crop, letterbox and normalise.

Published scorers were trained on Pillow's uint8 bicubic resize, which filters the width, rounds
and clamps, then filters the height, rounds and clamps. `resize_bicubic` does the same passes in
floating point and clamps after each, which is differentiable and at most one uint8 level away;
one unclamped 2-d pass is up to 17 levels away, a bilinear one 26. The parity mode
`round_to_uint8` does Pillow's own integer arithmetic and gives the very same levels; the gradient
passes straight through. (So did every Pillow before 13, with which the published scores were made.
Pillow 13 begins with the height where that is quicker, which it is for portraits taller than about
2:1: there its levels differ from those of all earlier versions, and from ours, by up to 25.)

HPS is the exception: its authors resize a float tensor, unclamped, so `letterbox` does that.

The clamp has a price: where bicubic overshoots [0, 1] the gradient is zero, as it should be for a
picture that cannot get any brighter.

Only what a crop keeps of a long strip is ever computed: 30,000 x 10 pixels would become
672,000 x 224 on the way to 224 x 224.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

# Up to this ratio of the sides it is quicker to resize the whole picture and to cut afterwards.
STRIP_RATIO = 4
# torch's antialiased CUDA kernel runs out of shared memory when it shrinks more than about 90 times
# (pytorch/vision issue 7671), so from here on the taps are summed one by one, on every device.
KERNEL_SHRINKS = 64
# Pillow keeps the weights of its taps as multiples of 2**-22 (Resample.c, PRECISION_BITS).
PILLOW_STEPS = 2**22


def resize_bicubic(
    images: Tensor, height: int, width: int, *, round_to_uint8: bool = False
) -> Tensor:
    """Antialiased bicubic resize in two clamped passes, width first.

    Args:
        images: float [B, 3, H, W] in [0, 1]; half precision is computed (and returned) in float32,
            because the CPU has no such kernel.
        round_to_uint8: as Pillow does, round the picture to 8-bit levels, and again after each
            pass; computed in float64, where its integers are exact.

    Returns:
        [B, 3, height, width] in [0, 1], float32 (float64 stays float64).
    """
    images = _at_least_float32(images)
    if round_to_uint8:
        across = _taps(images.shape[-1], width, 0, width)
        return _resize_as_pillow(images, across, _taps(images.shape[-2], height, 0, height))
    for axis, size in ((-1, width), (-2, height)):
        if images.shape[axis] != size:
            images = _resize_axis(images, axis, size).clamp(0, 1)
    return images


def shortest_edge_crop(images: Tensor, size: int, *, round_to_uint8: bool = False) -> Tensor:
    """Resize the shorter side to `size`, then cut the central square: CLIP's preprocessing.

    Rounding of sizes and margins is torchvision's (the long side is cut down, half a pixel of
    margin rounds to even), which the published scores were made with.

    Returns:
        [B, 3, size, size] in [0, 1].
    """
    height, width = images.shape[-2:]
    if max(height, width) > STRIP_RATIO * min(height, width):
        return _crop_strip(_at_least_float32(images), size, round_to_uint8)
    if height <= width:
        new_height, new_width = size, size * width // height
    else:
        new_height, new_width = size * height // width, size
    resized = resize_bicubic(images, new_height, new_width, round_to_uint8=round_to_uint8)
    top, left = _margin(new_height, size), _margin(new_width, size)
    return resized[..., top : top + size, left : left + size]


def letterbox(images: Tensor, size: int, *, antialias: bool = True) -> Tensor:
    """Resize the longer side to `size` and centre the picture on a black square: HPS's way.

    As in the authors' code the pixels are a float tensor when they are resized, so nothing is
    clamped or rounded: beside hard edges the result overshoots [0, 1] by up to 0.2. Padding comes
    before the normalisation, so the bars are black, not grey.

    Source: HPSv2 `open_clip/transform.py` (ResizeMaxSize). We differ where that fails: strips of
    more than 2 * size to 1, whose shorter side rounds to no pixel at all, get one; a picture whose
    longer side is `size` already is padded too.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        antialias: filter what is made smaller. The authors' code does not say; torchvision's
            default for tensors was off until 0.17 and is on since, and published numbers were made
            with either.

    Returns:
        [B, 3, size, size]; the odd pixel of an odd margin goes right and below.
    """
    images = _at_least_float32(images)
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    if not antialias:
        images = F.interpolate(images, size=(new_height, new_width), mode="bicubic")
    else:
        for axis, length in ((-1, new_width), (-2, new_height)):
            if images.shape[axis] != length:
                images = _resize_axis(images, axis, length)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return F.pad(images, (left, size - new_width - left, top, size - new_height - top))


def normalise(
    images: Tensor,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> Tensor:
    """(images - mean) / std per channel of [B, 3, H, W]."""
    shape = (1, 3, 1, 1)
    return (images - images.new_tensor(mean).view(shape)) / images.new_tensor(std).view(shape)


def clip_pixels(images: Tensor, size: int, *, round_to_uint8: bool = False) -> Tensor:
    """What a CLIP image tower takes: shortest edge, centre crop, CLIP mean and deviation.

    Args:
        images: float [B, 3, H, W] in [0, 1].
        size: the tower's input side.
    """
    return normalise(shortest_edge_crop(images, size, round_to_uint8=round_to_uint8))


def _crop_strip(images: Tensor, size: int, round_to_uint8: bool) -> Tensor:
    """`shortest_edge_crop` of a long strip, computing nothing outside the square it keeps."""
    height, width = images.shape[-2:]
    if width > height:
        long, long_size = -1, size * width // height
    else:
        long, long_size = -2, size * height // width
    start = _margin(long_size, size)
    kept = _taps(images.shape[long], long_size, start, start + size)
    first, last = int(kept.index.min()), int(kept.index.max())
    images = images.narrow(long, first, last - first + 1)
    kept = _Taps(kept.index - first, kept.weight)
    if round_to_uint8:
        short = _taps(min(height, width), size, 0, size)
        across, down = (kept, short) if long == -1 else (short, kept)
        return _resize_as_pillow(images, across, down)
    for axis in (-1, -2):  # Pillow's order, which the clamp between the passes makes matter
        if axis == long:
            images = _sum_taps(images, axis, kept).clamp(0, 1)
        elif images.shape[axis] != size:
            images = _resize_axis(images, axis, size).clamp(0, 1)
    return images


def _margin(length: int, size: int) -> int:
    return round((length - size) / 2)


def _resize_axis(images: Tensor, axis: int, size: int) -> Tensor:
    """One antialiased bicubic pass along an axis (-1 or -2), not clamped."""
    length = images.shape[axis]
    if length > KERNEL_SHRINKS * size:
        return _sum_taps(images, axis, _taps(length, size, 0, size))
    shape = (images.shape[-2], size) if axis == -1 else (size, images.shape[-1])
    return F.interpolate(images, size=shape, mode="bicubic", align_corners=False, antialias=True)


@dataclass(frozen=True)
class _Taps:
    """Which source pixels make each output pixel: index int64 [T, N], weight float64 [T, N]."""

    index: Tensor
    weight: Tensor


def _taps(length: int, size: int, start: int, stop: int) -> _Taps:
    """The taps of output pixels [start, stop) when `length` pixels become `size`.

    Keys' cubic with a = -1/2, stretched by the factor that the picture shrinks by; pixels beyond
    the edge have no weight. Both as in Pillow and in torch's antialiased kernel.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    centre = (torch.arange(start, stop, dtype=torch.float64) + 0.5) * scale
    first = (centre - 2 * stretch).floor().long()
    index = first + torch.arange(math.ceil(4 * stretch) + 1)[:, None]
    x = ((index + 0.5 - centre) / stretch).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weight = torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
    weight = torch.where((index >= 0) & (index < length), weight, 0.0)
    return _Taps(index.clamp(0, length - 1), weight / weight.sum(dim=0))


def _sum_taps(images: Tensor, axis: int, taps: _Taps) -> Tensor:
    """The weighted sum of taps along an axis; at no time more than N pixels of it in memory."""
    # Not a matrix product: autocast and TF32 would compute that in ten bits.
    weights = taps.weight.to(images.device, images.dtype)
    if axis == -2:
        weights = weights[:, :, None]
    total = torch.zeros((), dtype=images.dtype, device=images.device)
    for index, weight in zip(taps.index.to(images.device), weights, strict=True):
        total = total + images.index_select(axis, index) * weight
    return total


def _resize_as_pillow(images: Tensor, across: _Taps, down: _Taps) -> Tensor:
    """Pillow's uint8 resize, level by level, with a gradient that knows nothing of the rounding."""
    levels = _straight_through((images.double() * 255).clamp(0, 255), torch.round)
    for axis, taps in ((-1, across), (-2, down)):
        steps = (taps.weight.abs() * PILLOW_STEPS + 0.5).floor() * taps.weight.sign()
        weights = steps.new_zeros(steps.shape[1], levels.shape[axis])
        weights = weights.scatter_add_(1, taps.index.T, steps.T).to(levels.device)
        # Whole numbers below 2**53 in float64: products of matrices are exact here, in any order.
        total = levels @ weights.T if axis == -1 else weights @ levels
        values = (total / PILLOW_STEPS).clamp(0, 255)
        levels = _straight_through(values, lambda x: (x + 0.5).floor().clamp(max=255))
    return (levels / 255).to(images.dtype)


def _straight_through(values: Tensor, rounded: Callable[[Tensor], Tensor]) -> Tensor:
    """Exactly `rounded(values)`, with the gradient of `values`."""
    return rounded(values.detach()) + (values - values.detach())


def _at_least_float32(images: Tensor) -> Tensor:
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
