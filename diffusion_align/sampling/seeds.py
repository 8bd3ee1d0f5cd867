"""One counter-based random stream per item.

Every item (one sample of one prompt) draws from its own Philox stream, made on the CPU, whose
128-bit key is a hash of everything that names the item. So a picture does not depend on the batch
it is made in, on the number of GPUs or on what was drawn before, and nothing is seeded globally.
torch's own CPU generator keeps only 32 bits of a seed, which is why it is not used.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

Purpose = Literal["rollout", "timestep", "train-noise", "eval"]


def stream(
    run_seed: int, purpose: Purpose, *, iteration: int | None, position: int, sample: int
) -> np.random.Generator:
    """The random stream of one item.

    The key is blake2b-128 of the parts written as one JSON array, which no two different lists of
    parts share.

    Args:
        run_seed: the run's seed, any integer.
        purpose: what the numbers are for. `eval` streams are the same before and after training.
        iteration: which collection, at least 0; None for `eval` and only there.
        position: place of the prompt in the batch plan, at least 0.
        sample: number of the sample of that prompt, at least 0.

    Raises:
        ValueError: an unknown purpose, a negative part, or an iteration where none belongs.
    """
    if purpose not in get_args(Purpose):
        raise ValueError(f"unknown purpose {purpose!r}; one of {get_args(Purpose)}")
    if (iteration is None) != (purpose == "eval"):
        raise ValueError("eval streams carry no iteration; every other stream carries one")
    # operator.index takes numpy integers and refuses floats: 3 and 3.0 would be two keys.
    round_ = None if iteration is None else operator.index(iteration)
    place, number = operator.index(position), operator.index(sample)
    if place < 0 or number < 0 or (round_ is not None and round_ < 0):
        raise ValueError(f"negative part: iteration {round_}, position {place}, sample {number}")
    parts = ["diffusion_align", operator.index(run_seed), purpose, round_, place, number]
    digest = hashlib.blake2b(json.dumps(parts).encode("ascii"), digest_size=16).digest()
    return np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))


def normal(streams: Sequence[np.random.Generator], shape: Sequence[int]) -> Tensor:
    """Standard normal noise, one draw from each stream.

    Args:
        streams: B streams; each advances by one draw.
        shape: of one item.

    Returns:
        float32 [B, *shape] on the CPU.
    """
    drawn = np.empty((len(streams), *shape), dtype=np.float32)
    for row, source in zip(drawn, streams):
        source.standard_normal(dtype=np.float32, out=row)
    return torch.from_numpy(drawn)
