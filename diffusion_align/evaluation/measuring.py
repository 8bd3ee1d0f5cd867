"""Drawing and measuring, slice by slice: what a comparison and a sweep have in common.

Prompts are worked through in slices: every model draws a slice, its pictures are kept by the caller
and scored, and only numbers stay, so memory does not grow with the number of prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np

from diffusion_align.data.diversity import FEATURE_SPACE, PIXEL_SPACE, diversity
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.comparison import DIVERSITY, Result, arranged
from diffusion_align.evaluation.generate import Pictures
from diffusion_align.evaluation.scoring import score_pictures
from diffusion_align.evaluation.statistics import Floats
from diffusion_align.sampling.options import ResolvedSampling

if TYPE_CHECKING:
    from diffusion_align.data.diversity import Features
    from diffusion_align.policy import Policy
    from reward_models.base import Reward

Table = dict[str, Floats]
"""Name -> float64 [P, S] of a slice (diversity: [P, 1])."""
Draw = Callable[..., Pictures]
"""`generate` with its policy, reference and run seed filled in."""
Progress = Callable[[int, int], None]

Model = TypeVar("Model", bound=str)


def measure_all(
    draws: Mapping[Model, Draw],
    measure: Callable[[Pictures, Sequence[Prompt]], Table],
    keep: Callable[[Model, Pictures, int], None],
    prompts: Sequence[Prompt],
    seeds: int,
    settings: ResolvedSampling,
    progress: Progress | None,
) -> dict[Model, list[Table]]:
    """Draw, keep and measure slice by slice; one table per slice and model.

    Args:
        draws: what draws the pictures of each model.
        measure: what is known of a slice's pictures, for instance `measure_slice`.
        keep: called with the model, its pictures and the position of the first prompt.
        progress: called with pictures done and pictures in all.
    """
    tables: dict[Model, list[Table]] = {model: [] for model in draws}
    total = len(draws) * len(prompts) * seeds
    stride = max(1, settings.batch_size // seeds)
    done = 0
    for first in range(0, len(prompts), stride):
        part = prompts[first : first + stride]
        for model, draw in draws.items():
            pictures = draw(part, seeds, settings, first_position=first)
            keep(model, pictures, first)
            tables[model].append(measure(pictures, part))
            done += len(part) * seeds
            if progress is not None:
                progress(done, total)
    return tables


def measure_slice(
    pictures: Pictures,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    policy: Policy,
    batch_size: int,
    features: Features | None,
) -> Table:
    """Every reward, its parts and diversity of one slice; diversity is `[P, 1]`."""
    table: Table = {}
    for name, reward in rewards.items():
        table |= score_pictures(
            reward,
            name,
            pictures,
            prompts,
            device=policy.device,
            batch_size=batch_size,
            fps=policy.info.fps,
        )
    spread = [
        diversity(samples[valid].to(policy.device), features)
        for samples, valid in zip(pictures.floats(), pictures.valid, strict=True)
    ]
    table[DIVERSITY] = np.array(spread, dtype=np.float64)[:, None]
    return table


def results_of(
    base: Sequence[Table],
    tuned: Sequence[Table],
    rewards: Mapping[str, Reward],
    trained_on: Sequence[str] | None,
    in_feature_space: bool,
) -> tuple[Result, ...]:
    """Results of the tables of two models, one per slice: rewards and parts, then diversity."""
    names = list(dict.fromkeys(name for tables in (base, tuned) for t in tables for name in t))
    scores = {name: (_column(base, name), _column(tuned, name)) for name in names}
    spread = scores.pop(DIVERSITY)
    units = {name: reward.info.range for name, reward in rewards.items()}
    results = arranged(scores, units, trained_on)
    if np.isfinite(spread[0] - spread[1]).any():
        space = FEATURE_SPACE if in_feature_space else PIXEL_SPACE
        results.append(Result(DIVERSITY, "diversity", space, *spread))
    return tuple(results)


def _column(tables: Sequence[Table], name: str) -> Floats:
    """One measurement over all slices; a part that a slice lacks is NaN there."""
    # Every table holds at least one reward before diversity: its shape is that of the pictures.
    return np.concatenate(
        [
            table[name] if name in table else np.full_like(next(iter(table.values())), np.nan)
            for table in tables
        ]
    )
