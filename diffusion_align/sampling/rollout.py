"""Rollouts: from noise to clean latents without gradients, with the likelihood of every step.

The reverse step is `Schedule.step`, the same one that DDPO evaluates again, reward backpropagation
replays and the comparison samples with. Latents are stored in float32: rounding them to bfloat16
would move the ratio of an untouched policy by many times the usual clip range.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.diffusion.transitions import Transition
from diffusion_align.sampling.options import FlowKind
from diffusion_align.sampling.seeds import normal

if TYPE_CHECKING:
    from diffusion_align.policy.conditioning import Conditioning
    from diffusion_align.policy.policy import Policy


@dataclass(frozen=True)
class Trajectory:
    """B items on their way from x_T to x_0.

    Args:
        latents: float32 [B, S+1, *latent], x_T first and x_0 last; [B, 1, *latent] holding x_0
            alone when the rollout kept only that.
        log_probs: float32 [B, S] of log p(x_{i+1} | x_i); NaN on steps that took no noise, and
            everywhere when only x_0 was kept.
        cond: what the B items were conditioned on.
        schedule: of S steps.
    """

    latents: Tensor
    log_probs: Tensor
    cond: Conditioning
    schedule: Schedule

    @property
    def x_0(self) -> Tensor:
        """Clean latents, float32 [B, *latent]."""
        return self.latents[:, -1]

    def __len__(self) -> int:
        return self.latents.shape[0]

    def take(self, indices: Tensor | Sequence[int]) -> Trajectory:
        """The items at `indices` (long [N], any order)."""
        index = torch.as_tensor(indices, dtype=torch.long)
        return replace(
            self,
            latents=self.latents[index.to(self.latents.device)],
            log_probs=self.log_probs[index.to(self.log_probs.device)],
            cond=self.cond.take(index),
        )


@torch.no_grad()
def rollout(
    policy: Policy,
    cond: Conditioning,
    schedule: Schedule,
    streams: Sequence[np.random.Generator],
    *,
    guidance_scale: float,
    eta: float = 1.0,
    flow_kind: FlowKind = "sde",
    noise_level: float = 0.7,
    reduction: Literal["mean", "sum"] = "mean",
    batch_size: int = 32,
    keep: Literal["all", "final"] = "all",
    noisy: Tensor | None = None,
    starts: Sequence[np.random.Generator] | None = None,
) -> Trajectory:
    """Sample B items, `batch_size` at a time.

    Each item draws its initial latent first and then one noise per step that takes any, from its
    own stream, so that the picture is the same whatever the batch size (to rounding; bit for bit at
    the same batch shape).

    Args:
        policy: the model; inside `policy.reference()` it is the reference that samples.
        cond: B items, encoded with this guidance.
        schedule: of S steps.
        streams: B streams, fresh; they are advanced.
        guidance_scale: see `Policy.predict`.
        eta: DDIM noise.
        flow_kind, noise_level: reverse process of flow models.
        reduction: unit of the log-probabilities, over the latent's dimensions.
        batch_size: items per denoiser call.
        keep: "all" for training; "final" keeps x_0 alone and computes no likelihood.
        noisy: bool [B, S], which steps of each item take noise where the schedule has any; the
            others are the deterministic step (eta 0, flow_kind ode). None means all.
        starts: B streams, fresh, that draw the initial latents in place of `streams`, which draw
            theirs all the same: items that share a start differ by the steps' noise alone.

    Returns:
        A trajectory on the policy's device.
    """
    if len(streams) != len(cond):
        raise ValueError(f"{len(cond)} items but {len(streams)} streams")
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size} is not at least 1")
    items, steps, shape = len(cond), len(schedule), cond.latent_shape
    std = schedule.std(eta=eta, flow_kind=flow_kind, noise_level=noise_level)
    stochastic = std > 0
    takes_noise = stochastic.expand(items, steps) if noisy is None else stochastic & noisy.cpu()
    kept = torch.empty((items, steps + 1 if keep == "all" else 1, *shape), device=policy.device)
    log_probs = torch.full((items, steps), torch.nan, device=policy.device)
    for start in range(0, items, batch_size):
        rows = slice(start, min(start + batch_size, items))
        # The whole batch needs no copy of its conditioning.
        whole = rows.stop - rows.start == items
        part = cond if whole else cond.take(range(rows.start, rows.stop))
        sources = streams[rows]
        first = normal(sources, shape)
        if starts is not None:
            first = normal(starts[rows], shape)
        x = policy.initial_noise(first.to(policy.device))
        if keep == "all":
            kept[rows, 0] = x
        for i in range(steps):
            prediction = policy.predict(
                x, schedule.timesteps[i], part, guidance_scale=guidance_scale
            )
            step = schedule.step(
                prediction, x, i, eta=eta, flow_kind=flow_kind, noise_level=noise_level
            )
            wanted = takes_noise[rows, i]
            if stochastic[i] and not bool(wanted.all()):
                quiet = schedule.step(prediction, x, i, eta=0.0, flow_kind="ode")
                x = _mixed(step, quiet, sources, wanted)
            elif stochastic[i]:
                x = step.sample(normal(sources, shape).to(policy.device))
            else:
                x = step.mean
            if keep == "all" and bool(wanted.any()):
                log_prob = step.log_prob(x, reduction)
                log_probs[rows, i] = log_prob.where(wanted.to(policy.device), torch.nan)
            if keep == "all":
                kept[rows, i + 1] = x
        if keep == "final":
            kept[rows, 0] = x
    return Trajectory(kept, log_probs, cond, schedule)


def _mixed(
    step: Transition, quiet: Transition, streams: Sequence[np.random.Generator], wanted: Tensor
) -> Tensor:
    """The next latents: with noise where it is `wanted` (bool [B]), else those of `quiet`.

    Only the streams that are wanted are drawn from.
    """
    noise = torch.zeros(step.mean.shape)
    drawing = [source for source, draws in zip(streams, wanted.tolist()) if draws]
    noise[wanted] = normal(drawing, noise.shape[1:])
    mask = wanted.view(-1, *[1] * (noise.ndim - 1)).to(step.mean.device)
    return torch.where(mask, step.sample(noise.to(step.mean.device)), quiet.mean)
