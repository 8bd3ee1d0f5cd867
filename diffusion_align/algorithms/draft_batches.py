"""Judged chains of one iteration, and how they are cut into minibatches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.algorithms.active_rollout import Walk
from diffusion_align.algorithms.base import Samples
from diffusion_align.algorithms.draft_collection import JudgedChains
from diffusion_align.policy import Conditioning


@dataclass(frozen=True)
class DraftBatch:
    """One iteration: N judged chains, cut by `order` (long [N])."""

    iteration: int
    judged: JudgedChains
    order: Tensor
    metrics: Mapping[str, float]

    @property
    def samples(self) -> Samples:
        """A few pictures to be looked at."""
        return self.judged.collection.samples


@dataclass(frozen=True)
class DraftMinibatch:
    """B chains of this rank, of a minibatch of `total` on all ranks.

    gradient: [B, *latent]; copy_gradients: [B, C, *latent]. A rank that holds none takes part with
    one chain of zeros, `count` 0. closes: whether this is the last minibatch of the iteration.
    owed: whether any minibatch of this rank's has a gradient to bring to the parameters.
    """

    walk: Walk
    cond: Conditioning
    gradient: Tensor
    copy_gradients: Tensor
    count: int
    total: int
    iteration: int
    closes: bool
    owed: bool


def cut(
    batch: DraftBatch, taken: Tensor, size: int, *, always: bool = False
) -> Iterator[DraftMinibatch]:
    """Shuffled chains in chunks of `size`, without those that take no part.

    Args:
        taken: bool [N], who does. A chain that does not makes its own chunk smaller and moves no
            other, and a chunk of none is left out.
        always: where nobody does, one minibatch of none, for what else belongs to an update.
    """
    chunks = [planned[taken[planned]] for planned in batch.order.split(size)]
    chunks = [planned for planned in chunks if len(planned)] or chunks[: int(always)]
    judged = batch.judged
    _, rows = judged.collection.share.held(taken.nonzero()[:, 0])
    given = (judged.gradient, judged.copy_gradients)
    owed = any(bool(gradient[rows.to(gradient.device)].any()) for gradient in given)
    for number, planned in enumerate(chunks, start=1):
        yield _gather(batch, planned, closes=number == len(chunks), owed=owed)


def _gather(batch: DraftBatch, planned: Tensor, *, closes: bool, owed: bool) -> DraftMinibatch:
    judged = batch.judged
    _, rows = judged.collection.share.held(planned)
    count = len(rows)
    walk = judged.walk.take(rows) if count else judged.walk.idle()
    rows = rows if count else torch.zeros(1, dtype=torch.long)
    place = rows.to(judged.gradient.device)
    gradient, copies = judged.gradient[place], judged.copy_gradients[place]
    return DraftMinibatch(
        walk=walk,
        cond=judged.cond.take(rows),
        gradient=gradient if count else torch.zeros_like(gradient),
        copy_gradients=copies if count else torch.zeros_like(copies),
        count=count,
        total=len(planned),
        iteration=batch.iteration,
        closes=closes,
        owed=owed,
    )
