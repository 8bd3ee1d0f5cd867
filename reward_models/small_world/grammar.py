"""The small world's language: captions that say exactly what is in a picture.

A caption names one object with its position, or two objects with their relation, on a plain
background: ``"a large red circle at the top left on a white background"``,
``"a small blue square left of a large green cross on a black background"``. Every word is a
claim that :mod:`reward_models.small_world.verify` can check, so the truth about any picture is
known without a human judge.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "large")
COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.86, 0.15, 0.16),
    "orange": (0.96, 0.55, 0.09),
    "yellow": (0.98, 0.88, 0.18),
    "green": (0.13, 0.63, 0.27),
    "blue": (0.13, 0.35, 0.86),
    "purple": (0.55, 0.18, 0.70),
}
BACKGROUNDS: dict[str, tuple[float, float, float]] = {
    "white": (0.97, 0.97, 0.96),
    "gray": (0.52, 0.53, 0.54),
    "black": (0.05, 0.05, 0.06),
}
RELATIONS = ("above", "below", "left of", "right of")
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")

Split = Literal["train", "heldout", "all"]

# One caption in five is never shown in training: the split is a property of the text alone.
_HELDOUT_ONE_IN = 5
_ONE_OBJECT_SHARE = 0.4


@dataclass(frozen=True)
class Thing:
    """One object as a caption describes it."""

    size: str
    colour: str
    shape: str

    def __str__(self) -> str:
        return f"a {self.size} {self.colour} {self.shape}"


@dataclass(frozen=True)
class Caption:
    """What a picture should show: one thing and its ``position``, or two and their ``relation``.

    ``position`` is ``"ROW COLUMN"`` (for instance ``"top left"``) and set only with one thing;
    ``relation`` says where the first thing lies as seen from the second, only with two.
    """

    things: tuple[Thing, ...]
    background: str
    position: str | None = None
    relation: str | None = None

    def __str__(self) -> str:
        if self.relation is not None:
            scene = f"{self.things[0]} {self.relation} {self.things[1]}"
        else:
            scene = f"{self.things[0]} at the {self.position}"
        return f"{scene} on a {self.background} background"


def _choice(words: object) -> str:
    return "(" + "|".join(words) + ")"  # type: ignore[arg-type]


_THING = rf"an? {_choice(SIZES)} {_choice(COLOURS)} {_choice(SHAPES)}"
_TAIL = rf"on an? {_choice(BACKGROUNDS)} background\.?"
_ONE = re.compile(rf"{_THING} at the {_choice(ROWS)} {_choice(COLUMNS)} {_TAIL}")
_TWO = re.compile(rf"{_THING} {_choice(RELATIONS)} {_THING} {_TAIL}")


def parse_caption(text: str) -> Caption:
    """Read a caption back from its text (case and spacing are ignored).

    Raises:
        ValueError: the text is not in the small world's language; the message shows an example.
    """
    plain = " ".join(text.lower().split())
    if match := _ONE.fullmatch(plain):
        size, colour, shape, row, column, background = match.groups()
        return Caption((Thing(size, colour, shape),), background, position=f"{row} {column}")
    if match := _TWO.fullmatch(plain):
        a, b, c, relation, d, e, f, background = match.groups()
        return Caption((Thing(a, b, c), Thing(d, e, f)), background, relation=relation)
    raise ValueError(
        f"{text!r} is not a small-world caption; one reads "
        f"{str(Caption((Thing('large', 'red', 'circle'),), 'white', position='top left'))!r}"
    )


def is_heldout(text: str) -> bool:
    """Whether a caption belongs to the held-out split (a hash of its text, one in five)."""
    return hashlib.blake2b(text.encode(), digest_size=8).digest()[0] % _HELDOUT_ONE_IN == 0


def random_thing(rng: np.random.Generator, avoid_colour: str | None = None) -> Thing:
    """Draw a thing; two things of one picture never share their colour."""
    colours = [colour for colour in COLOURS if colour != avoid_colour]
    return Thing(str(rng.choice(SIZES)), str(rng.choice(colours)), str(rng.choice(SHAPES)))


def random_caption(rng: np.random.Generator, split: Split = "all") -> Caption:
    """Draw a caption of a split: 40 % with one thing, 60 % with two."""
    while True:
        background = str(rng.choice(list(BACKGROUNDS)))
        first = random_thing(rng)
        if rng.random() < _ONE_OBJECT_SHARE:
            position = f"{rng.choice(ROWS)} {rng.choice(COLUMNS)}"
            caption = Caption((first,), background, position=position)
        else:
            second = random_thing(rng, avoid_colour=first.colour)
            relation = str(rng.choice(RELATIONS))
            caption = Caption((first, second), background, relation=relation)
        if split == "all" or is_heldout(str(caption)) == (split == "heldout"):
            return caption


def captions(count: int, seed: int = 0, split: Split = "all") -> list[str]:
    """``count`` different captions of a split, the same ones for the same seed."""
    rng = np.random.default_rng(np.random.Philox(key=seed))
    found: dict[str, None] = {}
    while len(found) < count:
        found[str(random_caption(rng, split))] = None
    return list(found)


def change_one_attribute(caption: Caption, rng: np.random.Generator) -> Caption:
    """A caption that differs from ``caption`` in exactly one word (the hardest wrong caption)."""
    from dataclasses import replace

    def other(options: object, current: str) -> str:
        return str(rng.choice([word for word in options if word != current]))  # type: ignore[attr-defined]

    slots = ["background", "position" if caption.position else "relation"]
    slots += [
        f"{i} {kind}" for i in range(len(caption.things)) for kind in ("size", "colour", "shape")
    ]
    slot = str(rng.choice(slots))
    if slot == "background":
        return replace(caption, background=other(BACKGROUNDS, caption.background))
    if slot == "relation":
        return replace(caption, relation=other(RELATIONS, str(caption.relation)))
    if slot == "position":
        row, column = str(caption.position).split()
        if rng.random() < 0.5:
            return replace(caption, position=f"{other(ROWS, row)} {column}")
        return replace(caption, position=f"{row} {other(COLUMNS, column)}")
    index, kind = int(slot[0]), slot[2:]
    thing = caption.things[index]
    if kind == "colour":
        taken = {item.colour for item in caption.things}
        colour = str(rng.choice([word for word in COLOURS if word not in taken]))
        changed = replace(thing, colour=colour)
    elif kind == "size":
        changed = replace(thing, size=other(SIZES, thing.size))
    else:
        changed = replace(thing, shape=other(SHAPES, thing.shape))
    things = tuple(changed if i == index else item for i, item in enumerate(caption.things))
    return replace(caption, things=things)
