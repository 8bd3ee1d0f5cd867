"""DDPO: policy gradient on the exact likelihood of every denoising step.

A trajectory x_T ... x_0 is a sequence of Gaussian actions p(x_next | x_t, c); its reward r(x_0, c)
says how good all of them were. With the advantage A of the sample, DDPO minimises

    mean over samples, steps of  max(-A rho, -A clip(rho, 1 - c, 1 + c)),
    rho = exp(log p(x_next | x_t, c) - log p_old(x_next | x_t, c)),

optionally plus kl_weight times KL(policy || reference) of each step.

*Source:* Black et al. 2023 (arXiv 2305.13301), equation 5 (DDPO_IS), and its ddpo-pytorch code.
How we differ: advantages never truncate, failed rewards take no part, the ratio of an untouched
policy is shown to be 1 before the first update, a collapsed prompt gives no gradient.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion_align.algorithms.advantages import Normaliser, PromptStatistics
from diffusion_align.algorithms.base import Listener, Needs, Silence
from diffusion_align.algorithms.batches import TrajectoryBatch, TrajectoryMinibatch, cut
from diffusion_align.algorithms.checks import as_reward, check_sampling
from diffusion_align.algorithms.collection import (
    Collection,
    collect_samples,
    encode,
    reward_metrics,
)
from diffusion_align.algorithms.likelihood import Likelihood, branches
from diffusion_align.algorithms.losses import clipped_policy_loss
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.plan import Plan
from diffusion_align.algorithms.replay import (
    FloatProbe,
    ReplayReport,
    Wish,
    judge,
    ratio_deviation,
    refuse_dropout,
)
from diffusion_align.algorithms.untouched import Untouched
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.policy import Policy
from diffusion_align.sampling.options import SamplingOptions, resolve_sampling
from reward_models.base import Reward
from reward_models.plugin import ScoreFunction


class DDPO:
    """Online policy gradient for any reward, differentiable or not.

    Args:
        policy: loaded with LoRA or for full fine-tuning.
        reward: any `Reward`, or a function `fn(images, prompts) -> [B]`; higher is better.
        prompts: what to sample pictures of, each once: a list of strings or `Prompt`s, a file, or
            the name of a built-in list.
        options: see `DDPOOptions`.
        sampling: how to sample; None in it means the model's own value. It needs noise: eta > 0,
            or a flow kind other than ode.
        seed: of everything random here.

    Raises:
        UserError: options, sampling and model that do not fit together.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward | ScoreFunction,
        prompts: str | Path | Sequence[str | Prompt],
        *,
        options: DDPOOptions | None = None,
        sampling: SamplingOptions | None = None,
        seed: int = 0,
    ) -> None:
        self.policy = policy
        self.reward = as_reward(reward)
        self.options = o = options or DDPOOptions()
        self.sampling = resolve_sampling(sampling or SamplingOptions(), policy.info)
        self.needs = Needs(trajectory=True, reference=o.kl_weight > 0)
        self.listener: Listener = Silence()
        self._likelihood = Likelihood(
            policy,
            policy.schedule(self.sampling.steps),
            self.sampling,
            "mean" if o.clip_unit == "mean" else "sum",
        )
        self._steps = self._likelihood.stochastic_steps()
        check_sampling(o, self.sampling, self._likelihood.schedule.family, len(self._steps))
        refuse_dropout(policy.denoiser)
        # The tiny term keeps 0.29 x 100 from flooring to 28.
        self._trained_steps = max(1, int(len(self._steps) * o.timestep_fraction + 1e-9))
        self._guidance = self.sampling.guidance_scale if o.train_guidance else 1.0
        known = load_prompts(prompts if isinstance(prompts, str | Path) else list(prompts))
        self._plan = Plan(known, o.prompts_per_iteration, o.samples_per_prompt, seed)
        statistics = PromptStatistics(o.buffer_size, o.buffer_min_count)
        self._normaliser = Normaliser(o.advantages, o.advantage_clip, statistics)
        self._calls = 0
        self._replays: bool | None = None  # None: the replay check has not run yet

    def describe(self) -> list[str]:
        """The clip range in both units, and what an iteration consists of."""
        o, n = self.options, self._likelihood.dimensions
        mean = o.clip_range if o.clip_unit == "mean" else o.clip_range / n
        return [
            f"clip range {o.clip_range:g} {o.clip_unit}: {mean:.3g} in the mean over {n} "
            f"dimensions, {mean * n:.3g} nats in their sum",
            f"one iteration: {o.prompts_per_iteration} prompts x {o.samples_per_prompt} samples, "
            f"{self._trained_steps} of {self.sampling.steps} steps trained, guidance "
            f"{self.sampling.guidance_scale:g} in sampling and {self._guidance:g} in training",
        ]

    def record(self) -> dict[str, Any]:
        """The reward's name and those it is made of, and the prompts' texts, for the run folder."""
        prompts = [prompt.text for prompt in self._plan.prompts]
        info = self.reward.info
        rewards = list(dict.fromkeys([info.name, *info.components]))
        return {"trained_on": rewards, "prompts": prompts}

    def collect(self, iteration: int) -> TrajectoryBatch:
        """Sample, score, normalise. Before the very first update the replay check runs as well.

        Raises:
            UserError: no reward at all, or the replay check failed.
        """
        o = self.options
        collected = collect_samples(
            self.policy,
            self.reward,
            self._plan,
            iteration,
            schedule=self._likelihood.schedule,
            sampling=self.sampling,
            reduction=self._likelihood.reduction,
            listener=self.listener,
        )
        trajectory = collected.trajectory
        cond = trajectory.cond
        if self._guidance != self.sampling.guidance_scale:
            prompts = [item.prompt for item in collected.items]
            cond = encode(self.policy, prompts, self.sampling, self._guidance)
        batch = TrajectoryBatch(
            trajectory=trajectory,
            cond=cond,
            old_log_probs=trajectory.log_probs,
            advantages=self._advantages(collected).to(trajectory.latents.device),
            sample_orders=self._plan.minibatch_orders(iteration, o.inner_epochs),
            step_orders=self._plan.timestep_orders(
                iteration, o.inner_epochs, self._steps, self._trained_steps
            ),
            metrics={},
            samples=collected.samples,
        )
        if self._replays is None:
            report = self.check_replay(batch)
            self.listener.message(report.sentence())
            self._replays = report.decision == "replayed"
        if self._replays:
            self.listener.progress("replaying", 0, 1)
            old_log_probs = self._replay(batch, self._guidance)
            batch = replace(batch, old_log_probs=old_log_probs)
        return replace(batch, metrics=self._metrics(collected, batch))

    def _advantages(self, collected: Collection) -> Tensor:
        return self._normaliser(
            collected.scores.values,
            [item.prompt.text for item in collected.items],
            [item.position for item in collected.items],
        )

    def _metrics(self, collected: Collection, batch: TrajectoryBatch) -> dict[str, float]:
        valid = int(collected.valid.sum())
        trained = valid * self._trained_steps * self.options.inner_epochs
        sampled = len(self._plan) * self.sampling.steps * branches(self.sampling.guidance_scale)
        # A backward counts as two forwards (DESIGN section 3); the reference adds a forward.
        per_pair = 3 + (self.options.kl_weight > 0)
        self._calls += sampled + trained * per_pair * branches(self._guidance)
        return {
            **reward_metrics(collected),
            **self._normaliser.metrics(batch.advantages),
            "cost/calls": float(self._calls),
        }

    def minibatch_count(self) -> int:
        """Minibatches of an iteration (fewer only where all rewards of one failed)."""
        return self.options.minibatches

    def minibatch_arithmetic(self) -> str:
        """`32 samples / 8 x 2 inner epochs = 8 minibatches`."""
        return self.options.arithmetic

    def minibatches(self, batch: TrajectoryBatch) -> Iterator[TrajectoryMinibatch]:
        """Shuffled samples in chunks of `train_batch_size`, without those whose reward failed."""
        return cut(batch, self.options.train_batch_size)

    def losses(
        self, minibatch: TrajectoryMinibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """The clipped surrogate, one loss per group of `timesteps_per_loss` steps.

        The losses of a minibatch add up to scale x the mean over train_batch_size x T pairs,
        however the steps are grouped; samples taken out for a failed reward count as zeros in it.
        """
        share = scale * len(minibatch.rows) / self.options.train_batch_size
        steps = minibatch.steps.shape[1]
        for group in minibatch.groups(self.options.timesteps_per_loss):
            pairs = minibatch.pairs(group)
            transition = self._likelihood.transition(pairs, self._guidance)
            log_prob = transition.log_prob(pairs.x_next, self._likelihood.reduction)
            old_log_prob = minibatch.old_log_probs[:, group]
            advantage = minibatch.advantages[:, None].expand_as(old_log_prob)
            loss, ratio = clipped_policy_loss(
                log_prob.view_as(old_log_prob), old_log_prob, advantage, self.options.bounds
            )
            metrics = {
                "policy/loss": loss.detach(),
                "policy/clip_fraction": ratio.clip_fraction,
                "policy/ratio": ratio.mean,
                "policy/ratio_deviation_max": ratio.max_deviation,
                "policy/kl_old": ratio.kl,
            }
            if self.options.kl_weight > 0:
                with torch.no_grad(), self.policy.reference():
                    reference = self._likelihood.transition(pairs, self._guidance)
                kl = transition.kl(reference, self._likelihood.reduction).mean()
                loss = loss + self.options.kl_weight * kl
                metrics["policy/kl_reference"] = kl.detach()
            yield loss * (share * old_log_prob.shape[1] / steps), metrics

    def loss_count(self, minibatch: TrajectoryMinibatch) -> int:
        """How many losses `losses` yields."""
        return math.ceil(minibatch.steps.shape[1] / self.options.timesteps_per_loss)

    def check_replay(self, batch: TrajectoryBatch) -> ReplayReport:
        """Compute the rollout of an untouched policy again in the training batches' shapes.

        Raises:
            UserError: |ratio - 1| exceeds the bar (1e-6 for `mean`, 1e-4 for `nats`) by something
                that replaying in the training shape cannot cure (the report names each timestep),
                or the policy is not its reference.
        """
        self.listener.progress("checking", 0, 1)
        wish: Wish = self.options.old_log_probs
        if wish == "auto" and self._guidance != self.sampling.guidance_scale:
            wish = "replayed"
        sampled = batch.trajectory.log_probs
        with FloatProbe(self.policy.denoiser) as precision:
            as_sampled = replace(batch, cond=batch.trajectory.cond)
            again = self._replay(as_sampled, self.sampling.guidance_scale)
        report = self._judge(ratio_deviation(again, sampled), wish, precision.result)
        first, group = next(self.minibatches(batch)), self.options.timesteps_per_loss
        untouched = Untouched(self._likelihood, first, self._guidance, group)
        drift = ratio_deviation(untouched.gradient_drift(sampled), torch.zeros_like(sampled))
        self._judge(drift, "sampled", precision.result)
        untouched.look_closer(self.options, is_float32=precision.result, listener=self.listener)
        return report

    def _judge(self, deviation: Tensor, wish: Wish, is_float32: bool) -> ReplayReport:
        return judge(
            timesteps=self._likelihood.schedule.timesteps,
            deviation=deviation.cpu(),
            reduction=self._likelihood.reduction,
            dimensions=self._likelihood.dimensions,
            wish=wish,
            is_float32=is_float32,
            clip_range=self.options.clip_range,
        )

    def _replay(self, batch: TrajectoryBatch, guidance: float) -> Tensor:
        log_probs = self._likelihood.replay(
            self.minibatches(batch),
            batch.trajectory.log_probs,
            self.options.timesteps_per_loss,
            guidance,
        )
        self._calls += int((~log_probs.isnan()).sum()) * branches(guidance)
        return log_probs

    def state_dict(self) -> dict[str, Any]:
        """Per-prompt statistics, calls so far, the replay check's decision.

        The data cursor is the iteration itself: the plan is a function of seed and iteration.
        """
        return {
            "statistics": self._normaliser.statistics.state_dict(),
            "calls": self._calls,
            "replays": self._replays,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._normaliser.statistics.load_state_dict(state["statistics"])
        self._calls = state["calls"]
        self._replays = state["replays"]
