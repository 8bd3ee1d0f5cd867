"""Online collection: sample the planned items, decode, score. Shared by the online methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Alone, Group, Listener, Samples
from diffusion_align.algorithms.options import CollectionOptions
from diffusion_align.algorithms.picture_metrics import PictureMeter, PictureMetrics
from diffusion_align.algorithms.plan import Item, Plan
from diffusion_align.algorithms.scoring import ChunkScorer, gains_by_overlap
from diffusion_align.algorithms.sharing import Share
from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.errors import UserError
from diffusion_align.policy import Conditioning, Policy
from diffusion_align.sampling.options import ResolvedSampling
from diffusion_align.sampling.rollout import Trajectory, rollout
from reward_models.base import Reward, Scores

PICTURES_KEPT = 8
"""How many of a batch's pictures are kept to be looked at."""


@dataclass(frozen=True)
class Collection:
    """N sampled and scored items. rewards: float32 [N] on the CPU, NaN where there is none.

    In a group scores and pictures are those of all N items; the trajectory is that of the n items
    at `share.places`, which this rank sampled.
    """

    items: Sequence[Item]
    share: Share
    trajectory: Trajectory
    scores: Scores
    samples: Samples
    pictures: PictureMetrics

    @property
    def valid(self) -> Tensor:
        """Which items have a reward: bool [N]."""
        return self.scores.values.isfinite()


@torch.no_grad()
def collect_samples(
    policy: Policy,
    reward: Reward,
    plan: Plan,
    iteration: int,
    *,
    schedule: Schedule,
    sampling: ResolvedSampling,
    reduction: Reduction,
    listener: Listener,
    options: CollectionOptions,
    keep: Literal["all", "final"] = "all",
    group: Group | None = None,
    noisy: Tensor | None = None,
) -> Collection:
    """Sample and score one iteration in chunks of `sampling.batch_size`.

    A chunk is decoded and scored before, or with `options.reward_overlap` while, the next is
    sampled, so that pixels never pile up (but for a reward of scope `group`, which must see all
    samples of a prompt together: those of one prompt wait). keep: see `rollout`. In a group each
    rank samples and scores its share in chunks of that size, and what was found is gathered.

    Raises:
        UserError: no item at all could be scored.
    """
    items = plan.items(iteration)
    share = Share.of(plan.minibatch_orders(iteration, 1)[0], group or Alone())
    mine = [items[place] for place in share.places.tolist()]
    cond = encode(policy, [item.prompt for item in mine], sampling, sampling.guidance_scale)
    trajectories: list[Trajectory] = []
    pixels: list[Tensor] = []
    together = share.group.size > 1  # then prompts are split over ranks and meet afterwards
    by_prompt = together and reward.info.scope == "group"
    size = sampling.batch_size
    meter = PictureMeter()
    scorer = ChunkScorer(
        reward,
        iteration,
        overlap=overlaps(options, reward, policy),
        timeout=options.reward_timeout,
    )
    with scorer:
        # Where forwards are made in lockstep, a rank with fewer chunks samples its last item again.
        count = share.largest if share.group.lockstep else len(mine)
        for start in range(0, count, size):
            chunk = mine[start : start + size]
            rows = range(start, start + len(chunk)) if chunk else [len(mine) - 1]
            listener.progress("sampling", start, len(mine))
            trajectory = rollout(
                policy,
                cond.take(rows),
                schedule,
                plan.rollout_streams([mine[row] for row in rows], iteration),
                guidance_scale=sampling.guidance_scale,
                eta=sampling.eta,
                flow_kind=sampling.flow_kind,
                noise_level=sampling.noise_level,
                reduction=reduction,
                batch_size=size,
                keep=keep,
                noisy=None if noisy is None else noisy[share.places[list(rows)]],
                starts=(
                    plan.shared_streams([mine[row] for row in rows], iteration)
                    if options.shared_noise
                    else None
                ),
            )
            if not chunk:
                break
            trajectories.append(trajectory)
            decoded = policy.decode(trajectory.x_0)
            listener.progress("scoring", start, len(mine))
            if not by_prompt:
                scorer.add(decoded, chunk)
            if not together:
                meter.add(decoded, [item.position for item in chunk])
            shown = len(decoded) if together else max(0, PICTURES_KEPT - start)
            pixels.append(decoded[:shown].cpu())
        drawn = torch.cat(pixels)
        if together:
            for whole, members in share.whole_prompts(drawn, items):
                meter.add(whole, [item.position for item in members])
                if by_prompt:
                    scorer.add(whole.to(policy.device), members)
        scores = share.gather_scores(scorer.finish(), items, by_prompt=by_prompt)
    pictures = share.gather_pictures(meter.take(), items) if together else meter.take()
    _require_scores(scores, reward.info.name, iteration)
    kept = drawn[:PICTURES_KEPT].float()
    places = share.places[: len(kept)]
    prompts = [items[place].prompt.text for place in places.tolist()]
    samples = Samples(kept, prompts, scores.values[places])
    joined = _join_trajectories(trajectories, cond)
    return Collection(items, share, joined, scores, samples, pictures)


def overlaps(options: CollectionOptions, reward: Reward, policy: Policy) -> bool:
    """Whether rewards are computed beside the sampling: as asked for, else where that gains."""
    if options.reward_overlap is not None:
        return options.reward_overlap
    return gains_by_overlap(reward, policy.device)


def run_record(reward: Reward, plan: Plan) -> dict[str, Any]:
    """The reward's name and those it is made of, and the prompts' texts, for the run folder."""
    rewards = list(dict.fromkeys([reward.info.name, *reward.info.components]))
    return {"trained_on": rewards, "prompts": [prompt.text for prompt in plan.prompts]}


def encode(
    policy: Policy, prompts: Sequence[Prompt], sampling: ResolvedSampling, guidance_scale: float
) -> Conditioning:
    """Conditioning of `prompts` [N], each distinct one encoded once."""
    distinct = list(dict.fromkeys((prompt.text, prompt.negative) for prompt in prompts))
    cond = policy.encode(
        [text for text, _ in distinct],
        negative_prompts=[negative for _, negative in distinct],
        guidance_scale=guidance_scale,
        height=sampling.height,
        width=sampling.width,
        frames=sampling.frames,
    )
    row_of = {key: row for row, key in enumerate(distinct)}
    return cond.take([row_of[prompt.text, prompt.negative] for prompt in prompts])


def reward_metrics(collected: Collection) -> dict[str, float]:
    """Numbers about an iteration's rewards and pictures; failed ones are counted and left out."""
    scores, valid = collected.scores, collected.valid
    values = scores.values[valid].double()
    metrics = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std(correction=0)),
        "reward/min": float(values.min()),
        "reward/max": float(values.max()),
        "reward/invalid": float((~valid).sum()),
        **collected.pictures.means(),
    }
    for name, part in scores.parts.items():
        known = part[part.isfinite()].double()
        if len(known):
            metrics[f"reward_part/{name}"] = float(known.mean())
    return metrics


def _require_scores(scores: Scores, name: str, iteration: int) -> None:
    if not bool(scores.values.isfinite().any()):
        raise UserError(
            f"gave no score to any of the {len(scores.values)} samples of iteration {iteration}",
            where=f"reward {name}",
            fix="see why it returns NaN: score a folder of pictures with it first",
        )


def _join_trajectories(chunks: Sequence[Trajectory], cond: Conditioning) -> Trajectory:
    return replace(
        chunks[0],
        latents=torch.cat([chunk.latents for chunk in chunks]),
        log_probs=torch.cat([chunk.log_probs for chunk in chunks]),
        cond=cond,
    )
