"""Causal video VAEs as functions: (latent frames, what was before) -> (pixels, what comes after).

The VAEs of Wan, CogVideoX and EasyAnimate decode a clip in chunks of latent frames. What a chunk
needs of those before it are the last frames at every temporal convolution. diffusers keeps these
inside the module; here they are an explicit `Boundary`, so that a chunk can be computed again alone
and a gradient can leave it through its boundary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Boundary:
    """What one chunk leaves for the next.

    Args:
        tensors: the last frames at each convolution; they carry gradients.
        layout: the decoder's own structure, which says where each of them belongs.
    """

    tensors: tuple[Tensor, ...] = ()
    layout: Any = None


@dataclass(frozen=True)
class CausalRule:
    """One kind of causal VAE.

    Args:
        spans: (latent frames) -> the chunks (first, end), in which the VAE itself decodes.
        normalise: (vae, x [B, C, f, h, w]) -> the VAE's z.
        denormalise: the inverse, for encoding.
        step: (vae, z of one chunk, boundary or None at the start) -> pixels [B, 3, F, H, W] in
            [-1, 1] and the boundary after it.
    """

    spans: Callable[[int], list[tuple[int, int]]]
    normalise: Callable[[Any, Tensor], Tensor]
    denormalise: Callable[[Any, Tensor], Tensor]
    step: Callable[[Any, Tensor, Boundary | None], tuple[Tensor, Boundary]]


# --- Wan 2.1 -----------------------------------------------------------------------------------


def _single_spans(frames: int) -> list[tuple[int, int]]:
    """Wan and EasyAnimate: every latent frame is a chunk."""
    return [(i, i + 1) for i in range(frames)]


def _wan_normalise(vae: Any, x: Tensor) -> Tensor:
    mean, std = _wan_statistics(vae, x)
    return x * std + mean


def _wan_denormalise(vae: Any, z: Tensor) -> Tensor:
    mean, std = _wan_statistics(vae, z)
    return (z - mean) / std


def _wan_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    def spread(values: Any) -> Tensor:
        return like.new_tensor(values).view(1, -1, 1, 1, 1)

    return spread(vae.config.latents_mean), spread(vae.config.latents_std)


_HERE = object()
"""Stands in a layout where a tensor belongs."""


def _wan_step(vae: Any, z: Tensor, before: Boundary | None) -> tuple[Tensor, Boundary]:
    """One latent frame. The decoder reads and replaces a list with one entry per convolution."""
    hidden = vae.post_quant_conv(z)  # one frame wide: it needs nothing of its neighbours
    if before is None:
        caches: list[Any] = [None] * _causal_convolutions(vae.decoder)
        pixels = vae.decoder(hidden, feat_cache=caches, feat_idx=[0], first_chunk=True)
    else:
        tensors = iter(before.tensors)
        caches = [next(tensors) if entry is _HERE else entry for entry in before.layout]
        pixels = vae.decoder(hidden, feat_cache=caches, feat_idx=[0])
    kept = tuple(entry for entry in caches if isinstance(entry, Tensor))
    layout = [_HERE if isinstance(entry, Tensor) else entry for entry in caches]
    return pixels, Boundary(kept, layout)


def _causal_convolutions(decoder: Any) -> int:
    return sum(type(module).__name__ == "WanCausalConv3d" for module in decoder.modules())


# --- CogVideoX ---------------------------------------------------------------------------------

_UNREAD = ("conv_y", "conv_b")
"""Convolutions one frame wide: the decoder returns their whole input and never reads it."""


def _cogvideox_spans(frames: int) -> list[tuple[int, int]]:
    """Pairs of latent frames, of which the first takes the odd one in.

    Raises:
        ValueError: an even number, of which the VAE would make clips of another length.
    """
    if frames % 2 == 0:
        raise ValueError(f"{frames} latent frames: CogVideoX makes clips of an odd number of them")
    ends = [1] if frames == 1 else list(range(3, frames + 1, 2))
    return list(zip([0, *ends[:-1]], ends))


def _unscaled(vae: Any, x: Tensor) -> Tensor:
    """Of CogVideoX and EasyAnimate."""
    return x / vae.config.scaling_factor


def _scaled(vae: Any, z: Tensor) -> Tensor:
    return z * vae.config.scaling_factor


def _cogvideox_step(vae: Any, z: Tensor, before: Boundary | None) -> tuple[Tensor, Boundary]:
    """One chunk. The decoder takes and returns nested dictionaries, a tensor per convolution.

    Its group norms average over the frames of a chunk, so chunks must be the VAE's own.
    """
    hidden = z if vae.post_quant_conv is None else vae.post_quant_conv(z)
    caches = None if before is None else _nested(dict(zip(before.layout, before.tensors)))
    pixels, after = vae.decoder(hidden, conv_cache=caches)
    kept = {path: value for path, value in _flat(after) if path[-1] not in _UNREAD}
    return pixels, Boundary(tuple(kept.values()), tuple(kept))


def _flat(nested: Mapping[str, Any], prefix: tuple[str, ...] = ()) -> Iterator[Any]:
    for name, value in nested.items():
        if isinstance(value, Mapping):
            yield from _flat(value, (*prefix, name))
        elif value is not None:
            yield (*prefix, name), value


def _nested(flat: Mapping[tuple[str, ...], Tensor]) -> dict[str, Any]:
    root: dict[str, Any] = {}
    for path, value in flat.items():
        target = root
        for name in path[:-1]:
            target = target.setdefault(name, {})
        target[path[-1]] = value
    return root


# --- EasyAnimate (Magvit) ----------------------------------------------------------------------


def _magvit_step(vae: Any, z: Tensor, before: Boundary | None) -> tuple[Tensor, Boundary]:
    """One latent frame. Convolutions keep their last frames in themselves, and so are filled and
    emptied here; an upsampler only asks whether there was a frame before."""
    hidden = vae.post_quant_conv(z)  # one frame wide
    cells = [cell for cell in vae.decoder.modules() if hasattr(cell, "prev_features")]
    convolutions = [cell for cell in cells if hasattr(cell, "temporal_padding")]
    vae._clear_conv_cache()
    try:
        if before is not None:
            for cell in cells:
                cell.prev_features = hidden
            for cell, tensor in zip(convolutions, before.tensors, strict=True):
                cell.prev_features = tensor
        pixels = vae.decoder(hidden)
        return pixels, Boundary(tuple(cell.prev_features for cell in convolutions))
    finally:
        vae._clear_conv_cache()


CAUSAL: dict[str, CausalRule] = {
    "wan": CausalRule(_single_spans, _wan_normalise, _wan_denormalise, _wan_step),
    "cogvideox": CausalRule(_cogvideox_spans, _unscaled, _scaled, _cogvideox_step),
    "magvit": CausalRule(_single_spans, _unscaled, _scaled, _magvit_step),
}
