"""log p(x_next | x_t, c) of sampled transitions under the policy as it is now."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from diffusion_align.algorithms.batches import Pairs, TrajectoryMinibatch
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.diffusion.transitions import Reduction, Transition
from diffusion_align.policy import Policy
from diffusion_align.sampling.options import ResolvedSampling


@dataclass(frozen=True)
class Likelihood:
    """Evaluates transitions with the very step that sampled them (`Schedule.step`).

    reduction: `mean` or `sum` over the latent's dimensions. One transition costs `branches`
    denoiser calls. weights: [S], what the log-probability of each step is multiplied with, so that
    ratios are those of the weighted ones; None is 1 everywhere.
    """

    policy: Policy
    schedule: Schedule
    sampling: ResolvedSampling
    reduction: Reduction
    weights: Tensor | None = None
    _timesteps: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_timesteps", self.schedule.timesteps.to(self.policy.device))

    @property
    def dimensions(self) -> int:
        """How many numbers one latent has."""
        s = self.sampling
        shape = self.policy.latent_shape(s.height, s.width, s.frames)
        return math.prod(shape)

    def stochastic_steps(self) -> Tensor:
        """Indices of the steps that have a likelihood at all (std above zero): long, on the CPU."""
        return self.schedule.stochastic_steps(
            eta=self.sampling.eta,
            flow_kind=self.sampling.flow_kind,
            noise_level=self.sampling.noise_level,
        )

    def by_leverage(self, steps: Tensor) -> Tensor:
        """Weights [S] by which an equal change of the prediction counts the same at `steps`.

        The mean leverage of these steps over the step's own (`Schedule.leverage`); 1 elsewhere.
        """
        leverage = self.schedule.leverage(
            eta=self.sampling.eta,
            flow_kind=self.sampling.flow_kind,
            noise_level=self.sampling.noise_level,
        )[steps]
        weights = torch.ones(len(self.schedule), device=self.policy.device)
        weights[steps] = (leverage.mean() / leverage).to(weights)
        return weights

    def weighted(self, log_probs: Tensor) -> Tensor:
        """Plain log-probabilities [N, S], weighted."""
        return log_probs if self.weights is None else log_probs * self.weights

    def plain(self, log_probs: Tensor) -> Tensor:
        """Weighted log-probabilities [N, S] without their weights."""
        return log_probs if self.weights is None else log_probs / self.weights

    def of(self, transition: Transition, pairs: Pairs) -> Tensor:
        """The weighted log-probability of K pairs under their transition: [K]."""
        log_prob = transition.log_prob(pairs.x_next, self.reduction)
        return log_prob if self.weights is None else log_prob * self.weights[pairs.steps]

    def transition(self, pairs: Pairs, guidance: float) -> Transition:
        """p(x_next | x_t, c) for K pairs, with a graph where gradients are enabled."""
        prediction = self.policy.predict(
            pairs.x_t, self._timesteps[pairs.steps], pairs.cond, guidance_scale=guidance
        )
        return self.schedule.step(
            prediction,
            pairs.x_t,
            pairs.steps,
            eta=self.sampling.eta,
            flow_kind=self.sampling.flow_kind,
            noise_level=self.sampling.noise_level,
        )

    def log_prob(self, minibatch: TrajectoryMinibatch, group: slice, guidance: float) -> Tensor:
        """[B, G] for the steps of one group, weighted."""
        pairs = minibatch.pairs(group)
        log_prob = self.of(self.transition(pairs, guidance), pairs)
        return log_prob.view(len(minibatch.rows), -1)

    @torch.no_grad()
    def replay(
        self,
        minibatches: Iterable[TrajectoryMinibatch],
        like: Tensor,
        group_size: int,
        guidance: float,
        *,
        lockstep: bool = False,
    ) -> Tensor:
        """Weighted log-probabilities [N, S] in these minibatches' shapes; NaN elsewhere.

        A pair that comes again in a later inner epoch keeps its first value. With `lockstep` the
        forward is made all the same, because other ranks make theirs with it.
        """
        result = torch.full_like(like, math.nan)
        for minibatch in minibatches:
            rows = minibatch.rows[:, None]
            for group in minibatch.groups(group_size):
                steps = minibatch.steps[:, group]
                known = result[rows, steps]
                wanted = not minibatch.idle and bool(known.isnan().any())
                if not wanted and not lockstep:
                    continue
                log_prob = self.log_prob(minibatch, group, guidance)
                if not wanted:
                    continue
                result[rows, steps] = torch.where(known.isnan(), log_prob, known)
        return result


def tells_guidance(policy: Any) -> bool:
    """Whether the network is told the guidance scale, and runs no second branch for it.

    The policy's family says so (`Family.guidance`); one that says nothing has pairs.
    """
    return getattr(getattr(policy, "family", None), "guidance", "") == "embedded"


def branches(guidance: float, policy: Policy | None = None) -> int:
    """Denoiser calls per prediction: 2 for a guidance pair, 1 where the network is told it."""
    return 2 if guidance > 1.0 and not tells_guidance(policy) else 1
