"""Cheap statistics of pictures, in which reward hacking shows before a person would look.

A policy that pleases its reward by erasing backgrounds loses edges and colours while the score
rises; one that paints everything in one loud colour gains saturation. None of these numbers says
what is good. Against their own values at the beginning of a run they say that something moved.

All are pure functions of float pixels [..., 3, H, W] in [0, 1] and return float32 [...], one number
per picture; a picture with a value that is not finite gets NaN. Nothing is shared between pictures,
so a number does not hang on the batch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EDGE_THRESHOLD = 0.1
"""Sobel magnitude from which a pixel is an edge; a step from black to white has magnitude 1."""

LEVELS = 8
"""Levels per colour channel of the histogram: 512 bins, at most 9 bits."""

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in brightness (ITU-R BT.601)."""


@dataclass(frozen=True)
class PictureStatistics:
    """One number per picture, float32 [...]: see the functions of the same names."""

    saturation: Tensor
    edge_density: Tensor
    colour_entropy: Tensor


def picture_statistics(pixels: Tensor) -> PictureStatistics:
    """All statistics of `pixels` [..., 3, H, W].

    Raises:
        ValueError: another shape.
    """
    clean, valid = _clean(pixels)
    return PictureStatistics(
        _known(_saturation(clean), valid),
        _known(_edge_density(clean, EDGE_THRESHOLD), valid),
        _known(_colour_entropy(clean, LEVELS), valid),
    )


def saturation(pixels: Tensor) -> Tensor:
    """Mean saturation of HSV, in [0, 1].

        S = (max - min) / max over the three channels, 0 where the pixel is black

    *Source:* Smith 1978, Color gamut transform pairs (as Python's `colorsys.rgb_to_hsv`).
    """
    clean, valid = _clean(pixels)
    return _known(_saturation(clean), valid)


def _saturation(clean: Tensor) -> Tensor:
    high, low = clean.amax(dim=-3), clean.amin(dim=-3)
    ratio = torch.where(high > 0, (high - low) / high.clamp_min(1e-12), torch.zeros_like(high))
    return ratio.mean(dim=(-2, -1))


def edge_density(pixels: Tensor, threshold: float = EDGE_THRESHOLD) -> Tensor:
    """Share of the pixels that lie on an edge, in [0, 1].

        magnitude = sqrt(Gx^2 + Gy^2) / 4,  Gx = [1 2 1]^T * [-1 0 1] of the brightness, Gy its turn

    The division by 4 makes a step of height h a magnitude of h. Borders repeat the last pixel, so a
    plain picture has no edges. *Source:* Sobel and Feldman 1968; the threshold is ours, a tenth of
    the strongest step.
    """
    clean, valid = _clean(pixels)
    return _known(_edge_density(clean, threshold), valid)


def _edge_density(clean: Tensor, threshold: float) -> Tensor:
    red, green, blue = clean.unbind(dim=-3)
    brightness = LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue
    flat = brightness.reshape(-1, 1, *brightness.shape[-2:])
    y = F.pad(flat, (1, 1, 1, 1), mode="replicate").reshape(
        *brightness.shape[:-2], brightness.shape[-2] + 2, brightness.shape[-1] + 2
    )
    # Slices, not a convolution: a sum of six numbers is the same whatever the batch.
    column = y[..., :-2, :] + 2 * y[..., 1:-1, :] + y[..., 2:, :]
    row = y[..., :, :-2] + 2 * y[..., :, 1:-1] + y[..., :, 2:]
    across = column[..., 2:] - column[..., :-2]
    down = row[..., 2:, :] - row[..., :-2, :]
    magnitude = (across.square() + down.square()).sqrt() / 4
    return (magnitude > threshold).float().mean(dim=(-2, -1))


def colour_entropy(pixels: Tensor, levels: int = LEVELS) -> Tensor:
    """Shannon entropy of a coarse colour histogram, in bits.

        H = - sum over bins of p log2 p,  p = share of the pixels in a bin of levels^3 equal cubes

    It lies in [0, min(3 log2 levels, log2 (H W))]; one plain colour has 0. *Source:* Shannon 1948.
    """
    clean, valid = _clean(pixels)
    return _known(_colour_entropy(clean, levels), valid)


def _colour_entropy(clean: Tensor, levels: int) -> Tensor:
    level = (clean * levels).int().clamp(0, levels - 1)
    red, green, blue = level.unbind(dim=-3)
    place = ((red * levels + green) * levels + blue).long()  # scatter_add_ takes no other
    place = place.reshape(-1, red.shape[-2] * red.shape[-1])
    counts = torch.zeros(len(place), levels**3, dtype=torch.long, device=place.device)
    counts.scatter_add_(1, place, torch.ones_like(place))
    share = counts.double() / place.shape[1]
    bits = torch.special.entr(share).sum(dim=1) / math.log(2)
    return bits.float().reshape(red.shape[:-2])


def _clean(pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Float32 pixels without NaN, and which pictures had none: bool [...]."""
    if pixels.ndim < 3 or pixels.shape[-3] != 3:
        raise ValueError(f"expected pixels [..., 3, H, W], got {list(pixels.shape)}")
    # A decoder may leave colours side by side, and every statistic reads them one at a time.
    values = pixels.detach().float().contiguous()
    # A maximum keeps a NaN, and one of the two an infinity; several times faster than isfinite.
    high, low = values.amax(dim=(-3, -2, -1)), values.amin(dim=(-3, -2, -1))
    valid = high.isfinite() & low.isfinite()
    return values.nan_to_num(0.0, 0.0, 0.0).clamp(0.0, 1.0), valid


def _known(values: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid, values, torch.full_like(values, math.nan))
