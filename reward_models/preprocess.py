"""From pictures in [0, 1] to what a tower eats: the one resize, crop, letterbox and normalise.

Published scorers were trained on Pillow's uint8 bicubic resize, which filters the width, rounds
and clamps, then filters the height, rounds and clamps. `resize_bicubic` does the same passes in
floating point and clamps after each, which is differentiable and at most one uint8 level away;
one unclamped 2-d pass is up to 17 levels away, a bilinear one 26. The parity mode
`round_to_uint8` also rounds, and passes the gradient straight through.
(Pillow 13 begins with the height where that shrinks much more than the width. Resizes that keep
the ratio, as all below, are not touched by this.)

The clamp has a price: where bicubic overshoots [0, 1] the gradient is zero, as it should be for a
picture that cannot get any brighter.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def resize_bicubic(
    images: Tensor, height: int, width: int, *, round_to_uint8: bool = False
) -> Tensor:
    """Antialiased bicubic resize in two clamped passes, width first.

    Args:
        images: float [B, 3, H, W] in [0, 1]; half precision is computed (and returned) in float32,
            because the CPU has no such kernel.
        round_to_uint8: round to multiples of 1/255 after each pass, as Pillow does.

    Returns:
        [B, 3, height, width] in [0, 1], float32 (float64 stays float64).
    """
    images = _at_least_float32(images)
    if images.shape[-1] != width:
        images = _one_pass(images, (images.shape[-2], width), round_to_uint8)
    if images.shape[-2] != height:
        images = _one_pass(images, (height, width), round_to_uint8)
    return images


def shortest_edge_crop(images: Tensor, size: int, *, round_to_uint8: bool = False) -> Tensor:
    """Resize the shorter side to `size`, then cut the central square: CLIP's preprocessing.

    Rounding of sizes and margins is torchvision's (the long side is cut down, half a pixel of
    margin rounds to even), which the published scores were made with.

    Returns:
        [B, 3, size, size] in [0, 1].
    """
    height, width = images.shape[-2:]
    if height <= width:
        new_height, new_width = size, size * width // height
    else:
        new_height, new_width = size * height // width, size
    resized = resize_bicubic(images, new_height, new_width, round_to_uint8=round_to_uint8)
    top, left = round((new_height - size) / 2), round((new_width - size) / 2)
    return resized[..., top : top + size, left : left + size]


def letterbox(images: Tensor, size: int, *, round_to_uint8: bool = False) -> Tensor:
    """Resize the longer side to `size` and centre the picture on a black square: HPS's way.

    Returns:
        [B, 3, size, size] in [0, 1]; the odd pixel of an odd margin goes right and below.
    """
    height, width = images.shape[-2:]
    scale = size / max(height, width)
    new_height, new_width = max(1, round(height * scale)), max(1, round(width * scale))
    resized = resize_bicubic(images, new_height, new_width, round_to_uint8=round_to_uint8)
    left, top = (size - new_width) // 2, (size - new_height) // 2
    return F.pad(resized, (left, size - new_width - left, top, size - new_height - top))


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


def _one_pass(images: Tensor, shape: tuple[int, int], round_to_uint8: bool) -> Tensor:
    resized = F.interpolate(
        images, size=shape, mode="bicubic", align_corners=False, antialias=True
    ).clamp(0, 1)
    if round_to_uint8:
        rounded = (resized.detach() * 255).round() / 255
        resized = resized + (rounded - resized.detach())
    return resized


def _at_least_float32(images: Tensor) -> Tensor:
    return images.float() if images.dtype in (torch.float16, torch.bfloat16) else images
