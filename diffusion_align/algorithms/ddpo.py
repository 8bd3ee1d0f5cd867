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
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from diffusion_align.algorithms.advantages import without_small
from diffusion_align.algorithms.base import Alone, Group, Listener, Needs, Silence
from diffusion_align.algorithms.batches import TrajectoryBatch, TrajectoryMinibatch, cut
from diffusion_align.algorithms.checks import as_reward, check_sampling, in_window
from diffusion_align.algorithms.collection import (
    Collection,
    collect_samples,
    encode,
    reward_metrics,
    run_record,
)
from diffusion_align.algorithms.likelihood import Likelihood, branches, tells_guidance
from diffusion_align.algorithms.losses import clipped_policy_loss
from diffusion_align.algorithms.online import Online
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.replay import (
    FloatProbe,
    ReplayReport,
    Wish,
    judge,
    ratio_deviation,
    refuse_dropout,
)
from diffusion_align.algorithms.sharing import weighted
from diffusion_align.algorithms.untouched import Untouched
from diffusion_align.data.prompts import PromptSource
from diffusion_align.policy import Policy
from diffusion_align.sampling.options import SamplingOptions, resolve_sampling
from reward_models.base import Reward
from reward_models.plugin import ScoreFunction


class DDPO:
    """Online policy gradient for any reward, differentiable or not.

    Args:
        policy: loaded with LoRA or for full fine-tuning.
        reward: any `Reward`, or a function `fn(images, prompts) -> [B]`; higher is better.
        prompts: what to sample pictures of, each once: a list of strings or `Prompt`s, a file, the
            name of a built-in list, or a function that returns a list.
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
        prompts: PromptSource,
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
        self.group: Group = Alone()
        self._likelihood = Likelihood(
            policy,
            policy.schedule(
                self.sampling.steps, height=self.sampling.height, width=self.sampling.width
            ),
            self.sampling,
            "mean" if o.clip_unit == "mean" else "sum",
        )
        stochastic = self._likelihood.stochastic_steps()
        check_sampling(o, self.sampling, self._likelihood.schedule.family, len(stochastic))
        self._steps = in_window(
            stochastic,
            self.sampling.steps,
            o.window_start,
            o.window_end,
            at_least=o.noise_window,
        )
        refuse_dropout(policy.denoiser)
        self._trained_steps = o.drawn(o.noisy(len(self._steps)))
        if o.step_weights == "prediction":
            weights = self._likelihood.by_leverage(self._steps)
            self._likelihood = replace(self._likelihood, weights=weights)
        # A network that is told its guidance has no unguided branch: 1 would be another policy.
        guided = o.train_guidance or tells_guidance(policy)
        self._guidance = self.sampling.guidance_scale if guided else 1.0
        self._online = Online(policy, prompts, o, self.sampling, seed)
        self._replays: bool | None = None  # None: the replay check has not run yet

    def describe(self) -> list[str]:
        """The clip range in both units, what an iteration consists of, the unit of the KL."""
        o, n = self.options, self._likelihood.dimensions
        mean = o.clip_range if o.clip_unit == "mean" else o.clip_range / n
        unit = f"nats, averaged over {n} dimensions" if o.clip_unit == "mean" else "nats"
        kl = [f"KL to the reference, per step in {unit}: weight {o.kl_weight:g}"]
        return [
            f"clip range {o.clip_range:g} {o.clip_unit}: {mean:.3g} in the mean over {n} "
            f"dimensions, {mean * n:.3g} nats in their sum",
            f"one iteration: {o.prompts_per_iteration} prompts x {o.samples_per_prompt} samples, "
            f"{self._trained_steps} of {self.sampling.steps} steps trained"
            f"{f' ({o.noise_window} have noise)' if o.noise_window else ''}, guidance "
            f"{self.sampling.guidance_scale:g} in sampling and {self._guidance:g} in training",
            *self._scaling(),
            *(kl if o.kl_weight > 0 else []),
        ]

    def _scaling(self) -> list[str]:
        if self._likelihood.weights is None:
            return []
        used = self._likelihood.weights[self._steps]
        return [
            f"log-ratios are scaled at each step, by {used.max():.3g} to {used.min():.3g}; the "
            "clip range is that of the scaled ones"
        ]

    def record(self) -> dict[str, Any]:
        """The reward's name and those it is made of, and the prompts' texts, for the run folder."""
        return run_record(self.reward, self._online.plan)

    def collect(self, iteration: int) -> TrajectoryBatch:
        """Sample, score, normalise. Before the very first update the replay check runs as well.

        Raises:
            UserError: no reward at all, or the replay check failed.
        """
        o = self.options
        steps, noisy = self._steps, None
        if o.noise_window:
            steps = self._online.plan.windows(iteration, self._steps, o.noise_window)
            nowhere = torch.zeros(len(steps), self.sampling.steps, dtype=torch.bool)
            noisy = nowhere.scatter(1, steps, True)
        collected = collect_samples(
            self.policy,
            self.reward,
            self._online.plan,
            iteration,
            schedule=self._likelihood.schedule,
            sampling=self.sampling,
            reduction=self._likelihood.reduction,
            listener=self.listener,
            options=o,
            group=self.group,
            noisy=noisy,
        )
        trajectory = collected.trajectory
        cond = trajectory.cond
        if self._guidance != self.sampling.guidance_scale:
            prompts = [collected.items[i].prompt for i in collected.share.places.tolist()]
            cond = encode(self.policy, prompts, self.sampling, self._guidance)
        advantages = self._online.normalised(collected)
        learnt = without_small(advantages, o.advantage_floor)
        batch = TrajectoryBatch(
            trajectory=trajectory,
            cond=cond,
            old_log_probs=self._likelihood.weighted(trajectory.log_probs),
            advantages=learnt.to(trajectory.latents.device),
            sample_orders=self._online.plan.minibatch_orders(iteration, o.inner_epochs),
            step_orders=self._online.plan.timestep_orders(
                iteration, o.inner_epochs, steps, self._trained_steps
            ),
            metrics={},
            samples=collected.samples,
            share=collected.share,
        )
        if self._replays is None:
            report = self.check_replay(batch)
            self.listener.message(report.sentence())
            self._replays = report.decision == "replayed"
        if self._replays:
            self.listener.progress("replaying", 0, 1)
            old_log_probs = self._replay(batch, self._guidance)
            batch = replace(batch, old_log_probs=old_log_probs)
        return replace(batch, metrics=self._metrics(collected, advantages, learnt))

    def _metrics(
        self, collected: Collection, advantages: Tensor, learnt: Tensor
    ) -> dict[str, float]:
        known = int((~learnt.isnan()).sum())
        trained = known * self._trained_steps * self.options.inner_epochs
        # A backward counts as two forwards (DESIGN section 3); the reference adds a forward.
        per_pair = 3 + (self.options.kl_weight > 0)
        return {
            **reward_metrics(collected),
            **self._online.spread(advantages),
            "advantage/trained": known / int(collected.valid.sum()),
            **self._online.spend(trained * per_pair * branches(self._guidance, self.policy)),
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
        # Gradients are averaged over the ranks, hence the group's size.
        whole = scale * self.group.size / self.options.train_batch_size
        share = whole * minibatch.count
        part = minibatch.portion * self.group.size
        steps = minibatch.steps.shape[1]
        for group in minibatch.groups(self.options.timesteps_per_loss):
            pairs = minibatch.pairs(group)
            transition = self._likelihood.transition(pairs, self._guidance)
            log_prob = self._likelihood.of(transition, pairs)
            old_log_prob = minibatch.old_log_probs[:, group]
            if minibatch.idle:  # zeros have no old likelihood: a ratio of 1 stays finite
                old_log_prob = log_prob.detach().view_as(old_log_prob)
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
            yield loss * (share * old_log_prob.shape[1] / steps), weighted(metrics, part)

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
        sampled = batch.old_log_probs
        with FloatProbe(self.policy.denoiser) as precision:
            as_sampled = replace(batch, cond=batch.trajectory.cond)
            again = self._replay(as_sampled, self.sampling.guidance_scale)
        report = self._judge(again, sampled, wish, precision.result)
        first, group = next(self.minibatches(batch)), self.options.timesteps_per_loss
        untouched = Untouched(self._likelihood, first, self._guidance, group)
        drift = untouched.gradient_drift(sampled)
        self._judge(drift, torch.zeros_like(drift), "sampled", precision.result)
        untouched.look_closer(self.options, is_float32=precision.result, listener=self.listener)
        return report

    def _judge(
        self, log_probs: Tensor, before: Tensor, wish: Wish, is_float32: bool
    ) -> ReplayReport:
        plain = self._likelihood.plain
        return judge(
            timesteps=self._likelihood.schedule.timesteps,
            deviation=self._worst(ratio_deviation(log_probs, before)),
            unweighted=self._worst(ratio_deviation(plain(log_probs), plain(before))),
            reduction=self._likelihood.reduction,
            dimensions=self._likelihood.dimensions,
            wish=wish,
            is_float32=is_float32,
            clip_range=self.options.clip_range,
        )

    def _worst(self, deviation: Tensor) -> Tensor:
        """[S] of all ranks, so that all decide alike; on the CPU."""
        worst = self.group.gather(deviation.nan_to_num(nan=-1)[None]).amax(dim=0)
        return worst.masked_fill(worst < 0, math.nan).cpu()

    def _replay(self, batch: TrajectoryBatch, guidance: float) -> Tensor:
        log_probs = self._likelihood.replay(
            self.minibatches(batch),
            batch.trajectory.log_probs,
            self.options.timesteps_per_loss,
            guidance,
            lockstep=self.group.lockstep,
        )
        replayed = self.group.gather((~log_probs.isnan()).sum()[None]).sum()
        self._online.calls += int(replayed) * branches(guidance, self.policy)
        return log_probs

    def state_dict(self) -> dict[str, Any]:
        """What `Online` keeps, and the replay check's decision."""
        return {**self._online.state_dict(), "replays": self._replays}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            UserError: of a run on other prompts.
        """
        self._online.load_state_dict(state)
        self._replays = state["replays"]
