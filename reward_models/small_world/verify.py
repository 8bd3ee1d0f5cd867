"""Reading a picture back: which claims of its caption hold.

The reader knows nothing of the caption: it finds the background from the border, cuts what stands
out into one-coloured pieces, and tells each piece's shape by comparing its soft outline with drawn
shapes of the same area. Only then are the claims compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import permutations

import numpy as np

from reward_models.small_world.grammar import (
    BACKGROUNDS,
    COLOURS,
    COLUMNS,
    ROWS,
    SHAPES,
    Caption,
    Thing,
    parse_caption,
)
from reward_models.small_world.render import CANVAS, SIZE_BORDER, Drawn, Scene, coverage, shade

_STANDS_OUT = 0.17  # RGB distance from the background, in [0, sqrt 3]
_SMALLEST_PIECE = 24  # pixels of a 64 x 64 picture: a quarter of the smallest object
_MOST_PIECES = 6


@dataclass(frozen=True)
class Reading:
    """What a picture shows: a background name and the pieces found, largest first."""

    background: str
    pieces: tuple[Thing, ...]
    scene: Scene  # the same with exact geometry and the picture's own colours


@dataclass(frozen=True)
class Claims:
    """Which claims of a caption hold in a picture."""

    held: Mapping[str, bool] = field(default_factory=dict)

    @property
    def strict(self) -> bool:
        """Every claim holds."""
        return all(self.held.values())

    @property
    def fraction(self) -> float:
        """Share of the claims that hold, in [0, 1]."""
        return sum(self.held.values()) / len(self.held)


@cache
def _shades() -> tuple[np.ndarray, list[str]]:
    """Reference shades [n, 3] of every colour word and their names."""
    rows, names = [], []
    for name, rgb in COLOURS.items():
        for dark in (0.0, 0.12, 0.24):
            for pale in (0.0, 0.16, 0.32):
                rows.append(shade(rgb, dark, pale))
                names.append(name)
    return np.asarray(rows), names


def _nearest_colour(rgb: np.ndarray) -> np.ndarray:
    """Index into ``COLOURS`` of the nearest colour word for pixels [n, 3]."""
    shades, names = _shades()
    words = np.asarray([list(COLOURS).index(name) for name in names])
    distance = (shades**2).sum(1)[None] - 2 * rgb @ shades.T
    return words[distance.argmin(1)]


def as_picture(image: object) -> np.ndarray:
    """float64 [3, H, W] in [0, 1] from an array or tensor; refuses any other shape.

    Raises:
        ValueError: not three colour planes, or not finite.
    """
    detached = image.detach().cpu() if hasattr(image, "detach") else image
    picture = np.asarray(detached, dtype=np.float64)
    if picture.ndim != 3 or picture.shape[0] != 3:
        raise ValueError(f"a picture is [3, H, W]; this one is {list(picture.shape)}")
    if not np.isfinite(picture).all():
        raise ValueError("the picture holds NaN or infinite pixels")
    return np.clip(picture, 0.0, 1.0)


def read_scene(image: object) -> Reading:
    """Read a picture [3, H, W] in [0, 1] without knowing its caption."""
    picture = as_picture(image)
    height, width = picture.shape[1:]
    scale = min(height, width) / CANVAS
    background = _border_colour(picture)
    names = list(BACKGROUNDS)
    distances = [np.linalg.norm(background - np.asarray(BACKGROUNDS[n])) for n in names]
    found = _pieces(picture, background, scale)
    drawn = [_measure(picture, background, mask) for mask in found]
    things = tuple(
        Thing(
            "small" if item.radius < SIZE_BORDER * scale else "large",
            list(COLOURS)[int(_nearest_colour(np.asarray([item.rgb]))[0])],
            item.shape,
        )
        for item in drawn
    )
    scene = Scene(tuple(drawn), tuple(float(v) for v in background))  # type: ignore[arg-type]
    return Reading(names[int(np.argmin(distances))], things, scene)


def _border_colour(picture: np.ndarray) -> np.ndarray:
    edges = (picture[:, :2], picture[:, -2:], picture[:, :, :2], picture[:, :, -2:])
    rim = np.concatenate([edge.reshape(3, -1) for edge in edges], axis=1)
    return np.median(rim, axis=1)


def _pieces(picture: np.ndarray, background: np.ndarray, scale: float) -> list[np.ndarray]:
    """Boolean masks [H, W] of the one-coloured pieces that stand out, largest first."""
    from scipy import ndimage  # half a second, which captions alone need not pay

    away = np.sqrt(((picture - background[:, None, None]) ** 2).sum(0))
    stands_out = away > _STANDS_OUT
    if not stands_out.any():
        return []
    words = np.full(away.shape, -1)
    words[stands_out] = _nearest_colour(picture[:, stands_out].T)
    smallest = _SMALLEST_PIECE * scale**2
    masks = []
    for word in np.unique(words[stands_out]):
        # An outline pixel is a mixture and may look like a third colour: opening drops such rims.
        mask = ndimage.binary_opening(words == word, np.ones((3, 3)))
        labels, count = ndimage.label(mask)
        sizes = np.bincount(labels.ravel())
        masks += [labels == i for i in range(1, count + 1) if sizes[i] >= smallest]
    masks.sort(key=lambda mask: -int(mask.sum()))
    return masks[:_MOST_PIECES]


def _measure(picture: np.ndarray, background: np.ndarray, mask: np.ndarray) -> Drawn:
    """Colour, place, radius and shape of one piece."""
    from scipy import ndimage  # half a second, which captions alone need not pay

    core = ndimage.binary_erosion(mask, iterations=2)
    if core.sum() < 6:
        core = mask
    rgb = np.median(picture[:, core], axis=1)
    axis = rgb - background
    soft = np.tensordot(axis, picture - background[:, None, None], 1) / max(axis @ axis, 1e-6)
    soft = np.clip(soft, 0, 1) * ndimage.binary_dilation(mask, iterations=2)
    area = soft.sum()
    height, width = mask.shape
    x = float((soft.sum(0) * (np.arange(width) + 0.5)).sum() / area)
    y = float((soft.sum(1) * (np.arange(height) + 0.5)).sum() / area)
    radius = float(np.sqrt(area / np.pi))
    apart = [abs(soft - coverage(s, x, y, radius, height, width)).sum() for s in SHAPES]
    return Drawn(SHAPES[int(np.argmin(apart))], x, y, radius, tuple(float(v) for v in rgb))  # type: ignore[arg-type]


def verify(image: object, caption: str | Caption) -> Claims:
    """Compare a picture [3, H, W] in [0, 1] with its caption, claim by claim.

    Pieces are matched to the caption's things in the way that lets most claims hold. Raises
    ValueError for text outside the small world's language and for malformed pictures.
    """
    wanted = parse_caption(caption) if isinstance(caption, str) else caption
    picture = as_picture(image)
    return compare(read_scene(picture), wanted, picture.shape[1], picture.shape[2])


def compare(reading: Reading, wanted: Caption, height: int, width: int) -> Claims:
    """Claims of ``wanted`` that a reading of a picture of height x width pixels bears out."""
    count = len(wanted.things)
    slots: list[int | None] = [*range(len(reading.pieces)), *([None] * count)]
    best: dict[str, bool] = {}
    for order in set(permutations(slots, count)):
        held = _held(reading, wanted, order, height, width)
        if not best or sum(held.values()) > sum(best.values()):
            best = held
    best["background"] = reading.background == wanted.background
    best["count"] = len(reading.pieces) == count
    return Claims(best)


def _held(
    reading: Reading, wanted: Caption, order: tuple[int | None, ...], height: int, width: int
) -> dict[str, bool]:
    held: dict[str, bool] = {}
    for number, (thing, index) in enumerate(zip(wanted.things, order, strict=True), start=1):
        piece = None if index is None else reading.pieces[index]
        for kind in ("size", "colour", "shape"):
            held[f"{kind} {number}"] = bool(piece and getattr(piece, kind) == getattr(thing, kind))
    places = [None if index is None else reading.scene.things[index] for index in order]
    if wanted.relation is None:
        held["position"] = bool(
            places[0] and _position(places[0], height, width) == wanted.position
        )
    else:
        first, second = places
        held["relation"] = bool(first and second and _relation(first, second) == wanted.relation)
    return held


def _position(thing: Drawn, height: int, width: int) -> str:
    # Anchors lie at a quarter, a half and three quarters; the borders lie half-way between.
    row = ROWS[int(np.digitize(thing.y / height, (0.375, 0.625)))]
    column = COLUMNS[int(np.digitize(thing.x / width, (0.375, 0.625)))]
    return f"{row} {column}"


def _relation(first: Drawn, second: Drawn) -> str:
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"
