"""Batches of sampled trajectories and how they are cut. Shared by the trajectory methods."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Samples
from diffusion_align.algorithms.sharing import Share
from diffusion_align.policy import Conditioning
from diffusion_align.sampling.rollout import Trajectory


@dataclass(frozen=True)
class TrajectoryBatch:
    """One iteration: N samples, T trained steps of each in every one of E inner epochs.

    old_log_probs: [N, S] the ratio's denominator; advantages: [N], NaN where the reward failed;
    sample_orders: long [E, N] and step_orders: long [E, N, T] on the CPU; cond: [N] as *training*
    uses it (the trajectory carries the one that sampled).

    In a group N is all ranks' samples, but of trajectory, old_log_probs and cond a rank has only
    those at `share.places`.
    """

    trajectory: Trajectory
    cond: Conditioning
    old_log_probs: Tensor
    advantages: Tensor
    sample_orders: Tensor
    step_orders: Tensor
    metrics: Mapping[str, float]
    samples: Samples | None
    share: Share


@dataclass(frozen=True)
class Pairs:
    """K transitions x_t -> x_next. x_t, x_next: [K, *latent]; steps: long [K]; cond: [K]."""

    x_t: Tensor
    x_next: Tensor
    steps: Tensor
    cond: Conditioning


@dataclass(frozen=True)
class TrajectoryMinibatch:
    """B samples with T steps each.

    rows: long [B], their places in `latents` [N, S+1, *latent], which is the batch's own tensor:
    a minibatch copies no latents. steps and old_log_probs: [B, T]; advantages: [B], finite.

    In a group these are the rows that this rank holds of a minibatch of `total`. A rank that holds
    none is `idle`: it takes part with one row made of zeros, whose loss counts nothing.
    """

    rows: Tensor
    steps: Tensor
    latents: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    cond: Conditioning
    total: int | None = None
    idle: bool = False

    @property
    def count(self) -> int:
        """How many rows count: all of them, or none."""
        return 0 if self.idle else len(self.rows)

    @property
    def portion(self) -> float:
        """The share of the minibatch that this rank holds, in [0, 1]."""
        return self.count / (self.total or len(self.rows))

    def groups(self, size: int) -> list[slice]:
        """The T steps in runs of `size`; the last may be shorter."""
        return [slice(start, start + size) for start in range(0, self.steps.shape[1], size)]

    def pairs(self, group: slice) -> Pairs:
        """The transitions of these steps, flattened: B x G of them, sample by sample."""
        steps = self.steps[:, group]
        samples, count = steps.shape
        cond, rows, flat = self.cond, self.rows, steps.flatten()
        if count > 1:
            cond = cond.take(torch.arange(samples).repeat_interleave(count))
            rows = rows.repeat_interleave(count)
        return Pairs(self.latents[rows, flat], self.latents[rows, flat + 1], flat, cond)


def cut(batch: TrajectoryBatch, size: int) -> Iterator[TrajectoryMinibatch]:
    """Shuffled samples in chunks of `size`, without those whose reward failed.

    The chunks are those of the plan: a failed sample makes its own chunk smaller and moves no
    other, and a chunk of nothing but failures is left out.
    """
    valid = ~batch.advantages.isnan().cpu()
    for order, step_order in zip(batch.sample_orders, batch.step_orders, strict=True):
        for planned in order.split(size):
            rows = planned[valid[planned]]
            if len(rows):
                yield _gather(batch, rows, step_order)


def _gather(batch: TrajectoryBatch, planned: Tensor, step_order: Tensor) -> TrajectoryMinibatch:
    places, rows = batch.share.held(planned)
    if not len(rows):
        return _idle(batch, step_order[planned[:1]], len(planned))
    latents = batch.trajectory.latents
    cond = batch.cond.take(rows)
    rows, steps = rows.to(latents.device), step_order[places].to(latents.device)
    index = rows[:, None]
    return TrajectoryMinibatch(
        rows=rows,
        steps=steps,
        latents=latents,
        old_log_probs=batch.old_log_probs[index, steps],
        advantages=batch.advantages[places.to(batch.advantages.device)],
        cond=cond,
        total=len(planned),
    )


def _idle(batch: TrajectoryBatch, steps: Tensor, total: int) -> TrajectoryMinibatch:
    """What a rank without a row works on. Zeros: a sample of its own may hold NaN (0 x NaN)."""
    latents = torch.zeros_like(batch.trajectory.latents[:1])
    row = torch.zeros(1, dtype=torch.long)
    return TrajectoryMinibatch(
        rows=row.to(latents.device),
        steps=steps.to(latents.device),
        latents=latents,
        old_log_probs=torch.zeros(steps.shape, device=latents.device),
        advantages=torch.zeros(1, device=latents.device),
        cond=batch.cond.take(row),
        total=total,
        idle=True,
    )
