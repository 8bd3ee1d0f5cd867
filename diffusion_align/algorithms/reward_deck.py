"""The order in which rows of judgements are learnt from: a function of the seed and the iteration.

Rows are dealt from a deck that is shuffled anew for every pass, so that each comes once before any
comes twice. There is no cursor to lose: an iteration can be dealt again exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Group
from diffusion_align.sampling.seeds import stream

# Beyond any item's position, as in `plan`: draws that belong to a pass or an iteration as a whole.
_SHUFFLE, _FLIPS = 2**30 + 2, 2**30 + 3


@dataclass(frozen=True)
class Deck:
    """The rows int64 [N] that are learnt from, dealt in `batches` of `batch_size` an iteration."""

    rows: Tensor
    batch_size: int
    batches: int
    seed: int

    def deal(self, iteration: int) -> Sequence[Tensor]:
        """The rows of the iteration's batches."""
        count, size = self.batches * self.batch_size, len(self.rows)
        start = iteration * count
        passes = range(start // size, (start + count - 1) // size + 1)
        shuffled = torch.cat([self.rows[self._order(number)] for number in passes])
        return shuffled[start - passes[0] * size :][:count].split(self.batch_size)

    def share(self, group: Group) -> Tensor:
        """The places in every batch that are this rank's: long [k], dealt like cards."""
        return torch.arange(self.batch_size)[group.rank :: group.size]

    def flips(self, iteration: int) -> Sequence[Tensor]:
        """Which rows of the iteration's batches are mirrored: half of them, bool."""
        source = stream(self.seed, "timestep", iteration=iteration, position=_FLIPS, sample=0)
        return list(torch.from_numpy(source.random((self.batches, self.batch_size)) < 0.5))

    def _order(self, number: int) -> Tensor:
        source = stream(self.seed, "timestep", iteration=number, position=_SHUFFLE, sample=0)
        return torch.from_numpy(source.permutation(len(self.rows)))
