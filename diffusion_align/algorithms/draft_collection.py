"""One iteration of reward backpropagation: chains, scores, and dL/d(what the reward looked at)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.algorithms.active_rollout import Walk, active_rollout
from diffusion_align.algorithms.base import Group, Listener, Samples
from diffusion_align.algorithms.chain_checks import check_path
from diffusion_align.algorithms.collection import PICTURES_KEPT, Collection, encode
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_chain import Chain
from diffusion_align.algorithms.gradient_plan import DrawnSteps
from diffusion_align.algorithms.judged_latents import Judge, Judgement
from diffusion_align.algorithms.picture_metrics import PictureMeter
from diffusion_align.algorithms.plan import Plan
from diffusion_align.algorithms.reward_gradient import RangeCheck, RewardLoss
from diffusion_align.algorithms.sharing import Share
from diffusion_align.errors import UserError
from diffusion_align.policy import Conditioning
from diffusion_align.sampling.rollout import Trajectory
from reward_models.base import Reward


@dataclass(frozen=True)
class JudgedChains:
    """N sampled items; of the tensors a rank has those of its n.

    Args:
        collection: items, scores, pictures.
        walk: n chains.
        cond: of n items.
        gradient: [n, *latent], dL/d(walk.final) of each item's own loss: its share of those of its
            1 + C pictures that have a score.
        copy_gradients: [n, C, *latent], the same of the LV copies.
        teaches: bool [N] on the CPU, whose loss has a slope.
        copy_scores: float32 [C, N].
    """

    collection: Collection
    walk: Walk
    cond: Conditioning
    gradient: Tensor
    copy_gradients: Tensor
    teaches: Tensor
    copy_scores: Tensor


def collect_chains(
    chain: Chain,
    reward: Reward,
    plan: Plan,
    iteration: int,
    drawn: DrawnSteps,
    *,
    options: DraftOptions,
    listener: Listener,
    group: Group,
    ranges: RangeCheck,
) -> JudgedChains:
    """Sample, judge and differentiate one iteration in chunks of `sampling.batch_size`.

    Raises:
        UserError: no scores, scores out of range, or a gradient that is lost or not finite.
    """
    policy, sampling = chain.policy, chain.sampling
    items = plan.items(iteration)
    share = Share.of(plan.minibatch_orders(iteration, 1)[0], group)
    mine = [items[place] for place in share.places.tolist()]
    cond = encode(policy, [item.prompt for item in mine], sampling, sampling.guidance_scale)
    judges = [
        Judge(policy, reward, options, iteration, share, items)
        for _ in range(1 + chain.plan.lv_copies)
    ]
    meter, together = PictureMeter(), group.size > 1
    walks, pixels = list[Walk](), list[Tensor]()
    # Where forwards are made in lockstep, a rank with fewer chunks samples its last item again.
    count = share.largest if group.lockstep else len(mine)
    for start in range(0, count, sampling.batch_size):
        chunk = mine[start : start + sampling.batch_size]
        rows = range(start, start + len(chunk)) if chunk else [len(mine) - 1]
        chosen = [mine[row] for row in rows]
        listener.progress("sampling", start, len(mine))
        walk = active_rollout(
            chain,
            cond.take(rows),
            plan.rollout_streams(chosen, iteration),
            plan.noise_streams(chosen, iteration),
            drawn,
            with_gaps=options.engine == "autograd",
        )
        if not chunk:
            break
        walks.append(walk)
        listener.progress("scoring", start, len(mine))
        decoded = judges[0].add(walk.final, chunk)
        for copy, judge in enumerate(judges[1:]):
            judge.add(walk.copies[:, copy], chunk)
        if not together:
            meter.add(decoded, [item.position for item in chunk])
        shown = len(decoded) if together else max(0, PICTURES_KEPT - start)
        pixels.append(decoded[:shown].float().cpu())
    judged = [judge.finish() for judge in judges]
    drawn_pictures = torch.cat(pixels)
    if together:
        for whole, members in share.whole_prompts(drawn_pictures, items):
            meter.add(whole, [item.position for item in members])
    pictures = share.gather_pictures(meter.take(), items) if together else meter.take()
    scores = judged[0].scores
    copy_scores = torch.stack([j.scores.values for j in judged])[1:]
    teaches = _look(judged, RewardLoss.of(options), reward, iteration, group, ranges)
    joined = Walk.join(walks)
    places = share.places[: min(PICTURES_KEPT, len(drawn_pictures))]
    prompts = [items[place].prompt.text for place in places.tolist()]
    samples = Samples(drawn_pictures[: len(places)], prompts, scores.values[places])
    nowhere = torch.full((len(mine), len(chain.schedule)), torch.nan)
    trajectory = Trajectory(joined.final[:, None], nowhere, cond, chain.schedule)
    # An item's loss is the mean over those of its pictures that have a score.
    counted = torch.stack([j.scores.values.isfinite() for j in judged]).sum(dim=0)
    stacked = torch.stack([j.gradient for j in judged], dim=1)
    factor = (chain.rescale(drawn) / counted[share.places].clamp(min=1).double()).to(stacked)
    stacked = stacked * factor.view(-1, *[1] * (stacked.ndim - 1))
    return JudgedChains(
        collection=Collection(items, share, trajectory, scores, samples, pictures),
        walk=joined,
        cond=cond,
        gradient=stacked[:, 0],
        copy_gradients=stacked[:, 1:],
        teaches=teaches,
        copy_scores=copy_scores,
    )


def _look(
    judged: list[Judgement],
    loss: RewardLoss,
    reward: Reward,
    iteration: int,
    group: Group,
    ranges: RangeCheck,
) -> Tensor:
    """Which items teach, after everything has been checked that all ranks know: bool [N]."""
    main = judged[0].scores.values
    if not bool(main.isfinite().any()):
        raise UserError(
            f"gave no score to any of the {len(main)} samples of iteration {iteration}",
            where=f"reward {reward.info.name}",
            fix="see why it returns NaN: score a folder of pictures with it first",
        )
    for judgement in judged:
        ranges.look(judgement.scores, iteration)
    sloped = torch.stack([loss.teaches(j.scores.values) for j in judged]).any(dim=0)
    teaches = sloped & main.isfinite()
    found = [[any(j.pixels for j in judged), any(j.latents for j in judged)]]
    pixels, latents = group.gather(torch.tensor(found)).any(dim=0).tolist()
    if bool(teaches.any()):
        check_path(pixels=pixels, latents=latents, reward=reward.info.name, iteration=iteration)
    return teaches
