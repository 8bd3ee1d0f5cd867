"""Online collection: sample the planned items, decode, score. Shared by the online methods."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from diffusion_align.algorithms.base import Listener, Samples
from diffusion_align.algorithms.plan import Item, Plan
from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.errors import UserError
from diffusion_align.policy import Conditioning, Policy
from diffusion_align.sampling.options import ResolvedSampling
from diffusion_align.sampling.rollout import Trajectory, rollout
from reward_models.base import Reward, Scores, check_scores

PICTURES_KEPT = 8
"""How many of a batch's pictures are kept to be looked at."""


@dataclass(frozen=True)
class Collection:
    """N sampled and scored items. rewards: float32 [N] on the CPU, NaN where there is none."""

    items: Sequence[Item]
    trajectory: Trajectory
    scores: Scores
    samples: Samples

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
) -> Collection:
    """Sample and score one iteration in chunks of `sampling.batch_size`.

    A chunk is decoded and scored before the next is sampled, so that pixels never pile up (but for
    a reward of scope `group`, which must see all samples of a prompt together).

    Raises:
        UserError: no item at all could be scored.
    """
    items = plan.items(iteration)
    cond = encode(policy, [item.prompt for item in items], sampling, sampling.guidance_scale)
    trajectories: list[Trajectory] = []
    pixels: list[Tensor] = []
    scores: list[Scores] = []
    whole_groups = reward.info.scope == "group"
    for start in range(0, len(items), sampling.batch_size):
        chunk = items[start : start + sampling.batch_size]
        listener.progress("sampling", start, len(items))
        trajectory = rollout(
            policy,
            cond.take(range(start, start + len(chunk))),
            schedule,
            plan.rollout_streams(chunk, iteration),
            guidance_scale=sampling.guidance_scale,
            eta=sampling.eta,
            flow_kind=sampling.flow_kind,
            noise_level=sampling.noise_level,
            reduction=reduction,
            batch_size=sampling.batch_size,
        )
        trajectories.append(trajectory)
        decoded = policy.decode(trajectory.x_0)
        listener.progress("scoring", start, len(items))
        if whole_groups:
            pixels.append(decoded)
        else:
            scores.append(_score(reward, decoded, chunk))
            pixels.append(decoded[: max(0, PICTURES_KEPT - start)].cpu())
    if whole_groups:
        scores = _score_groups(reward, torch.cat(pixels), items, plan.samples_per_prompt)
    joined = _join_scores(scores)
    _require_scores(joined, reward.info.name, iteration)
    kept = torch.cat([part.cpu() for part in pixels])[:PICTURES_KEPT].float()
    shown = [item.prompt.text for item in items[: len(kept)]]
    samples = Samples(kept, shown, joined.values[: len(kept)])
    return Collection(items, _join_trajectories(trajectories, cond), joined, samples)


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
    )
    row_of = {key: row for row, key in enumerate(distinct)}
    return cond.take([row_of[prompt.text, prompt.negative] for prompt in prompts])


def reward_metrics(collected: Collection) -> dict[str, float]:
    """Numbers about an iteration's rewards, failed ones counted and left out of the rest."""
    scores, valid = collected.scores, collected.valid
    values = scores.values[valid].double()
    metrics = {
        "reward/mean": float(values.mean()),
        "reward/std": float(values.std(correction=0)),
        "reward/min": float(values.min()),
        "reward/max": float(values.max()),
        "reward/invalid": float((~valid).sum()),
    }
    for name, part in scores.parts.items():
        known = part[part.isfinite()].double()
        if len(known):
            metrics[f"reward_part/{name}"] = float(known.mean())
    return metrics


def _score(reward: Reward, pixels: Tensor, items: Sequence[Item]) -> Scores:
    prompts = [item.prompt.text for item in items]
    metadata = [item.prompt.metadata for item in items]
    said = any(metadata)
    scores = reward.score(pixels, prompts, metadata=metadata if said else None)
    checked = check_scores(scores, len(items), reward.info.name)
    return Scores(
        checked.values.detach().cpu().float(),
        {name: part.detach().cpu().float() for name, part in checked.parts.items()},
    )


def _require_scores(scores: Scores, name: str, iteration: int) -> None:
    if not bool(scores.values.isfinite().any()):
        raise UserError(
            f"gave no score to any of the {len(scores.values)} samples of iteration {iteration}",
            where=f"reward {name}",
            fix="see why it returns NaN: score a folder of pictures with it first",
        )


def _score_groups(
    reward: Reward, pixels: Tensor, items: Sequence[Item], samples_per_prompt: int
) -> list[Scores]:
    return [
        _score(
            reward, pixels[start : start + samples_per_prompt], items[start:][:samples_per_prompt]
        )
        for start in range(0, len(items), samples_per_prompt)
    ]


def _join_scores(scores: Sequence[Scores]) -> Scores:
    parts = {name: torch.cat([chunk.parts[name] for chunk in scores]) for name in scores[0].parts}
    return Scores(torch.cat([chunk.values for chunk in scores]), parts)


def _join_trajectories(chunks: Sequence[Trajectory], cond: Conditioning) -> Trajectory:
    return replace(
        chunks[0],
        latents=torch.cat([chunk.latents for chunk in chunks]),
        log_probs=torch.cat([chunk.log_probs for chunk in chunks]),
        cond=cond,
    )
