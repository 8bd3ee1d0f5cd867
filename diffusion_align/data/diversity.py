"""How different one prompt's samples are from each other.

A tuned model that always draws the same picture can score high and still be worse; a fall of this
number beside a rise of the trained reward is the plainest sign of it. With samples s_1 ... s_S of
one prompt:

    pixel space:    d(i, j) = root mean square of s_i - s_j over colours and positions, in [0, 1]
    feature space:  d(i, j) = 1 - cosine(f_i, f_j), in [0, 2]
    diversity       = mean of d(i, j) over the S (S - 1) / 2 pairs

Pixel distance needs no model and sees colour and layout; it is blind to meaning. A feature
extractor, where one is given, sees meaning.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    # pixels float [B, 3, H, W] in [0, 1] -> features [B, D]
    Features = Callable[[Tensor], Tensor]

PIXEL_SPACE = "pixel space, RMS distance (0 to 1)"
FEATURE_SPACE = "feature space, cosine distance (0 to 2)"


def pixel_diversity(samples: Tensor) -> float:
    """Mean pairwise RMS distance of `samples` float `[S, ...]` in [0, 1]; NaN below two.

    Samples with a value that is not finite take no part.
    """
    flat = _finite(samples)
    # Differences, not a Gram matrix: equal pictures must be exactly 0 apart in float32.
    squares = [(flat[i + 1 :] - flat[i]).square().mean(dim=1).sqrt() for i in range(len(flat) - 1)]
    return _mean(squares)


def feature_diversity(features: Tensor) -> float:
    """Mean pairwise cosine distance of `features` float `[S, D]`; NaN below two."""
    flat = _finite(features)
    unit = flat / flat.norm(dim=1, keepdim=True).clamp_min(1e-12)
    distances = [(1.0 - unit[i + 1 :] @ unit[i]).clamp_min(0.0) for i in range(len(unit) - 1)]
    return _mean(distances)


def diversity(samples: Tensor, features: Features | None = None) -> float:
    """Diversity of one prompt's `samples` float `[S, 3, H, W]` in [0, 1], in either space."""
    return pixel_diversity(samples) if features is None else feature_diversity(features(samples))


def _finite(samples: Tensor) -> Tensor:
    flat = samples.detach().float().flatten(1)
    # As in picture_statistics: several times faster than asking every value.
    return flat[flat.amax(dim=1).isfinite() & flat.amin(dim=1).isfinite()]


def _mean(distances: list[Tensor]) -> float:
    import torch

    return float(torch.cat(distances).mean()) if distances else float("nan")
