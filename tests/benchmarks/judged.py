"""Adapters drawn with one sampler on one noise and scored: what `bench_learning.py` compares.

Runs may sample differently while they train (with guidance or without, with noise in a few steps
alone). Their models are compared as one person would use them all: with the sampler of one config.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SEEDS = 8
"""Pictures per prompt."""


@dataclass(frozen=True)
class Judged:
    """One adapter, or the untouched model. means: "trained/NAME" (the run's prompts) and
    "held out/NAME" -> the mean of each prompt's pictures.
    """

    config: str
    seed: int
    overrides: list[str]
    sampler: str
    means: Mapping[str, list[float]]


def split(name: str) -> tuple[str, list[str]]:
    """A config and its own settings, from `CONFIG KEY=VALUE ...` (a value has no space)."""
    source, *own = name.split()
    return source, own


def judge(name: str, seed: int, overrides: list[str], adapter: Path | None, by: str) -> Judged:
    """Draw and score.

    Args:
        name, overrides: the config that was trained; `overrides` hold for `by` as well.
        seed: of the run; it chooses the noise, which is the same for all configs.
        adapter: its `final` folder; None for the untouched model.
        by: the config whose evaluation says how to draw, what to score and the prompts held out.
    """
    from diffusion_align import Policy
    from diffusion_align.assemble.loading import load_rewards
    from diffusion_align.assemble.named import heldout_prompts, scored_with, training_prompts
    from diffusion_align.config import load_config
    from diffusion_align.evaluation.generate import evaluation_sampling, generate
    from diffusion_align.evaluation.scoring import score_pictures

    source, own = split(by)
    config = load_config(source, [*own, *overrides, f"seed={seed}"])
    sampling = evaluation_sampling(config.sampling, config.evaluation)
    policy = Policy.load(config.model.id, lora_path=adapter)
    rewards = load_rewards(scored_with(config), policy.device)
    means: dict[str, list[float]] = {}
    trained = training_prompts(config)
    # Positions choose the noise: those of the two sets do not overlap.
    for kind, prompts, first in (
        ("trained", trained, 0),
        ("held out", heldout_prompts(config), len(trained)),
    ):
        drawn = generate(policy, prompts, SEEDS, sampling, run_seed=seed, first_position=first)
        for reward_name, reward in rewards.items():
            scored = score_pictures(reward, reward_name, drawn, prompts, fps=policy.info.fps)
            scores = scored[reward_name]
            means[f"{kind}/{reward_name}"] = np.nanmean(scores, axis=1).tolist()
    return Judged(name, seed, overrides, by, means)


def known(path: Path) -> list[Judged]:
    """What was judged before."""
    if not path.exists():
        return []
    return [Judged(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def standing(judged: Sequence[Judged], name: str, against: str) -> list[str]:
    """`name` less `against`, measure by measure, with the 95 % interval over prompts.

    Seeds are averaged first: pictures of one prompt resemble each other across runs too.
    """
    from diffusion_align.evaluation.statistics import t_interval

    mine = {j.seed: j for j in judged if j.config == name}
    theirs = {j.seed: j for j in judged if j.config == against}
    seeds = sorted(mine.keys() & theirs.keys())
    lines = []
    for measure in mine[seeds[0]].means if seeds else ():
        one = np.array([mine[seed].means[measure] for seed in seeds])
        other = np.array([theirs[seed].means[measure] for seed in seeds])
        difference = (one - other).mean(axis=0)
        low, high = t_interval(difference)
        each = ", ".join(f"{value:+.4g}" for value in (one - other).mean(axis=1))
        lines.append(
            f"    {measure:26s} {other.mean():.4g} -> {one.mean():.4g}: "
            f"{difference.mean():+.4g} [{low:+.4g}, {high:+.4g}]; seeds {each}"
        )
    return lines
