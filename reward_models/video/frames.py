"""Which frames of a clip an image scorer looks at, and how their scores become one.

Choices, written as a word:

    all          every frame
    first        the first
    uniform:n    the centres of n equal parts of the clip: frame floor((i + 1/2) F / n)
    random:n     n frames drawn without replacement, upwards

A clip of n frames or fewer gives all of them, once each. A random choice is a function of seed, key
(what names the clip) and F alone, so a score never depends on what else is in the batch.

Poolings: `mean`, `min`, and `softmin:tau`, which is -tau log mean_f exp(-v_f / tau). It lies
between min (tau -> 0) and mean (tau -> infinity) and, unlike min, gives every frame a gradient:
softmax(-v / tau). tau is in the units of the reward, so it has no default.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from reward_models.base import RewardError

Kind = Literal["all", "first", "uniform", "random"]
CHOICES = "all, first, uniform:8, random:4"
POOLS = "mean, min, softmin:0.1 (its temperature, in units of the reward)"


@dataclass(frozen=True)
class FrameChoice:
    """Which frames to look at.

    Args:
        kind: see the module.
        n: how many, for `uniform` and `random`.
    """

    kind: Kind
    n: int = 0

    @classmethod
    def parse(cls, word: str) -> FrameChoice:
        """Read `all`, `first`, `uniform:8` or `random:4`; case and blanks do not matter.

        Raises:
            RewardError: anything else, with what is known.
        """
        kind, colon, number = (part.strip() for part in word.strip().lower().partition(":"))
        counted = kind in ("uniform", "random")
        if kind in get_args(Kind) and counted == bool(colon):
            if not counted:
                return cls(kind)  # type: ignore[arg-type]
            if number.isascii() and number.isdecimal() and int(number) > 0:
                return cls(kind, int(number))  # type: ignore[arg-type]
        raise RewardError(f"{word!r} is no choice of frames", fix=f"one of: {CHOICES}")

    def __str__(self) -> str:
        return f"{self.kind}:{self.n}" if self.n else self.kind

    def indices(self, count: int, *, seed: int = 0, key: int | str = 0) -> list[int]:
        """The chosen frames of a clip with `count` frames, upwards.

        Args:
            seed, key: of a random choice. The key names the clip.

        Raises:
            ValueError: a clip without frames.
        """
        if count < 1:
            raise ValueError(f"a clip of {count} frames")
        if self.kind == "first":
            return [0]
        if self.kind == "all" or self.n >= count:
            return list(range(count))
        if self.kind == "uniform":
            return [(2 * i + 1) * count // (2 * self.n) for i in range(self.n)]
        # Raw words of the stream, because NumPy may change how it draws permutations.
        words = np.random.Philox(key=_stream_key(seed, key, count)).random_raw(count)
        return sorted(np.argsort(words, kind="stable")[: self.n].tolist())


def pool(values: Tensor, kind: str) -> Tensor:
    """One score per clip from the scores of its frames.

    Args:
        values: float [B, n]. A clip with a frame that is not finite scores NaN, and gives no
            gradient.
        kind: `mean`, `min` or `softmin:tau`.

    Returns:
        [B], of the same dtype.

    Raises:
        RewardError: an unknown pooling, with what is known.
    """
    name, tau = parse_pool(kind)
    keep = values.detach().isfinite().all(dim=1)
    kept = values[keep]
    if name == "mean":
        pooled = kept.mean(dim=1)
    elif name == "min":
        pooled = kept.amin(dim=1)
    else:
        # The same as -tau log mean exp(-v / tau); of a large tau the logarithm of the sum would be
        # all digits of log n and none of the values'.
        least = kept.detach().amin(dim=1)
        excess = torch.expm1(-(kept - least[:, None]) / tau).mean(dim=1)
        pooled = least - tau * torch.log1p(excess)
    # NaN x 0 is NaN in a gradient too, so the others are put beside, not multiplied away.
    return values.new_full(keep.shape, float("nan")).masked_scatter(keep, pooled)


def parse_pool(word: str) -> tuple[str, float]:
    """(`mean`, `min` or `softmin`; the temperature, 0 where there is none)

    Raises:
        RewardError: anything else, with what is known.
    """
    kind, colon, number = (part.strip() for part in word.strip().lower().partition(":"))
    if kind in ("mean", "min") and not colon:
        return kind, 0.0
    if kind == "softmin" and colon:
        try:
            tau = float(number)
        except ValueError:
            tau = 0.0
        if 0 < tau < math.inf:
            return kind, tau
    raise RewardError(f"{word!r} is no way to pool frames", fix=f"one of: {POOLS}")


def _stream_key(seed: int, key: int | str, count: int) -> int:
    parts = json.dumps(["reward_models.frames", seed, key, count])
    return int.from_bytes(hashlib.blake2b(parts.encode("ascii"), digest_size=16).digest(), "little")
