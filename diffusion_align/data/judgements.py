"""What people said of pictures: preferences between two, or ratings of one.

A row holds its pictures (a file, or uint8 pixels), their prompt and a label for each attribute that
was judged; an attribute that a row does not name is unlabelled there, and the losses mask it.
Readers of files are in `judgement_files` and `ava`; reward training takes its tensors from here.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
import torch
from torch import Tensor

from diffusion_align.errors import UserError, did_you_mean
from reward_models.media import read_image

# A file, or uint8 [3, H, W] as an array or a tensor.
Picture = Path | np.ndarray | Tensor
Kind = Literal["pairs", "ratings"]
# The attribute of data that judge a picture as a whole.
OVERALL = "overall"


@dataclass(frozen=True, eq=False)
class Pair:
    """Two pictures of one prompt and how likely people are to prefer the first.

    Attributes:
        prompt: what both pictures should show; "" where people were shown none.
        first, second: the pictures; never the same one.
        preferred: attribute -> probability in [0, 1] that the first is preferred: 1 it is, 0 the
            second is, 0.5 a tie, anything between a share of votes.
        weight: how much the row counts, above 0.
        where: the file and line it came from, for messages.

    Raises:
        UserError: a value out of range, or a picture compared with itself.
    """

    prompt: str
    first: Picture
    second: Picture
    preferred: Mapping[str, float]
    weight: float = 1.0
    where: str = ""

    def __post_init__(self) -> None:
        same = self.first is self.second
        if isinstance(self.first, Path) and isinstance(self.second, Path):
            same = self.first == self.second
        if same:
            raise UserError("a picture is compared with itself", where=self.where)
        for name, value in self.preferred.items():
            if not 0 <= value <= 1:  # NaN fails too
                raise UserError(
                    f"the preference for {name!r} is {value}",
                    where=self.where,
                    fix="give 1 (the first is preferred), 0 (the second), 0.5 (a tie) or a share",
                )
        _check_row(self.pictures, self.preferred, self.weight, self.where)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (self.first, self.second)

    @property
    def values(self) -> Mapping[str, float]:
        """The labels, by attribute."""
        return self.preferred


@dataclass(frozen=True, eq=False)
class Rating:
    """One picture and how people rated it, on the scale of the data; higher is better.

    Raises:
        UserError: a rating that is not finite.
    """

    prompt: str
    picture: Picture
    ratings: Mapping[str, float]
    weight: float = 1.0
    where: str = ""

    def __post_init__(self) -> None:
        for name, value in self.ratings.items():
            if not math.isfinite(value):
                raise UserError(f"the rating of {name!r} is {value}", where=self.where)
        _check_row(self.pictures, self.ratings, self.weight, self.where)

    @property
    def pictures(self) -> tuple[Picture, ...]:
        return (self.picture,)

    @property
    def values(self) -> Mapping[str, float]:
        """The labels, by attribute."""
        return self.ratings


def _check_row(
    pictures: Iterable[Picture], labels: Mapping[str, float], weight: float, where: str
) -> None:
    if not labels:
        raise UserError("no attribute is labelled", where=where)
    if "" in labels:
        raise UserError("an attribute has no name", where=where)
    if not (math.isfinite(weight) and weight > 0):
        raise UserError(f"the weight is {weight}; it must be above 0 and finite", where=where)
    for picture in pictures:
        if isinstance(picture, Path):
            continue
        if picture.ndim != 3 or picture.shape[0] != 3 or str(picture.dtype)[-5:] != "uint8":
            raise UserError(
                f"pixels are uint8 [3, H, W]; these are {picture.dtype} {list(picture.shape)}",
                where=where,
            )


@dataclass(frozen=True, eq=False)
class Judgements:
    """Rows of one kind, with what losses and towers need of them.

    Attributes:
        kind: "pairs" or "ratings".
        rows: N rows; never none.
        attributes: names of the A attributes, the columns of `labels()`.
        notes: what a reader left out, in sentences for people.

    Raises:
        UserError: no rows, rows of the other kind, or attributes that do not fit the rows.
    """

    kind: Kind
    rows: tuple[Pair, ...] | tuple[Rating, ...]
    attributes: tuple[str, ...] = (OVERALL,)
    notes: tuple[str, ...] = field(default=())

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise UserError(f"unknown kind of judgements {self.kind!r}: pairs or ratings")
        if not self.rows:
            raise UserError("there are no judgements", fix="give at least one row")
        expected = Pair if self.kind == "pairs" else Rating
        if not all(isinstance(row, expected) for row in self.rows):
            raise UserError(f"{self.kind} are made of {expected.__name__} rows only")
        if len(set(self.attributes)) != len(self.attributes) or not self.attributes:
            raise UserError(f"attributes must be different names: {self.attributes}")
        known = set(self.attributes)
        for row in self.rows:
            if unknown := [name for name in row.values if name not in known]:
                near = did_you_mean(unknown[0], self.attributes)
                raise UserError(
                    f"unknown attribute {unknown[0]!r}; known: {', '.join(self.attributes)}",
                    where=row.where,
                    fix=f"did you mean {near!r} ?" if near else "",
                )

    @classmethod
    def of(cls, rows: Sequence[Pair | Rating], notes: Sequence[str] = ()) -> Judgements:
        """Judgements of these rows, with the attributes that they name, in order of appearance."""
        kind: Kind = "ratings" if rows and isinstance(rows[0], Rating) else "pairs"
        names = dict.fromkeys(name for row in rows for name in row.values)
        kept = cast("tuple[Pair, ...]", tuple(rows))
        return cls(kind, kept, tuple(names) or (OVERALL,), tuple(notes))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def prompts(self) -> list[str]:
        """The N prompts."""
        return [row.prompt for row in self.rows]

    def labels(self) -> Tensor:
        """float32 [N, A]: probabilities that the first is preferred, or ratings; NaN unlabelled."""
        table = [[row.values.get(name, math.nan) for name in self.attributes] for row in self.rows]
        return torch.tensor(table, dtype=torch.float32)

    def mask(self) -> Tensor:
        """bool [N, A]: which entries of `labels()` are labelled."""
        return ~self.labels().isnan()

    def weights(self) -> Tensor:
        """float32 [N], above 0."""
        return torch.tensor([row.weight for row in self.rows], dtype=torch.float32)

    def load_pixels(self, indices: Sequence[int] | Tensor) -> list[Tensor]:
        """Pictures of n rows as float32 [3, H, W] in [0, 1], each of its own size.

        Of ratings n pictures; of pairs 2 n: all the first ones, then all the second ones, so that
        both sides can go through a tower in one batch.

        Raises:
            RewardError: a file that is missing, damaged or no picture, by name.
        """
        rows = [self.rows[int(index)] for index in indices]
        sides = 2 if self.kind == "pairs" else 1
        return [load_picture(row.pictures[side]) for side in range(sides) for row in rows]

    def pick(self, indices: Iterable[int]) -> Judgements:
        """The judgements of some rows, with all attributes."""
        rows = cast("tuple[Pair, ...]", tuple(self.rows[int(index)] for index in indices))
        return replace(self, rows=rows)

    def split(self, share: float, seed: int) -> tuple[Judgements, Judgements]:
        """Training and held-out judgements; the latter hold about `share` of the rows.

        Rows that share a prompt or a picture stay together, so that neither is on both sides. The
        same seed gives the same split of the same rows; order is kept.

        Args:
            share: wanted share of the rows held out, in (0, 1).
            seed: of the draw.

        Raises:
            UserError: a share out of range, or rows that all hang together.
        """
        if not 0 < share < 1:
            raise UserError(f"the held-out share is {share}", fix="give a number between 0 and 1")
        groups = _connected(self.rows)
        if len(groups) < 2:
            raise UserError(
                "these judgements cannot be split: all rows share a prompt or a picture",
                fix="give held-out judgements of other prompts as a file of their own",
            )
        rng = np.random.default_rng(np.random.Philox(key=seed))
        wanted = share * len(self.rows)
        held: set[int] = set()
        for number in rng.permutation(len(groups)):
            if len(held) + len(groups[number]) <= wanted:
                held.update(groups[number])
        # Too few rows for the share: the smallest group is still better than none.
        smallest = min(groups, key=len)
        held = held or set(smallest)
        everything = range(len(self.rows))
        return (
            self.pick(index for index in everything if index not in held),
            self.pick(index for index in everything if index in held),
        )


def load_picture(picture: Picture) -> Tensor:
    """float32 [3, H, W] in [0, 1] of a file or of uint8 pixels."""
    if isinstance(picture, Path):
        return read_image(picture)
    return torch.as_tensor(picture).float() / 255


def _connected(rows: Sequence[Pair | Rating]) -> list[list[int]]:
    """Groups of row numbers that hang together by a prompt or a picture (union of sets)."""
    parent = list(range(len(rows)))

    def root(index: int) -> int:
        while parent[index] != index:
            parent[index] = parent[parent[index]]
            index = parent[index]
        return index

    first_with: dict[Hashable, int] = {}
    for index, row in enumerate(rows):
        # Pixels have no name: an array is the same picture only when it is the same object.
        keys: list[Hashable] = [p if isinstance(p, Path) else id(p) for p in row.pictures]
        # An empty prompt says nothing, so it ties nothing together.
        keys += [("prompt", row.prompt)] if row.prompt else []
        for key in keys:
            parent[root(index)] = root(first_with.setdefault(key, index))
    groups: dict[int, list[int]] = {}
    for index in range(len(rows)):
        groups.setdefault(root(index), []).append(index)
    return list(groups.values())


def small_world_judgements(
    name: Literal["hps", "mps", "aesthetic"],
    count: int,
    seed: int,
    split: Literal["train", "heldout", "all"],
    samples: tuple[Any, Sequence[str]] | None = None,
    raters: int = 1,
) -> Judgements:
    """What a simulated crowd says of small-world pictures: pairs of `hps` or `mps`, or ratings.

    Args:
        name: the crowd. `hps` and `mps` judge pairs of one caption; `aesthetic` rates from 1 to 10
            and never sees the caption (its rows still carry it).
        count: pairs, or pictures.
        seed: of the pictures and of the crowd's noise.
        split: captions of this split only.
        samples: pictures of a generator [M, 3, 64, 64] and their M captions; for pairs at least two
            of each caption.
        raters: of each pair; the label is the share of them who prefer the first picture.

    Raises:
        UserError: an unknown crowd, a count or raters below 1.
    """
    from reward_models import small_world

    crowds = {"hps": small_world.HPS_CROWD, "mps": small_world.MPS_CROWD}
    if name not in (*crowds, "aesthetic"):
        near = did_you_mean(name, [*crowds, "aesthetic"])
        raise UserError(
            f"unknown crowd {name!r}; known: hps, mps, aesthetic",
            fix=f"did you mean {near} ?" if near else "",
        )
    if count < 1:
        raise UserError(f"{count} small-world judgements were asked for", fix="give 1 or more")
    if raters < 1:
        raise UserError(f"{raters} raters were asked for", fix="give 1 or more")
    if name == "aesthetic":
        rated = small_world.judged_ratings(count, seed, split, samples=samples)
        return Judgements.of(
            [
                Rating(caption, image, {OVERALL: float(rating)})
                for caption, image, rating in zip(rated.captions, rated.images, rated.ratings)
            ]
        )
    judged = small_world.judged_pairs(count, seed, split, crowds[name], samples)
    return Judgements.of(
        [
            Pair(caption, first, second, {OVERALL: float(preferred)})
            for caption, first, second, preferred in zip(
                judged.captions, judged.first, judged.second, judged.votes(raters)
            )
        ]
    )
