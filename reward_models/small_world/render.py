"""Drawing the small world: scenes with exact geometry, antialiased from signed distances.

All shapes of one ``radius`` cover the same area, pi radius^2, so that size and shape are
independent claims. Lengths are in pixels of a 64 x 64 picture and scale with the canvas.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from reward_models.small_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    Caption,
    Thing,
)

CANVAS = 64
RADII = {"small": (5.6, 6.6), "large": (9.6, 11.0)}
SIZE_BORDER = 8.0  # radius in pixels between small and large
ANCHORS = (16.0, 32.0, 48.0)
_GAP = 2.0
_MARGIN = 1.0

# Half extents (left-right, up, down) of a shape of radius 1 and area pi.
_SQUARE = np.sqrt(np.pi) / 2
_TRIANGLE_SIDE = np.sqrt(4 * np.pi / np.sqrt(3))
_CROSS_WIDTH = 0.36
_CROSS_LENGTH = np.sqrt(np.pi / (8 * _CROSS_WIDTH - 4 * _CROSS_WIDTH**2))
EXTENTS = {
    "circle": (1.0, 1.0, 1.0),
    "square": (_SQUARE, _SQUARE, _SQUARE),
    "triangle": (
        _TRIANGLE_SIDE / 2,
        _TRIANGLE_SIDE / np.sqrt(3),
        _TRIANGLE_SIDE / (2 * np.sqrt(3)),
    ),
    "cross": (_CROSS_LENGTH, _CROSS_LENGTH, _CROSS_LENGTH),
}

Colour = tuple[float, float, float]


@dataclass(frozen=True)
class Drawn:
    """One drawn object: what it is, its centroid (x, y) and radius in pixels, its RGB in [0, 1]."""

    shape: str
    x: float
    y: float
    radius: float
    rgb: Colour


@dataclass(frozen=True)
class Scene:
    """A picture's exact content."""

    things: tuple[Drawn, ...]
    background: Colour


def coverage(shape: str, x: float, y: float, radius: float, height: int, width: int) -> np.ndarray:
    """Share of each pixel that a shape covers: float64 [H, W] in [0, 1].

    Args:
        shape: one of ``SHAPES``; x, y: centroid in pixels; radius: of the circle of equal area.
    """
    dx = np.arange(width)[None, :] + 0.5 - x
    dy = np.arange(height)[:, None] + 0.5 - y
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        half = _SQUARE * radius
        distance = np.maximum(abs(dx) - half, abs(dy) - half)
    elif shape == "triangle":
        inradius = _TRIANGLE_SIDE * radius / (2 * np.sqrt(3))
        slanted = abs(dx) * (np.sqrt(3) / 2) - dy / 2
        distance = np.maximum(slanted, dy + 0 * dx) - inradius
    else:
        long, short = _CROSS_LENGTH * radius, _CROSS_LENGTH * _CROSS_WIDTH * radius
        upright = np.maximum(abs(dx) - short, abs(dy) - long)
        level = np.maximum(abs(dx) - long, abs(dy) - short)
        distance = np.minimum(upright, level)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, size: int = CANVAS) -> np.ndarray:
    """Draw a scene: float32 [3, size, size] in [0, 1]."""
    scale = size / CANVAS
    picture = np.empty((3, size, size))
    picture[:] = np.asarray(scene.background)[:, None, None]
    for thing in scene.things:
        x, y, radius = thing.x * scale, thing.y * scale, thing.radius * scale
        cover = coverage(thing.shape, x, y, radius, size, size)
        picture += cover * (np.asarray(thing.rgb)[:, None, None] - picture)
    return picture.astype(np.float32)


def shade(rgb: Colour, dark: float, pale: float) -> Colour:
    """A colour made darker (``dark`` in 0..1) and mixed with gray (``pale`` in 0..1)."""
    mixed = (1 - dark) * np.asarray(rgb)
    gray = mixed.mean()
    return tuple(float(v) for v in mixed + pale * (gray - mixed))  # type: ignore[return-value]


def random_scene(caption: Caption, rng: np.random.Generator) -> Scene:
    """One of the many scenes that a caption describes: places, radii and shades vary."""
    radii = [float(rng.uniform(*RADII[thing.size])) for thing in caption.things]
    if caption.relation is None:
        row, column = str(caption.position).split()
        x = ANCHORS[COLUMNS.index(column)] + rng.uniform(-3, 3)
        y = ANCHORS[ROWS.index(row)] + rng.uniform(-3, 3)
        places = [_inside(caption.things[0], radii[0], float(x), float(y))]
    else:
        places = _place_two(caption, radii, rng)
    things = []
    for thing, radius, (x, y) in zip(caption.things, radii, places, strict=True):
        rgb = shade(COLOURS[thing.colour], rng.uniform(0, 0.22), rng.uniform(0, 0.30))
        things.append(Drawn(thing.shape, x, y, radius, rgb))
    tint = rng.uniform(-0.03, 0.03, 3)
    background = np.clip(np.asarray(BACKGROUNDS[caption.background]) + tint, 0, 1)
    return Scene(tuple(things), tuple(float(v) for v in background))  # type: ignore[arg-type]


def _inside(thing: Thing, radius: float, x: float, y: float) -> tuple[float, float]:
    across, up, down = (extent * radius + _MARGIN for extent in EXTENTS[thing.shape])
    return (
        float(np.clip(x, across, CANVAS - across)),
        float(np.clip(y, up, CANVAS - down)),
    )


def _place_two(
    caption: Caption, radii: list[float], rng: np.random.Generator
) -> list[tuple[float, float]]:
    """Centres of two things so that they fit, do not touch, and stand in the said relation."""
    vertical = caption.relation in ("above", "below")
    first_leads = caption.relation in ("above", "left of")
    order = (0, 1) if first_leads else (1, 0)
    lead, trail = (caption.things[i] for i in order)
    lead_r, trail_r = (radii[i] for i in order)
    lead_across, lead_up, lead_down = (e * lead_r for e in EXTENTS[lead.shape])
    trail_across, trail_up, trail_down = (e * trail_r for e in EXTENTS[trail.shape])
    if vertical:
        start, between, end = lead_up, lead_down + trail_up, trail_down
    else:
        start, between, end = lead_across, lead_across + trail_across, trail_across
    spare = CANVAS - 2 * _MARGIN - _GAP - start - between - end
    before, extra = np.sort(rng.uniform(0, max(spare, 0.0), 2))
    lead_at = _MARGIN + start + before
    trail_at = lead_at + between + _GAP + (extra - before)
    middle = CANVAS / 2 + rng.uniform(-8, 8)
    along = {order[0]: lead_at, order[1]: trail_at}
    places = []
    for i in (0, 1):
        across = middle + rng.uniform(-3, 3)
        x, y = (across, along[i]) if vertical else (along[i], across)
        places.append(_inside(caption.things[i], radii[i], float(x), float(y)))
    return places
