"""Taste: the written truth about how good a small-world picture is, and crowds that feel it.

Taste has three parts, each in [0, 1]: *claims* (share of the caption's claims that hold),
*neatness* (a neat picture looks like a clean drawing of what it shows: sharp outlines, flat
colours, nothing stray) and *palette* (objects in the clear, deep shades of ``COLOURS``). A crowd
weighs the parts and adds noise of its own; it answers with ratings from 1 to 10, as the raters of
the real aesthetic data did, or with Bradley-Terry choices between two pictures, as those of HPS and
MPS did. So a reward model trained on them has a known truth and a known ceiling.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np

from reward_models.small_world.grammar import COLOURS, Caption, parse_caption
from reward_models.small_world.render import coverage
from reward_models.small_world.verify import Reading, as_picture, compare, read_scene

# Mean absolute error against the clean drawing at which neatness has fallen to 1/e.
_UNTIDY = 0.04
# RGB distance from a colour word's own shade at which palette has fallen to 1/e.
_OFF_SHADE = 0.20


@dataclass(frozen=True)
class Taste:
    """The parts of taste and their weighted ``total``, all in [0, 1]."""

    claims: float
    neatness: float
    palette: float

    @property
    def total(self) -> float:
        """0.5 claims + 0.3 neatness + 0.2 palette."""
        return 0.5 * self.claims + 0.3 * self.neatness + 0.2 * self.palette


def taste(image: object, caption: str | Caption) -> Taste:
    """Taste of a picture [3, H, W] in [0, 1] under its caption.

    Raises:
        ValueError: text outside the small world's language, or a malformed picture.
    """
    wanted = parse_caption(caption) if isinstance(caption, str) else caption
    picture = as_picture(image)
    reading = read_scene(picture)
    claims = compare(reading, wanted, picture.shape[1], picture.shape[2])
    return Taste(claims.fraction, neatness(picture, reading), palette(reading))


def neatness(picture: np.ndarray, reading: Reading) -> float:
    """How much a picture [3, H, W] looks like a clean drawing of its own reading, in [0, 1].

    A picture that shows nothing has no neatness: an empty canvas is not a tidy drawing.
    """
    if not reading.pieces:
        return 0.0
    height, width = picture.shape[1:]
    clean = np.empty_like(picture)
    clean[:] = np.asarray(reading.scene.background)[:, None, None]
    for thing in reading.scene.things:
        cover = coverage(thing.shape, thing.x, thing.y, thing.radius, height, width)
        clean += cover * (np.asarray(thing.rgb)[:, None, None] - clean)
    return float(np.exp(-abs(picture - clean).mean() / _UNTIDY))


def palette(reading: Reading) -> float:
    """How near the objects' colours come to the deep shades of ``COLOURS``, in [0, 1]."""
    if not reading.pieces:
        return 0.0
    scores = []
    for piece, drawn in zip(reading.pieces, reading.scene.things, strict=True):
        off = np.linalg.norm(np.asarray(drawn.rgb) - np.asarray(COLOURS[piece.colour]))
        scores.append(np.exp(-off / _OFF_SHADE))
    return float(np.mean(scores))


@dataclass(frozen=True)
class Crowd:
    """Simulated raters: weights of taste's parts (sum 1), noise in rating points, own seed.

    ``noise`` is the standard deviation of ratings and the temperature of choices. Every answer is a
    function of the crowd, the question and ``draw``: asking again changes nothing, another
    ``draw`` asks other people.
    """

    name: str
    claims: float
    neatness: float
    palette: float
    noise: float
    seed: int

    def opinion(self, tasted: Taste) -> float:
        """The crowd's noiseless rating, 1 to 10."""
        liked = (
            self.claims * tasted.claims
            + self.neatness * tasted.neatness
            + self.palette * tasted.palette
        )
        return 1 + 9 * liked

    def rate(self, opinions: np.ndarray, draw: int = 0) -> np.ndarray:
        """Noisy ratings [n] in [1, 10] for noiseless opinions [n]."""
        if draw == 0:  # the stream that the shipped weights learnt from
            rng = np.random.default_rng(np.random.Philox(key=self.seed))
        else:
            rng = self._stream("rate", draw)
        return np.clip(opinions + rng.normal(0, self.noise, len(opinions)), 1, 10)

    def preference(self, first: np.ndarray, second: np.ndarray) -> np.ndarray:
        """Probability [n] that a rater prefers the first: sigmoid((first - second) / noise).

        Args:
            first, second: the crowd's noiseless ratings [n] of the two pictures.
        """
        from scipy.special import expit

        return np.asarray(expit((np.asarray(first) - np.asarray(second)) / self.noise))

    def choose(self, first: np.ndarray, second: np.ndarray, draw: int = 0) -> np.ndarray:
        """Bradley-Terry choices: bool [n], whether one rater preferred the first of each pair."""
        chance = self.preference(first, second)
        return self._stream("choose", draw).random(len(chance)) < chance

    def agreement_ceiling(self, first: np.ndarray, second: np.ndarray) -> float:
        """Expected accuracy, on this crowd's choices, of one who knows its true opinions [n]."""
        chance = self.preference(first, second)
        return float(np.maximum(chance, 1 - chance).mean())

    def _stream(self, purpose: str, draw: int) -> np.random.Generator:
        key = hashlib.blake2b(f"{self.seed} {purpose} {draw}".encode(), digest_size=16).digest()
        return np.random.default_rng(np.random.Philox(key=int.from_bytes(key, "little")))


def realised_ceiling(first: np.ndarray, second: np.ndarray, preferred: np.ndarray) -> float:
    """Accuracy that true opinions [n] reach on choices bool [n] that were made; equal ones half."""
    chosen = np.where(first == second, 0.5, (first > second) == preferred)
    return float(chosen.mean())


# Raters of beauty never see the caption, like those of the LAION aesthetic data.
AESTHETIC_CROWD = Crowd("aesthetic", 0.0, 0.5, 0.5, noise=1.0, seed=11)
# Raters of preference see the caption and two pictures of it. Those of MPS mind neatness more and
# are other people: own weights, noise and seed, so that MPS can be held out from HPS.
HPS_CROWD = Crowd("hps", 0.55, 0.15, 0.30, noise=0.4, seed=12)
MPS_CROWD = Crowd("mps", 0.45, 0.40, 0.15, noise=0.45, seed=13)
