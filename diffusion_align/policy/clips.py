"""Clips from latents through a causal VAE, chunk by chunk, and the gradient back the same way.

The backward pass needs the boundary before every chunk. Keeping all of them grows with the clip,
so the clip is halved again and again: the later half first, from a boundary that is computed
without a graph, then the earlier half. At any time there is one chunk's graph and log2(n)
boundaries, for n/2 log2(n) further forwards without a graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint as run_checkpointed

from diffusion_align.policy.causal import Boundary, CausalRule


@dataclass(frozen=True)
class _Part:
    """Latent frames [start, stop) of one chunk, and which of its frames are wanted.

    `picks` are positions in the chunk's own frames, `offset` the place of the first in the result.
    """

    start: int
    stop: int
    picks: tuple[int, ...]
    offset: int


def decode_clips(
    rule: CausalRule,
    vae: Any,
    x: Tensor,
    *,
    ratio: int,
    frames: Sequence[int] | None,
    checkpoint: bool,
) -> Tensor:
    """Frames of clips; differentiable.

    Args:
        rule: of this VAE.
        vae: a diffusers autoencoder.
        x: float [B, C, f, h, w], latent frames on axis 2.
        ratio: frames per latent frame after the first.
        frames: latent frames whose pixels are wanted, ascending; None is all. What lies behind the
            last of them is not decoded; what lies before it must be.
        checkpoint: keep only boundaries for the backward pass, and compute each chunk again there.

    Returns:
        float32 [B, F, 3, H, W] in [0, 1] (float64 for a float64 VAE).

    Raises:
        ValueError: frames that are not there, or not ascending.
    """
    before: Boundary | None = None
    shown: list[Tensor] = []
    for part in _parts(rule, x.shape[2], ratio, frames):
        latent = x[:, :, part.start : part.stop]
        if checkpoint and torch.is_grad_enabled():
            pixels, before = _recomputed(rule, vae, latent, before, part)
        else:
            pixels, before = _forward(rule, vae, latent, before, part)
        if part.picks:
            shown.append(pixels)
    return torch.cat(shown, dim=1)


def clips_gradient(
    rule: CausalRule,
    vae: Any,
    x: Tensor,
    pixel_gradient: Tensor,
    *,
    ratio: int,
    frames: Sequence[int] | None,
) -> Tensor:
    """dL/dx of a loss on `decode_clips(x)`, with one chunk's graph at a time.

    Args:
        rule, vae, x, ratio, frames: as there.
        pixel_gradient: dL/dpixels, [B, F, 3, H, W] as there.

    Returns:
        [B, C, f, h, w] in x's dtype.
    """
    parts = _parts(rule, x.shape[2], ratio, frames)
    result = torch.zeros_like(x)

    def back(
        low: int, high: int, before: Boundary | None, behind: Sequence[Tensor | None]
    ) -> Sequence[Tensor | None]:
        """Chunks [low, high): from dL/d(boundary behind them) to dL/d(boundary before them)."""
        if high - low == 1:
            part = parts[low]
            span = slice(part.start, part.stop)
            wanted = pixel_gradient[:, part.offset : part.offset + len(part.picks)]
            result[:, :, span], onwards = _pulled(
                rule, vae, x[:, :, span], before, part, wanted, behind
            )
            return onwards
        middle = (low + high) // 2
        reached = before
        with torch.no_grad():
            for part in parts[low:middle]:
                _, reached = _forward(rule, vae, x[:, :, part.start : part.stop], reached, part)
        behind = back(middle, high, reached, behind)
        del reached
        return back(low, middle, before, behind)

    back(0, len(parts), None, ())
    return result


def _forward(
    rule: CausalRule, vae: Any, latent: Tensor, before: Boundary | None, part: _Part
) -> tuple[Tensor, Boundary]:
    """The wanted frames of one chunk, [B, F, 3, H, W] in [0, 1], and the boundary behind it."""
    pixels, after = rule.step(vae, rule.normalise(vae, latent).to(vae.dtype), before)
    if len(part.picks) < pixels.shape[2]:
        pixels = pixels[:, :, list(part.picks)]
    pixels = pixels.to(torch.promote_types(pixels.dtype, torch.float32)).transpose(1, 2)
    return (pixels * 0.5 + 0.5).clamp(0.0, 1.0), after


def _recomputed(
    rule: CausalRule, vae: Any, latent: Tensor, before: Boundary | None, part: _Part
) -> tuple[Tensor, Boundary]:
    layouts: list[Any] = []

    def run(latent: Tensor, *tensors: Tensor) -> tuple[Tensor, ...]:
        given = None if before is None else Boundary(tensors, before.layout)
        pixels, after = _forward(rule, vae, latent, given, part)
        layouts.append(after.layout)
        return (pixels, *after.tensors)

    given = () if before is None else before.tensors
    pixels, *tensors = run_checkpointed(run, latent, *given, use_reentrant=False)
    return pixels, Boundary(tuple(tensors), layouts[0])


def _pulled(
    rule: CausalRule,
    vae: Any,
    latent: Tensor,
    before: Boundary | None,
    part: _Part,
    wanted: Tensor,
    behind: Sequence[Tensor | None],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """One chunk's vector-Jacobian product: to its latent frames and to the boundary before it."""
    leaf = latent.detach().requires_grad_()
    given: tuple[Tensor, ...] = ()
    if before is not None:
        given = tuple(tensor.detach().requires_grad_() for tensor in before.tensors)
        before = Boundary(given, before.layout)
    with torch.enable_grad():
        pixels, after = _forward(rule, vae, leaf, before, part)
    pairs = [(pixels, wanted.to(pixels))] if part.picks else []
    pairs += [(out, g) for out, g in zip(after.tensors, behind) if g is not None]
    pairs = [(out, g) for out, g in pairs if out.requires_grad]
    if not pairs:
        return torch.zeros_like(latent), [None] * len(given)
    outputs, gradients = zip(*pairs)
    found = torch.autograd.grad(outputs, (leaf, *given), gradients, allow_unused=True)
    own = torch.zeros_like(latent) if found[0] is None else found[0]
    return own, found[1:]


def _parts(
    rule: CausalRule, count: int, ratio: int, frames: Sequence[int] | None
) -> tuple[_Part, ...]:
    """The chunks up to the last one that holds a wanted latent frame."""
    wanted = list(range(count)) if frames is None else list(frames)
    inside = bool(wanted) and wanted[0] >= 0 and wanted[-1] < count
    if not inside or wanted != sorted(set(wanted)):
        raise ValueError(f"latent frames {wanted} are not ascending within 0 ... {count - 1}")
    parts: list[_Part] = []
    offset = 0
    for start, stop in rule.spans(count):
        if start > wanted[-1]:
            break
        picks = tuple(
            pixel for i in wanted if start <= i < stop for pixel in _own_frames(i, start, ratio)
        )
        parts.append(_Part(start, stop, picks, offset))
        offset += len(picks)
    return tuple(parts)


def _own_frames(i: int, start: int, ratio: int) -> range:
    """Positions, among the frames of the chunk from `start`, of those of latent frame i."""
    if i == 0:
        return range(1)
    first = (i - start) * ratio if start else 1 + (i - 1) * ratio
    return range(first, first + ratio)
