"""How much moves between two frames: Lucas and Kanade's displacement, in closed form.

In a window around each pixel the displacement d that best explains the change between two frames
solves a 2 x 2 system, A d = -b, with A = cov(grad I, grad I) + regularisation and b = cov(grad I,
I_t). Covariances instead of sums of products make a change of brightness in the window invisible.
From coarse to fine, both frames are warped half way towards each other by what is known already,
so that interpolation blurs them alike.

What counts is only *explained* displacement: |d| times how far, beyond one half, the warp removes
the change's variance in the window. Flickering light and independent noise move nothing: no
displacement explains them. (Two unrelated pictures still show some: see the tests for figures.)

Source: Lucas and Kanade 1981; the pyramid is Bouguet's (2000). Measuring on a small grey copy is
our choice, as are the covariances and the explained share. Every step is differentiable.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

# The longer side of the grey copy, the levels of its pyramid, and the window, in pixels.
SIDE = 64
LEVELS = 4
SMALLEST = 6
WINDOW = 9
LUMA = (0.299, 0.587, 0.114)

# Variances of 8-bit pixels in [0, 1]: gradients that are no texture, changes that are no motion.
_FLAT = 1e-4
_STILL = 2e-5


def grey_copy(frames: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] in [0, 1] as luma [N, 1, h, w], the longer side at most `SIDE`."""
    frames = frames.float() if frames.dtype in (torch.float16, torch.bfloat16) else frames
    grey = (frames * frames.new_tensor(LUMA).view(3, 1, 1)).sum(dim=1, keepdim=True)
    height, width = grey.shape[-2:]
    scale = SIDE / max(height, width)
    if scale >= 1:
        return grey
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return F.interpolate(grey, size=size, mode="bilinear", antialias=True, align_corners=False)


def displacement(before: Tensor, after: Tensor) -> Tensor:
    """Mean explained displacement between grey pictures, as a share of their diagonal.

    Args:
        before, after: float [N, 1, h, w] in [0, 1], of `grey_copy`.

    Returns:
        [N], at least 0, about 0 for what stands still. True to a tenth for textured pictures that
        move by 0.5 to 6 % of the diagonal; slower motion reads low, down to 0 below 0.1 %, and
        from about 10 % on it is not followed.
    """
    flow = _flow(before, after)
    change = after - before
    rest = _warp(after, flow / 2) - _warp(before, -flow / 2)
    explained = 1 - (_covariance(rest, rest) + _STILL) / (_covariance(change, change) + _STILL)
    certain = 2 * F.relu(explained - 0.5)
    # The length of a vector has no gradient at zero; this one is smooth, and zero there.
    length = (flow.square().sum(dim=1, keepdim=True) + 1e-6).sqrt() - 1e-3
    return (length * certain).mean(dim=(1, 2, 3)) / math.hypot(*before.shape[-2:])


def _flow(before: Tensor, after: Tensor) -> Tensor:
    """Displacements [N, 2, h, w] in pixels, x first: after(p + d / 2) = before(p - d / 2)."""
    pyramid = [(before, after)]
    while len(pyramid) < LEVELS and min(pyramid[-1][0].shape[-2:]) >= 2 * SMALLEST:
        coarse = [F.avg_pool2d(picture, 2) for picture in pyramid[-1]]
        pyramid.append((coarse[0], coarse[1]))
    flow = before.new_zeros(len(before), 2, *pyramid[-1][0].shape[-2:])
    for first, second in reversed(pyramid):
        height, width = first.shape[-2:]
        if flow.shape[-2:] != (height, width):
            ratio = flow.new_tensor([width / flow.shape[-1], height / flow.shape[-2]])
            flow = F.interpolate(flow, size=(height, width), mode="bilinear", align_corners=False)
            flow = flow * ratio.view(2, 1, 1)
        flow = flow + _step(_warp(first, -flow / 2), _warp(second, flow / 2))
    return flow


def _step(before: Tensor, after: Tensor) -> Tensor:
    """One closed-form solution [N, 2, h, w] around every pixel."""
    change = after - before
    right, down = _gradient((before + after) / 2)
    xx = _covariance(right, right) + _FLAT
    yy = _covariance(down, down) + _FLAT
    xy = _covariance(right, down)
    xt, yt = _covariance(right, change), _covariance(down, change)
    # The determinant is at least about _FLAT squared, by Cauchy and Schwarz.
    return torch.cat([xy * yt - yy * xt, xy * xt - xx * yt], dim=1) / (xx * yy - xy * xy)


def _warp(pictures: Tensor, flow: Tensor) -> Tensor:
    """Pictures [N, 1, h, w] read at p + flow(p); beyond the border the border goes on."""
    height, width = pictures.shape[-2:]
    x = torch.arange(width, dtype=flow.dtype, device=flow.device) + flow[:, 0]
    y = torch.arange(height, dtype=flow.dtype, device=flow.device)[:, None] + flow[:, 1]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    return F.grid_sample(
        pictures, grid, mode="bilinear", padding_mode="border", align_corners=False
    )


def _gradient(pictures: Tensor) -> tuple[Tensor, Tensor]:
    """Central differences to the right and down."""
    padded = F.pad(pictures, (1, 1, 1, 1), mode="replicate")
    right = (padded[..., 1:-1, 2:] - padded[..., 1:-1, :-2]) / 2
    down = (padded[..., 2:, 1:-1] - padded[..., :-2, 1:-1]) / 2
    return right, down


def _covariance(one: Tensor, other: Tensor) -> Tensor:
    """Covariance in the window around each pixel, cut at the border."""

    def mean(picture: Tensor) -> Tensor:
        return F.avg_pool2d(picture, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    return mean(one * other) - mean(one) * mean(other)
