"""AVA.txt: how photographers voted on 255,000 photographs, from 1 to 10.

Each line holds 15 numbers: its own number, the image id, how many people gave 1, 2, ... 10, two
semantic tags and the challenge. The mean of the votes is the rating that aesthetic predictors learn
(LAION's among them); pictures are files `<image id>.jpg`.

*Source:* Murray, Marchesotti and Perronnin 2012, AVA: A Large-Scale Database for Aesthetic Visual
Analysis.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from diffusion_align.data.judgement_files import Damage, Unusable, gather
from diffusion_align.data.judgements import OVERALL, Judgements, Rating
from diffusion_align.data.prompts import decode_text
from diffusion_align.errors import UserError

_FIELDS = 15


@dataclass(frozen=True)
class Votes:
    """How people voted on one picture: `counts[i]` of them gave i + 1."""

    image: int
    counts: tuple[int, ...]

    @property
    def mean(self) -> float:
        """Mean rating, 1 to 10."""
        return sum(rating * n for rating, n in enumerate(self.counts, start=1)) / sum(self.counts)

    @property
    def deviation(self) -> float:
        """Standard deviation of the votes (of this population, not an estimate of a larger)."""
        squares = sum(
            (rating - self.mean) ** 2 * n for rating, n in enumerate(self.counts, start=1)
        )
        return math.sqrt(squares / sum(self.counts))


def parse_votes(line: str) -> Votes:
    """The votes of one line of AVA.txt.

    Raises:
        UserError: not 15 whole numbers, a negative count, or no vote at all.
    """
    fields = line.split()
    if len(fields) != _FIELDS:
        raise UserError(f"{len(fields)} fields instead of {_FIELDS}")
    if wrong := [field for field in fields if not (field.isascii() and field.isdigit())]:
        raise UserError(f"{wrong[0]!r} is not a whole number of at least 0")
    numbers = [int(field) for field in fields]
    if not any(numbers[2:12]):
        raise UserError(f"nobody voted on image {numbers[1]}")
    return Votes(numbers[1], tuple(numbers[2:12]))


def read_ava(
    path: str | Path,
    folder: str | Path,
    *,
    missing: Unusable = "refuse",
    damaged: Unusable = "refuse",
) -> Judgements:
    """Mean ratings of AVA.txt as judgements of kind "ratings", without prompts.

    Args:
        path: AVA.txt.
        folder: where `<image id>.jpg` lie.
        missing: what to do about pictures that are not there; copies of AVA often lack a few.
        damaged: what to do about malformed lines.

    Raises:
        UserError: no such file, malformed lines (all of them), an image twice, pictures that are
            not there (together, with their number), or nothing left.
    """
    source, pictures = Path(path).expanduser(), Path(folder).expanduser()
    if not source.is_file():
        raise UserError("no such file", where=str(source), fix="give the path of AVA.txt")
    rows: list[Rating] = []
    damage: list[Damage] = []
    line_of: dict[int, int] = {}
    for number, line in enumerate(
        decode_text(source.read_bytes(), str(source)).split("\n"), start=1
    ):
        if not line.strip():
            continue
        try:
            votes = parse_votes(line)
            if line_of.setdefault(votes.image, number) != number:
                raise UserError(f"image {votes.image} is on line {line_of[votes.image]} already")
        except UserError as error:
            damage.append(Damage(number, error.what))
            continue
        picture = pictures / f"{votes.image}.jpg"
        rows.append(Rating("", picture, {OVERALL: votes.mean}, where=f"{source}:{number}"))
    return gather(rows, damage, where=str(source), missing=missing, damaged=damaged)
