"""DRaFT and its family: the reward's own gradient, back-propagated through the sampler.

The reward r of a sample is differentiated with respect to the policy's weights,

    dL/dtheta = dL/dr  dr/dpixels  dpixels/dx_0  dx_0/dtheta,

and `GradientPlan` says through which of the sampler's steps the last factor goes: DRaFT, DRaFT-K
and DRaFT-LV, AlignProp, ReFL, DRTune and VADER are such plans. One iteration is one update, so the
chains that are re-run are those of the weights as they are:

1. chains are sampled without gradients; the active latents are kept (`active_rollout.py`);
2. pictures are decoded and scored, and dL/dpixels is brought to x_0 (`judged_latents.py`);
3. the active steps are walked back, one graph at a time (`gradient_engines.py`).

*Source:* Clark et al. 2023 (arXiv 2309.17400); the others at `gradient_presets.py`. How we differ:
memory does not grow with the number of steps, whatever is drawn is drawn once per batch, scores of
NaN take no part, and a gradient that is lost on the way stops the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion_align.algorithms import chain_checks as checks
from diffusion_align.algorithms.base import Alone, Group, Listener, Needs, Silence
from diffusion_align.algorithms.checks import as_reward
from diffusion_align.algorithms.collection import reward_metrics, run_record
from diffusion_align.algorithms.draft_batches import DraftBatch, DraftMinibatch, cut
from diffusion_align.algorithms.draft_collection import JudgedChains, collect_chains
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_chain import Chain, Distance
from diffusion_align.algorithms.gradient_engines import ENGINES, MISMATCH, Errand, loss_count
from diffusion_align.algorithms.gradient_plan import DrawnSteps
from diffusion_align.algorithms.likelihood import branches, tells_guidance
from diffusion_align.algorithms.plan import Plan
from diffusion_align.algorithms.replay import FloatProbe, refuse_dropout
from diffusion_align.algorithms.reward_gradient import RangeCheck, RewardLoss
from diffusion_align.algorithms.sharing import weighted
from diffusion_align.data.prompts import PromptSource, load_prompts
from diffusion_align.errors import UserError
from diffusion_align.policy import Policy
from diffusion_align.sampling.options import SamplingOptions, resolve_sampling
from diffusion_align.sampling.seeds import stream
from reward_models.base import Reward
from reward_models.plugin import ScoreFunction

if TYPE_CHECKING:
    from diffusion_align.algorithms.supervised import Supervised

# Beyond any item's position, as in `plan`.
_ACTIVE_STEPS = 2**30 + 3
LIMITS = {True: 1e-3, False: 0.1}
"""Default of mismatch_limit, in float32 or not."""


class Draft:
    """Reward backpropagation, for a reward with a gradient.

    Args:
        policy: loaded with LoRA or for full fine-tuning.
        reward: a differentiable `Reward`, or such a function `fn(images, prompts) -> [B]`.
        prompts: as for `DDPO`.
        options: see `DraftOptions`.
        sampling: how to sample; None in it means the model's own value. No noise is needed.
        seed: of everything random here.
        supervised: pictures that are fitted beside the reward, or None.

    Raises:
        UserError: a reward without gradient, more active steps than there are, dropout, fp16.
    """

    def __init__(
        self,
        policy: Policy,
        reward: Reward | ScoreFunction,
        prompts: PromptSource,
        *,
        options: DraftOptions | None = None,
        sampling: SamplingOptions | None = None,
        seed: int = 0,
        supervised: Supervised | None = None,
    ) -> None:
        self.policy = policy
        self.options = o = options or DraftOptions()
        self.reward = checks.with_gradient(_on_clips(as_reward(reward), policy, o, seed))
        self.sampling = s = resolve_sampling(sampling or SamplingOptions(), policy.info)
        self.needs = Needs(
            reference=o.kl_weight > 0, differentiable_reward=True, chained_losses=True
        )
        self.listener: Listener = Silence()
        self.group: Group = Alone()
        self.supervised = supervised
        schedule = policy.schedule(s.steps, height=s.height, width=s.width)
        self._chain = Chain(policy, schedule, s, o.plan)
        o.plan.check(s.steps)
        refuse_dropout(policy.denoiser)
        checks.refuse_half(policy.denoiser)
        checks.check_guidance(policy, o)
        self._distance = Distance(o.kl_kind, o.kl_weight) if o.kl_weight > 0 else None
        self._plan = Plan(
            load_prompts(prompts), o.prompts_per_iteration, o.samples_per_prompt, seed
        )
        self._check_chain()
        self._ranges: RangeCheck | None = None
        self._arrived = False  # a gradient has reached the trained parameters
        self._limit = o.mismatch_limit or LIMITS[True]
        self.calls = 0

    def _check_chain(self) -> None:
        """What depends on the active steps, whichever are drawn."""
        plan, steps = self.options.plan, len(self._chain.schedule)
        if self._distance and not self._distance.steps(self._chain, plan.reachable(steps)):
            raise UserError(
                "no step that may be active takes noise, so none has a KL divergence",
                where="algorithm.kl_kind",
                fix="set algorithm.kl_kind=prediction, or sampling.eta=1",
            )
        if plan.leaves_gaps(steps) and self._chain.schedule.clip_sample_range is not None:
            raise UserError(
                "this model's scheduler clips its estimates, and a gradient cannot pass through a "
                "step that is not re-run",
                where="algorithm.active",
                fix="use last, cut or all, which leave no gaps",
            )

    def drawn(self, iteration: int) -> DrawnSteps:
        """The active steps of an iteration: one draw for the whole batch, on every rank alike."""
        generator = stream(
            self._plan.seed, "timestep", iteration=iteration, position=_ACTIVE_STEPS, sample=0
        )
        return self.options.plan.draw(generator, len(self._chain.schedule))

    def describe(self) -> list[str]:
        """The loss, the plan, what an iteration consists of."""
        o, plan, s = self.options, self.options.plan, self.sampling
        drawn = self.drawn(0)
        shown = ", ".join(map(str, drawn.active[:8])) + (" ..." if len(drawn.active) > 8 else "")
        copies = f", {plan.lv_copies} copies noised again" if plan.lv_copies else ""
        told = tells_guidance(self.policy)
        guidance = "guidance " + ("is told to the network" if told else plan.guidance_gradient)
        inner = "none" if self._distance is None else f"{o.kl_kind}, weight {o.kl_weight:g}"
        return [
            f"{o.preset}: loss {RewardLoss.of(o).words()} of the reward r; {o.engine} engine; "
            f"distance to the reference: {inner}",
            f"gradient through {len(drawn.active)} of {s.steps} steps (in iteration 0: {shown}), "
            f"coupling {plan.coupling:g}, {guidance}{copies}; the reward "
            f"looks at {'x_0' if plan.reward_input == 'x_0' else 'the estimate of x_0'}",
            f"one iteration, which is one update: {o.prompts_per_iteration} prompts x "
            f"{o.samples_per_prompt} samples, guidance {s.guidance_scale:g}",
            *([] if self.supervised is None else self.supervised.describe()),
        ]

    def record(self) -> dict[str, Any]:
        """The reward's name and those it is made of, and the prompts' texts, for the run folder."""
        return run_record(self.reward, self._plan)

    def collect(self, iteration: int) -> DraftBatch:
        """Sample, score, differentiate down to what the reward looked at.

        Where a relu loss finds every reward good enough the iteration teaches nothing; that is
        said, and the guard equal_rewards ends a run that stays so.

        Raises:
            UserError: no reward at all, or a gradient that is lost or not finite.
        """
        self._ranges = self._ranges or RangeCheck(
            self.reward, self.options.range_check, lambda text: self.listener.message(text)
        )
        drawn = self.drawn(iteration)
        with FloatProbe(self.policy.denoiser) as probe:
            judged = collect_chains(
                self._chain,
                self.reward,
                self._plan,
                iteration,
                drawn,
                options=self.options,
                listener=self.listener,
                group=self.group,
                ranges=self._ranges,
            )
        self._limit = self.options.mismatch_limit or LIMITS[probe.result]
        if not bool(judged.teaches.any()):
            self.listener.message(
                f"iteration {iteration}: every reward reaches algorithm.loss_target="
                f"{self.options.loss_target:g}, the reward teaches nothing"
            )
        order = self._plan.minibatch_orders(iteration, 1)[0]
        return DraftBatch(iteration, judged, order, self._metrics(judged, drawn, iteration))

    def _metrics(self, judged: JudgedChains, drawn: DrawnSteps, iteration: int) -> dict[str, float]:
        scores, teaches = judged.collection.scores.values, judged.teaches
        known = scores[scores.isfinite()].double()
        copies = judged.copy_scores[judged.copy_scores.isfinite()].double()
        return {
            **reward_metrics(judged.collection),
            **({"reward/copies": float(copies.mean())} if len(copies) else {}),
            "policy/reward_loss": float(RewardLoss.of(self.options)(known).mean()),
            # What a gradient comes from: guards read it so, whatever the spread of the rewards.
            "weight/positive": float(teaches[judged.collection.valid].float().mean()),
            "plan/active_steps": float(len(drawn.active)),
            "plan/first_step": float(drawn.first),
            "plan/last_step": float(drawn.last),
            "cost/calls": self._spend(judged, drawn, iteration),
        }

    def _spend(self, judged: JudgedChains, drawn: DrawnSteps, iteration: int) -> float:
        """Calls so far: forwards of one sample, a backward counting as two."""
        forward = branches(self.sampling.guidance_scale, self.policy)
        graph = forward if self.options.plan.guidance_gradient == "both" else 1
        copies, steps = self.options.plan.lv_copies, len(drawn.active)
        sampled = len(self._plan) * (drawn.last + 1 + copies) * forward
        walked = (steps + copies) * (forward + 2 * graph)
        if self._distance is not None:
            walked += len(self._distance.steps(self._chain, drawn.active)) * forward
        self.calls += sampled + int(self._taken(judged).sum()) * walked
        if self.supervised is not None and self.supervised.due(iteration):
            self.calls += self.supervised.calls
        return float(self.calls)

    def _taken(self, judged: JudgedChains) -> Tensor:
        """Who takes part in the update: bool [N]."""
        return judged.teaches if self._distance is None else judged.collection.valid

    def minibatch_count(self) -> int:
        """Minibatches of an iteration (fewer where rewards failed)."""
        return self.options.minibatches

    def minibatch_arithmetic(self) -> str:
        """`32 samples / 8 = 4 minibatches`."""
        return self.options.arithmetic

    def minibatches(self, batch: DraftBatch) -> Iterator[DraftMinibatch]:
        """Shuffled chains in chunks of `train_batch_size`, without those that teach nothing.

        Where none is left and a supervised step is due, one minibatch carries that alone.
        """
        supervised = self.supervised is not None and self.supervised.due(batch.iteration)
        size = self.options.train_batch_size
        return cut(batch, self._taken(batch.judged), size, always=supervised)

    def losses(
        self, minibatch: DraftMinibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """One loss per LV copy and per active step (`replay`), or one of them all; then the
        supervised ones. Each must be back-propagated before the next is asked for.

        Their gradients add up to scale x the mean over `train_batch_size` samples of the reward's
        loss and kl_weight x the distance; samples that take no part count as zeros.

        Raises:
            UserError: several updates of one iteration, a re-run that differs, a lost gradient.
        """
        checks.check_one_update(scale, self.minibatch_count(), self.minibatch_arithmetic())
        if minibatch.total:
            yield from self._chain_losses(minibatch, scale)
        if self.supervised is None or not self._supervises(minibatch):
            self._look_for_arrival(minibatch, mixed=False)
            return
        # Before a supervised gradient joins it. Of shards nothing is there before the last loss.
        if not self.group.lockstep:
            self._look_for_arrival(minibatch, mixed=False)
        yield from self.supervised.losses(minibatch.iteration, 1.0, self.group)
        if self.group.lockstep:
            self._look_for_arrival(minibatch, mixed=True)

    def _chain_losses(
        self, minibatch: DraftMinibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Those of the reward and the reference."""
        # Gradients are averaged over the ranks, hence the group's size. The chain carries it.
        share = scale * self.group.size / self.options.train_batch_size
        part = minibatch.count * self.group.size / minibatch.total
        shares = minibatch.gradient.new_full((len(minibatch.walk),), share)
        errand = Errand(
            chain=self._chain,
            walk=minibatch.walk,
            cond=minibatch.cond,
            gradient=minibatch.gradient * share,
            copy_gradients=minibatch.copy_gradients * share,
            distance=self._distance,
            shares=shares if minibatch.count else torch.zeros_like(shares),
        )
        worst: Tensor | None = None
        for loss, metrics in ENGINES[self.options.engine](errand):
            found = metrics[MISMATCH]
            if not loss.requires_grad:
                raise checks.denoiser_broken(minibatch.iteration)
            worst = found if worst is None else torch.maximum(worst, found)
            yield loss, weighted(metrics, part)
        if minibatch.count:
            checks.check_mismatch(worst, self._limit)

    def _look_for_arrival(self, minibatch: DraftMinibatch, *, mixed: bool) -> None:
        """In the first update with a gradient to bring, see that it reached the parameters.

        What counts is what all ranks hold together. One that stands together with a supervised
        step's (`mixed`) is looked at, but not taken for found.

        Raises:
            UserError: it did not, and no other check says where it was lost: in the denoiser.
        """
        if self._arrived or not minibatch.closes:
            return
        here = checks.arrived(self.policy.trainable_parameters())
        every = self.group.gather(torch.tensor([[minibatch.owed, here]])).any(dim=0)
        owed, found = every.tolist()
        if owed and not found:
            raise checks.denoiser_broken(minibatch.iteration)
        self._arrived = owed and not mixed

    def _supervises(self, minibatch: DraftMinibatch) -> bool:
        if self.supervised is None or not minibatch.closes:
            return False
        return self.supervised.due(minibatch.iteration)

    def loss_count(self, minibatch: DraftMinibatch) -> int:
        """How many losses `losses` yields."""
        count = loss_count(minibatch.walk, self.options.engine) if minibatch.total else 0
        if self._supervises(minibatch):
            assert self.supervised is not None
            count += self.supervised.loss_count(self.group)
        return count

    def state_dict(self) -> dict[str, Any]:
        """Calls so far and which prompts; the plan of prompts and steps hangs on the iteration."""
        state: dict[str, Any] = {"prompts": self._plan.fingerprint, "calls": self.calls}
        if self.supervised is not None:
            state["supervised"] = self.supervised.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            UserError: of a run on other prompts or pictures.
        """
        self._plan.check_same(state["prompts"])
        self.calls = state["calls"]
        if self.supervised is not None and "supervised" in state:
            self.supervised.load_state_dict(state["supervised"])


def _on_clips(reward: Reward, policy: Policy, options: DraftOptions, seed: int) -> Reward:
    """An image reward on a model of clips looks at some of their frames.

    Random ones are drawn by the seed, and by the name that `Judge` gives each clip.
    """
    if getattr(policy.info, "modality", "image") == "image" or reward.info.modality == "video":
        return reward
    from reward_models.video.reward import FrameReward

    return FrameReward(reward, options.frames_scored, seed=seed)
