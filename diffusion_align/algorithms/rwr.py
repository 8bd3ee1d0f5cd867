"""RWR: reward-weighted regression, DDPO's predecessor.

The policy samples pictures, each gets a weight from its reward, and the policy is fitted to its own
pictures again, by the loss that diffusion models are trained with:

    mean over samples, timesteps, noise of  w_i |f(alpha_t x_0 + sigma_t eps, t, c) - y|^2

y is whatever the model predicts (eps, v, flow velocity, x_0; `diffusion.noising.target`), w one of
`weights.py`. It needs clean latents and no likelihoods, so it samples with any sampler, also one
without noise, and stores one latent per sample.

*Source:* Black et al. 2023 (arXiv 2305.13301), section 4.1, and jannerm/ddpo; Lee et al. 2023
(arXiv 2302.12192). How we differ: the exponent is the normalised reward; t is one of the timesteps
that sampling visits, without repetition within a sample, where theirs is any of the training
timesteps; the prompt is always given (neither guidance nor prompt dropout in training), as in DDPO
without train_guidance; failed rewards take no part.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from numpy.random import Generator
from torch import Tensor

from diffusion_align.algorithms.base import Alone, Group, Listener, Needs, Samples, Silence
from diffusion_align.algorithms.checks import as_reward
from diffusion_align.algorithms.collection import (
    Collection,
    collect_samples,
    reward_metrics,
    run_record,
)
from diffusion_align.algorithms.likelihood import tells_guidance
from diffusion_align.algorithms.losses import weighted_denoising_loss
from diffusion_align.algorithms.online import Online
from diffusion_align.algorithms.rwr_options import RWROptions
from diffusion_align.algorithms.sharing import weighted
from diffusion_align.algorithms.weights import (
    best_share,
    effective_share,
    exponential_weights,
    sparse_weights,
)
from diffusion_align.data.prompts import PromptSource
from diffusion_align.diffusion.noising import add_noise, target
from diffusion_align.errors import UserError
from diffusion_align.policy import Conditioning, Policy
from diffusion_align.sampling.options import SamplingOptions, resolve_sampling
from diffusion_align.sampling.rollout import Trajectory
from diffusion_align.sampling.seeds import normal
from reward_models.base import Reward
from reward_models.plugin import ScoreFunction


@dataclass(frozen=True)
class WeightedBatch:
    """One iteration: N clean latents and their weights, K timesteps in each of E inner epochs.

    weights: float32 [N], NaN where the reward failed; sample_orders: long [E, N] and step_orders:
    long [E, N, K]; all on the CPU. In a group N is all ranks' samples; `collected.trajectory` holds
    the clean latents and conditioning of those at `collected.share.places`.
    """

    iteration: int
    collected: Collection
    weights: Tensor
    sample_orders: Tensor
    step_orders: Tensor
    metrics: Mapping[str, float]

    @property
    def trajectory(self) -> Trajectory:
        """The clean latents and what they were conditioned on."""
        return self.collected.trajectory

    @property
    def samples(self) -> Samples:
        """A few pictures to be looked at."""
        return self.collected.samples


@dataclass(frozen=True)
class WeightedMinibatch:
    """B samples, K noised copies of each.

    x_0: [B, *latent]; eps: [B, K, *latent]; steps: long [B, K]; weights: [B], above 0; cond: [B].

    In a group these are the `count` rows that this rank holds of a minibatch of `total`. A rank
    that holds none takes part with one row of weight 0.
    """

    x_0: Tensor
    eps: Tensor
    steps: Tensor
    weights: Tensor
    cond: Conditioning
    count: int
    total: int


class RWR:
    """Regression on the policy's own samples, weighted by any reward, differentiable or not.

    Args:
        policy: loaded with LoRA or for full fine-tuning.
        reward: any `Reward`, or a function `fn(images, prompts) -> [B]`; higher is better.
        prompts: as for `DDPO`.
        options: see `RWROptions`.
        sampling: how to sample; None in it means the model's own value.
        seed: of everything random here.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward | ScoreFunction,
        prompts: PromptSource,
        *,
        options: RWROptions | None = None,
        sampling: SamplingOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.reward = as_reward(reward)
        self.options = o = options or RWROptions()
        self.sampling = resolve_sampling(sampling or SamplingOptions(), policy.info)
        self.needs = Needs(clean_latents=True)
        self.listener: Listener = Silence()
        self.group: Group = Alone()
        s = self.sampling
        self._schedule = policy.schedule(s.steps, height=s.height, width=s.width)
        self._timesteps = self._schedule.timesteps.to(policy.device)
        self._copies = o.trained_steps(len(self._schedule))
        # A network that is told its guidance has no conditional branch to fit by itself.
        self._guidance = s.guidance_scale if tells_guidance(policy) else 1.0
        self._online = Online(policy, prompts, o, s, seed)
        noisy = self._schedule.stochastic_steps(
            eta=s.eta, flow_kind=s.flow_kind, noise_level=s.noise_level
        )
        if o.shared_noise and o.samples_per_prompt > 1 and not len(noisy):
            raise UserError(
                "the samples of a prompt begin with the same noise and no step takes any, so they "
                "would all be one picture",
                where="algorithm.shared_noise",
                fix="set sampling.eta=1 (for flow models sampling.flow_kind=sde), or leave it out",
            )

    def describe(self) -> list[str]:
        """What is learnt from, and what an iteration consists of."""
        o = self.options
        normalised = f"rewards normalised by {o.advantages}"
        if o.weighting == "exponential":
            how = f"exp(reward / {o.used_temperature:g}), {normalised}"
        elif o.threshold is None:
            how = f"of the samples above quantile {o.used_quantile:g} alone, {normalised}"
        else:
            how = f"of the samples whose reward is at least {o.threshold:g} alone"
        return [
            f"weights: {how}; 1 on average",
            f"one iteration: {o.prompts_per_iteration} prompts x {o.samples_per_prompt} samples, "
            f"{self._copies} of {self.sampling.steps} timesteps of each in {o.inner_epochs} inner "
            f"epochs, guidance {self.sampling.guidance_scale:g} in sampling and "
            f"{'none' if self._guidance == 1 else f'{self._guidance:g}'} in training",
        ]

    def record(self) -> dict[str, Any]:
        """The reward's name and those it is made of, and the prompts' texts, for the run folder."""
        return run_record(self.reward, self._online.plan)

    def collect(self, iteration: int) -> WeightedBatch:
        """Sample, score, weigh.

        Where no sample reaches `threshold` all weights are 0 and the iteration has no minibatches:
        nothing is learnt from it, which is said, and the next one is sampled from the same policy.
        The guard equal_rewards ends a run that stays so; without it sampling goes on until a sample
        reaches it or somebody stops the run.

        Raises:
            UserError: no reward at all.
        """
        collected = collect_samples(
            self.policy,
            self.reward,
            self._online.plan,
            iteration,
            schedule=self._schedule,
            sampling=self.sampling,
            reduction="mean",
            listener=self.listener,
            options=self.options,
            keep="final",
            group=self.group,
        )
        weights = self._weights(collected, iteration)
        epochs = self.options.inner_epochs
        return WeightedBatch(
            iteration=iteration,
            collected=collected,
            weights=weights,
            sample_orders=self._online.plan.minibatch_orders(iteration, epochs),
            step_orders=self._online.plan.timestep_orders(
                iteration, epochs, torch.arange(len(self._schedule)), self._copies
            ),
            metrics=self._metrics(collected, weights),
        )

    def _weights(self, collected: Collection, iteration: int) -> Tensor:
        o, rewards = self.options, collected.scores.values
        if o.threshold is not None:
            weights = sparse_weights(rewards, o.threshold)
            if not bool((weights > 0).any()):
                best = float(rewards[collected.valid].max())
                self.listener.message(
                    f"iteration {iteration}: no reward reaches algorithm.threshold={o.threshold:g}"
                    f" (the best is {best:.4g}), nothing is learnt from it"
                )
            return weights
        normalised = self._online.normalised(collected)
        if o.weighting == "exponential":
            return exponential_weights(normalised, o.used_temperature)
        return sparse_weights(normalised, best_share(normalised, o.used_quantile))

    def _metrics(self, collected: Collection, weights: Tensor) -> dict[str, float]:
        trained = int((weights > 0).sum()) * self._copies * self.options.inner_epochs
        known = weights[~weights.isnan()]
        return {
            **reward_metrics(collected),
            # Equal weights teach as much as others do; only a share of 0 leaves nothing to learn.
            "weight/positive": float((known > 0).float().mean()),
            "weight/std": float(known.std(correction=0)),
            "weight/max": float(known.max()),
            "weight/effective_share": effective_share(weights),
            **self._online.spend(3 * trained),  # a backward counts as two forwards
        }

    def minibatch_count(self) -> int:
        """Minibatches of an iteration (fewer only where all weights of one are 0 or missing)."""
        return self.options.minibatches

    def minibatch_arithmetic(self) -> str:
        """`32 samples / 8 x 2 inner epochs = 8 minibatches`."""
        return self.options.arithmetic

    def minibatches(self, batch: WeightedBatch) -> Iterator[WeightedMinibatch]:
        """Shuffled samples in chunks of `train_batch_size`, without those of no weight.

        A sample's noise is drawn from its own stream, one draw per inner epoch.
        """
        collected = batch.collected
        streams = self._online.plan.noise_streams(collected.items, batch.iteration)
        weighs = batch.weights > 0  # NaN is not
        for order, steps in zip(batch.sample_orders, batch.step_orders, strict=True):
            for planned in order.split(self.options.train_batch_size):
                places = planned[weighs[planned]]
                if len(places):
                    yield self._gather(batch, places, steps, streams)

    def _gather(
        self, batch: WeightedBatch, planned: Tensor, steps: Tensor, streams: Sequence[Generator]
    ) -> WeightedMinibatch:
        trajectory = batch.trajectory
        places, rows = batch.collected.share.held(planned)
        weights, count = batch.weights[places], len(rows)
        device = trajectory.latents.device
        x_0 = trajectory.x_0[rows.to(device)]
        shape = (self._copies, *x_0.shape[1:])
        eps = normal([streams[place] for place in places.tolist()], shape)
        if not count:  # zeros: a sample of its own may hold NaN (0 x NaN)
            places, rows, weights = planned[:1], torch.zeros(1, dtype=torch.long), torch.zeros(1)
            x_0, eps = torch.zeros_like(trajectory.x_0[:1]), torch.zeros(1, *shape)
        return WeightedMinibatch(
            x_0=x_0,
            eps=eps.to(device),
            steps=steps[places].to(device),
            weights=weights.to(device),
            cond=trajectory.cond.take(rows),
            count=count,
            total=len(planned),
        )

    def losses(
        self, minibatch: WeightedMinibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The weighted regression, one loss per group of `timesteps_per_loss` noised copies.

        The losses of a minibatch add up to scale x the mean over train_batch_size x K pairs;
        samples without a weight count as zeros in it.
        """
        samples, copies = minibatch.steps.shape
        # Gradients are averaged over the ranks, hence the group's size.
        share = scale * self.group.size * samples / self.options.train_batch_size
        part = minibatch.count * self.group.size / minibatch.total
        for start in range(0, copies, self.options.timesteps_per_loss):
            group = slice(start, min(start + self.options.timesteps_per_loss, copies))
            size = group.stop - group.start
            item = torch.arange(samples).repeat_interleave(size)
            steps, eps = minibatch.steps[:, group].flatten(), minibatch.eps[:, group].flatten(0, 1)
            x_0 = minibatch.x_0.repeat_interleave(size, dim=0)
            alpha, sigma = self._schedule.alpha_sigma(steps)
            prediction = self.policy.predict(
                add_noise(x_0, eps, alpha, sigma),
                self._timesteps[steps],
                minibatch.cond if size == 1 else minibatch.cond.take(item),
                guidance_scale=self._guidance,
            )
            wanted = target(x_0, eps, alpha, sigma, self._schedule.prediction)
            weights = minibatch.weights.repeat_interleave(size)
            loss = weighted_denoising_loss(prediction, wanted, weights)
            with torch.no_grad():
                plain = weighted_denoising_loss(prediction, wanted, torch.ones_like(weights))
            metrics = {"policy/loss": loss.detach(), "policy/denoising_error": plain}
            yield loss * (share * size / copies), weighted(metrics, part)

    def loss_count(self, minibatch: WeightedMinibatch) -> int:
        """How many losses `losses` yields."""
        return math.ceil(minibatch.steps.shape[1] / self.options.timesteps_per_loss)

    def state_dict(self) -> dict[str, Any]:
        """What `Online` keeps: nothing else changes."""
        return self._online.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            UserError: of a run on other prompts.
        """
        self._online.load_state_dict(state)
