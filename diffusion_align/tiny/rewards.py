"""``tiny-aesthetic``, ``tiny-hps`` and ``tiny-mps``: twins of the real scorers, by their classes.

Each is trained by `RewardTraining`, the trainer that users have, on what one simulated crowd said
of renders, spoiled renders and samples of ``tiny-sd``. They share ``tiny-clip``; a file holds what
its training changed of it, and its head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align.algorithms.reward_options import RewardOptions
from diffusion_align.algorithms.reward_training import RewardTraining
from diffusion_align.data.judgements import Judgements, small_world_judgements
from diffusion_align.tiny.quality import (
    Agreement,
    Choices,
    measure_choices,
    measure_ratings,
    sample,
    scores_of,
)
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from reward_models.catalogue import load
from reward_models.plan import RewardPlan
from reward_models.small_world import (
    AESTHETIC_CROWD,
    HPS_CROWD,
    MPS_CROWD,
    captions,
    judged_pairs,
    judged_ratings,
)

# Samples are drawn as users draw them (guided) and as the demo trains (unguided): a reward must
# judge both.
_GUIDANCES = (2.0, 1.0)
SAMPLED_CAPTIONS = 2048

# What the crowd of tiny-mps is asked to look at, in words that tiny-clip knows.
CONDITION = (
    "small large red orange yellow green blue purple circle square triangle cross "
    "above below left right top middle bottom center white gray black background"
)


@dataclass(frozen=True)
class Recipe:
    """How one twin is trained: on whose judgements, with which head, for how many steps."""

    crowd: Literal["aesthetic", "hps", "mps"]
    plan: RewardPlan
    steps: int
    count: int
    raters: int = 1


# The heads alone: blocks that train as well learn the crowd's noise, and the captions of the
# training split, better than what a held-out caption asks for.
TWINS: dict[str, Recipe] = {
    "tiny-aesthetic": Recipe(
        crowd="aesthetic",
        plan=RewardPlan(
            start="tiny-clip", head="regression", layers="relu", hidden=(128, 64, 32, 16)
        ),
        steps=3000,
        count=30_000,
    ),
    "tiny-hps": Recipe(
        crowd="hps",
        plan=RewardPlan(start="tiny-clip", head="cosine", framing="letterbox"),
        steps=2500,
        count=85_000,
        raters=9,
    ),
    "tiny-mps": Recipe(
        crowd="mps",
        plan=RewardPlan(
            start="tiny-clip",
            head="cross",
            cross_layers=2,
            cross_heads=4,
            cross_head_dim=24,
            cross_ff=1,
            condition=CONDITION,
        ),
        steps=1200,
        count=30_000,
        raters=9,
    ),
}


def drawn_samples(
    pipeline: StableDiffusionPipeline, work: Path, split: str, count: int, seed: int
) -> tuple[Tensor, list[str]]:
    """``count`` captions of a split, four samples of each: uint8 [4 count, 3, 64, 64] and captions.

    Kept in ``work``, and drawn on from where an interrupted call stopped.
    """
    texts = captions(count, seed, split)  # type: ignore[arg-type]
    folder = work / f"samples-{split}-{count}"
    folder.mkdir(parents=True, exist_ok=True)
    pictures, owners = [], []
    for start in range(0, count, 128):
        chunk = texts[start : start + 128]
        file = folder / f"{start:06d}.safetensors"
        if not file.exists():
            drawn = [
                sample(pipeline, chunk, guidance_scale=guidance, seed=seed + 1000 * (2 * i + j))
                for i, guidance in enumerate(_GUIDANCES)
                for j in range(2)
            ]
            whole = (torch.cat(drawn).clamp(0, 1) * 255).round().to(torch.uint8)
            save_file({"images": whole}, file.with_suffix(".part"))
            file.with_suffix(".part").replace(file)
        pictures.append(load_file(file)["images"])
        owners += chunk * (2 * len(_GUIDANCES))
    return torch.cat(pictures), owners


def judgements_for(name: str, samples: tuple[Tensor, Sequence[str]], seed: int = 6) -> Judgements:
    """What the crowd of a twin says of renders and of samples of ``tiny-sd``."""
    recipe = TWINS[name]
    return small_world_judgements(
        recipe.crowd, recipe.count, seed, "train", samples, raters=recipe.raters
    )


def train_twin(name: str, work: Path, judged: Judgements, target: Path, *, seed: int = 6) -> None:
    """Train one twin and write its file as fp16; goes on where an interrupted call stopped."""
    recipe = TWINS[name]
    # Held out by caption, for the choice of the best weights; the bars use another split's.
    learnt, kept = judged.split(0.03, seed)
    training = RewardTraining(
        recipe.plan,
        learnt,
        options=RewardOptions(batch_size=128, validate_every=recipe.steps // 6, cache_gb=7),
        validation=kept,
        seed=seed,
        name=name,
        trained_on=[f"small-world:{recipe.crowd}"],
    )
    run = work / name
    train(
        training,
        options=TrainOptions(
            steps=recipe.steps,
            learning_rate=1e-3,
            warmup_steps=50,
            schedule="cosine",
            checkpoint_every=500,
        ),
        output=run,
        resume=run.exists(),
        seed=seed,
    )
    training.save(target, dtype="float16")


def measure_twin(
    name: str, samples: tuple[Tensor, Sequence[str]], *, count: int, seed: int = 53
) -> Agreement | Choices:
    """What a shipped twin has in common with its crowd, on held-out captions it never met."""
    reward, crowd = load(name), TWINS[name].crowd
    if crowd == "aesthetic":
        rated = judged_ratings(count, seed, "heldout", AESTHETIC_CROWD, samples)
        return measure_ratings(scores_of(reward, rated.images, rated.captions), rated)
    judged = judged_pairs(
        count, seed, "heldout", HPS_CROWD if crowd == "hps" else MPS_CROWD, samples
    )
    first, second = (
        scores_of(reward, images, judged.captions) for images in (judged.first, judged.second)
    )
    return measure_choices(first, second, judged)
