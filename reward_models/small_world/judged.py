"""Pictures with what a simulated crowd said of them: pairs of one caption, or rated pictures.

The two pictures of a pair are drawn apart from each other: true or with a wrong word, clean or
spoiled. So they differ in what the caption claims, in neatness and, since every render draws its
own shades and faults may cast a colour over it, in palette. Pictures of a generator can be added;
they fail in their own ways, and a reward that is to judge them must have seen such.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward_models.small_world.corrupt import corrupt
from reward_models.small_world.grammar import (
    Caption,
    Split,
    change_one_attribute,
    is_heldout,
    parse_caption,
    random_caption,
)
from reward_models.small_world.render import random_scene, render
from reward_models.small_world.taste import AESTHETIC_CROWD, Crowd, Taste, taste

# Pictures [M, 3, 64, 64], uint8 or in [0, 1], array or tensor, and their M captions.
Samples = tuple[object, Sequence[str]]

_WRONG_SHARE = 0.45  # renders of a pair that show a caption with one or two other words
_SPOILED_SHARE = 0.5


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """N pairs of pictures of one caption each, what the crowd chose and what is true.

    Attributes:
        first, second: uint8 [N, 3, 64, 64].
        captions: N texts.
        preferred: bool [N], whether the crowd's rater chose the first.
        opinion_first, opinion_second: float64 [N], the crowd's noiseless ratings, 1 to 10.
        tasted_first, tasted_second: N truths, of which any crowd can form its opinion.
        crowd: whose choices these are.
        draw: of the rater who made them (see ``Crowd.choose``).
    """

    first: np.ndarray
    second: np.ndarray
    captions: list[str]
    preferred: np.ndarray
    opinion_first: np.ndarray
    opinion_second: np.ndarray
    tasted_first: list[Taste]
    tasted_second: list[Taste]
    crowd: Crowd
    draw: int

    def __len__(self) -> int:
        return len(self.captions)

    def votes(self, raters: int) -> np.ndarray:
        """Share [N] of ``raters`` who prefer the first; the first of them is who chose alone."""
        made = [
            self.crowd.choose(self.opinion_first, self.opinion_second, self.draw + index)
            for index in range(raters)
        ]
        return np.mean(made, axis=0)

    @property
    def ceiling(self) -> float:
        """Expected accuracy on these pairs of one who knows the crowd's true opinions."""
        return self.crowd.agreement_ceiling(self.opinion_first, self.opinion_second)


@dataclass(frozen=True, eq=False)
class JudgedRatings:
    """N pictures uint8 [N, 3, 64, 64] with captions, noiseless opinions and noisy ratings [N]."""

    images: np.ndarray
    captions: list[str]
    opinions: np.ndarray
    ratings: np.ndarray


def judged_pairs(
    count: int, seed: int, split: Split, crowd: Crowd, samples: Samples | None = None
) -> JudgedPairs:
    """``count`` pairs of renders, then the ``samples`` of each caption, two by two.

    The pictures depend on ``seed``, ``split`` and the crowd's own seed, so that crowds asked with
    one seed never judge the same pictures. 20,000 pairs take about a minute.

    Args:
        count: pairs of renders, at least 0.
        seed: of pictures, order within pairs and the crowd's noise.
        split: captions of this split only, the samples' too.
        crowd: whose choices are wanted.
        samples: pictures of a generator and their captions; of m pictures of a caption floor(m / 2)
            pairs are made, so there should be at least two of each.

    Raises:
        ValueError: no pair at all, or samples whose captions are of the other split or alone.
    """
    key = _key("judged pairs", seed, split, crowd)
    rng = np.random.default_rng(np.random.Philox(key=key))
    wanted = [random_caption(rng, split) for _ in range(count)]
    pairs = [[_to_uint8(_picture(caption, rng)) for _ in range(2)] for caption in wanted]
    if samples is not None:
        captions, pictures = _checked(samples, split)
        for text, places in _shuffled_by_caption(captions, rng).items():
            wanted += [parse_caption(text)] * (len(places) // 2)
            pairs += [[pictures[a], pictures[b]] for a, b in zip(places[::2], places[1::2])]
    if not wanted:
        raise ValueError("no pairs: give a count of at least 1, or samples")
    first, second = (np.stack([pair[side] for pair in pairs]) for side in (0, 1))
    tasted = [
        [taste(image / 255, caption) for image, caption in zip(side, wanted, strict=True)]
        for side in (first, second)
    ]
    opinions = [np.asarray([crowd.opinion(item) for item in side]) for side in tasted]
    return JudgedPairs(
        first=first,
        second=second,
        captions=[str(caption) for caption in wanted],
        preferred=crowd.choose(opinions[0], opinions[1], key),
        opinion_first=opinions[0],
        opinion_second=opinions[1],
        tasted_first=tasted[0],
        tasted_second=tasted[1],
        crowd=crowd,
        draw=key,
    )


def judged_ratings(
    count: int,
    seed: int,
    split: Split,
    crowd: Crowd = AESTHETIC_CROWD,
    samples: Samples | None = None,
    draw: int | None = None,
) -> JudgedRatings:
    """``count`` renders, every other one spoiled, then the ``samples``; all rated by the crowd.

    Args:
        count: renders, at least 0.
        seed: of the renders.
        split: captions of this split only, the samples' too.
        crowd: whose ratings are wanted.
        samples: pictures of a generator and their captions.
        draw: of the crowd's noise (see ``Crowd.rate``); None is one of these pictures' own, 0 that
            of the ratings which the shipped ``tiny-clip`` learnt from.

    Raises:
        ValueError: no picture at all, or samples whose captions are of the other split.
    """
    rng = np.random.default_rng(np.random.Philox(key=seed))
    images, wanted = [], []
    for i in range(count):
        caption = random_caption(rng, split)
        picture = render(random_scene(caption, rng))
        images.append(_to_uint8(corrupt(picture, rng) if i % 2 else picture))
        wanted.append(caption)
    if samples is not None:
        captions, pictures = _checked(samples, split)
        images += list(pictures)
        wanted += [parse_caption(text) for text in captions]
    if not wanted:
        raise ValueError("no pictures: give a count of at least 1, or samples")
    tasted = [taste(image / 255, caption) for image, caption in zip(images, wanted, strict=True)]
    opinions = np.asarray([crowd.opinion(item) for item in tasted])
    draw = _key("judged ratings", seed, split, crowd) if draw is None else draw
    return JudgedRatings(
        images=np.stack(images),
        captions=[str(caption) for caption in wanted],
        opinions=opinions,
        ratings=crowd.rate(opinions, draw),
    )


def _picture(caption: Caption, rng: np.random.Generator) -> np.ndarray:
    """One attempt at a caption, float [3, 64, 64] in [0, 1]."""
    shown = caption
    if rng.random() < _WRONG_SHARE:
        for _ in range(int(rng.integers(1, 3))):
            shown = change_one_attribute(shown, rng)
    picture = render(random_scene(shown, rng))
    return corrupt(picture, rng) if rng.random() < _SPOILED_SHARE else picture


def _key(what: str, seed: int, split: str, crowd: Crowd) -> int:
    """A number of 128 bits that no other set shares: key of its pictures, draw of its noise."""
    text = f"{what} {crowd.seed} {seed} {split}"
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def _shuffled_by_caption(captions: Sequence[str], rng: np.random.Generator) -> dict[str, list[int]]:
    """Caption -> the places of its pictures in random order."""
    places: dict[str, list[int]] = {}
    for place in rng.permutation(len(captions)):
        places.setdefault(captions[place], []).append(int(place))
    if lonely := [text for text, found in places.items() if len(found) < 2]:
        raise ValueError(
            f"{len(lonely)} captions have one sample only, for instance {lonely[0]!r}; "
            "a pair needs two of one caption"
        )
    return places


def _checked(samples: Samples, split: Split) -> tuple[list[str], np.ndarray]:
    """Captions and uint8 pictures [M, 3, H, W] of samples that belong to the split."""
    images, texts = samples
    detached = images.detach().cpu() if hasattr(images, "detach") else images
    pictures = np.asarray(detached)
    captions = [str(parse_caption(text)) for text in texts]
    if pictures.ndim != 4 or len(pictures) != len(captions):
        raise ValueError(f"{len(captions)} captions for pictures of shape {list(pictures.shape)}")
    for text in captions:
        if split != "all" and is_heldout(text) != (split == "heldout"):
            raise ValueError(f"a sample's caption is not of the split {split!r}: {text!r}")
    return captions, pictures if pictures.dtype == np.uint8 else _to_uint8(pictures)


def _to_uint8(picture: np.ndarray) -> np.ndarray:
    return np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)
