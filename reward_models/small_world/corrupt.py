"""Spoiling a render in the ways that generated pictures are spoilt.

Each spoiled picture draws one to three faults: blur, grain, a wash towards gray, a colour cast,
stray specks, a ragged outline. The strengths are continuous, so that ratings spread over the scale.
"""

from __future__ import annotations

import numpy as np

_FAULTS = ("blur", "grain", "wash", "cast", "specks", "ragged")


def corrupt(picture: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A spoiled copy, float32 [3, H, W] in [0, 1], of a picture of the same kind."""
    spoiled = picture.astype(np.float64)
    for fault in rng.choice(_FAULTS, size=int(rng.integers(1, 4)), replace=False):
        spoiled = _apply(str(fault), spoiled, rng.uniform(0.1, 1.0), rng)
    return np.clip(spoiled, 0, 1).astype(np.float32)


def _apply(
    fault: str, picture: np.ndarray, strength: float, rng: np.random.Generator
) -> np.ndarray:
    from scipy import ndimage  # half a second, which captions alone need not pay

    height, width = picture.shape[1:]
    if fault == "blur":
        return ndimage.gaussian_filter(picture, (0, 2.5 * strength, 2.5 * strength))
    if fault == "grain":
        noise = ndimage.gaussian_filter(rng.normal(size=picture.shape), (0, 0.7, 0.7))
        return picture + 0.25 * strength * noise
    if fault == "wash":
        return picture + 0.5 * strength * (picture.mean() - picture)
    if fault == "cast":
        return picture + 0.15 * strength * rng.uniform(-1, 1, 3)[:, None, None]
    if fault == "specks":
        for _ in range(int(1 + 5 * strength)):
            y, x = rng.uniform(0, height), rng.uniform(0, width)
            near = np.hypot(np.arange(height)[:, None] - y, np.arange(width) - x)
            cover = np.clip(rng.uniform(1.0, 3.5) - near, 0, 1) * rng.uniform(0.3, 1.0)
            picture = picture + cover * (rng.uniform(0, 1, 3)[:, None, None] - picture)
        return picture
    # Ragged: every pixel is fetched from a place displaced by a smooth random field.
    fields = [ndimage.gaussian_filter(rng.normal(size=(height, width)), 2.0) for _ in range(2)]
    grid = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    places = [g + 12 * strength * f for g, f in zip(grid, fields, strict=True)]
    planes = [ndimage.map_coordinates(p, places, order=1, mode="nearest") for p in picture]
    return np.stack(planes)
