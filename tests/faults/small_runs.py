"""One small, fast run for every algorithm of the catalogue. A new algorithm needs a row here.

Everything that can go wrong in a run is in them: a state of its own, remembered rewards, dropout
or random rewards from the global generators, an average of the weights, a schedule, accumulation,
several checkpoints, sample pictures.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

import reward_models.backbones
from diffusion_align.algorithms import catalogue
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.reward_options import RewardOptions
from diffusion_align.algorithms.reward_training import RewardTraining
from diffusion_align.algorithms.rwr_options import RWROptions
from diffusion_align.data.judgements import Judgements, Pair
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.options import TrainOptions
from reward_models.base import RewardInfo, Scores
from reward_models.plan import RewardPlan
from reward_models.small_world import HPS_CROWD, judged_pairs

PROMPTS = ("a", "bb", "ccc", "dddd", "eeeee")
Mood = Literal["well", "raises", "hangs", "nan"]


@dataclass(frozen=True)
class SmallRun:
    """A run of one algorithm.

    Args:
        build: the algorithm, new; it takes (reward, pipeline): the reward is for those that ask
            one, pipeline a folder with a saved pipeline, or None for a linear toy.
        train: of the whole run.
        asks_reward: whether there is a reward that may fail.
        looks: whether sample pictures are drawn while it runs.
        updates: of one iteration.
    """

    build: Callable[[Reward, Path | None], Any]
    train: TrainOptions
    asks_reward: bool = True
    looks: bool = True
    updates: int = 2


class Reward:
    """Mean brightness and a little of the global generators; from call `at` on in a bad mood.

    What it draws there makes every score depend on the random state that a checkpoint keeps.
    """

    def __init__(self, mood: Mood = "well", at: int = 0) -> None:
        self.mood, self.at, self.calls = mood, at, 0
        self.info = RewardInfo("brightness", "image", True, "0 to 1", "-", "-")

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.calls += 1
        values = media.flatten(1).mean(1) + 0.01 * torch.rand(len(media))
        # NaN is part of the run: the same items fail whether or not it was stopped in between.
        if self.mood == "nan":
            values[media.flatten(1).mean(1) * 1e4 % 4 < 1] = float("nan")
        elif self.mood != "well" and self.calls > self.at:
            if self.mood == "hangs":
                time.sleep(3600)
            raise ValueError("the scorer lost its mind")
        return Scores(values)


@dataclass
class Look:
    """A probe that writes what it sees: the weights' sum in a file per step."""

    policy: Any
    seen: list[float] = field(default_factory=list)

    def samples(self, step: int, folder: Path) -> None:
        (folder / "seen.txt").write_text(repr(self._sum()), encoding="utf-8")

    def heldout(self, step: int) -> dict[str, float]:
        return {"sum": self._sum()}

    def scores(self, step: int) -> dict[str, Any]:
        """Best at step 12: every look up to it leaves weights in best/, and the last none."""
        pictures = np.arange(6.0).reshape(3, 2)
        return {"sum": pictures - 0.1 * abs(step - 12) + 1e-3 * self._sum()}

    def _sum(self) -> float:
        return float(sum(p.detach().double().sum() for p in self.policy.trainable_parameters()))


def _online(name: str, options: Any) -> Callable[[Reward, Path | None], Any]:
    """A builder of an online method on a linear toy, or a small pipeline with LoRA."""

    def build(reward: Reward, pipeline: Path | None) -> Any:
        chosen = replace(options, reward_timeout=0.4 if reward.mood == "hangs" else 0.0)
        return catalogue.load(catalogue.resolve(name).target)(
            _policy(pipeline),
            reward,
            PROMPTS,
            options=chosen,
            sampling=SamplingOptions(steps=3, guidance_scale=1.0, batch_size=4, eta=1.0),
            seed=5,
        )

    return build


def _policy(pipeline: Path | None) -> Any:
    if pipeline is None:
        return toy().ToyPolicy()
    from diffusion_align import Policy

    return Policy.load(pipeline, lora_rank=2)


def _reward_training(reward: Reward, pipeline: Path | None) -> RewardTraining:
    learnt, held_out = pairs()
    plan = RewardPlan("tiny-clip", head="regression", layers="relu", hidden=(16, 8, 8, 8))
    return RewardTraining(
        plan,
        learnt,
        validation=held_out,
        options=RewardOptions(
            loss="bradley-terry", batch_size=6, batches_per_iteration=4, validate_every=3
        ),
        seed=5,
    )


@functools.cache
def toy() -> ModuleType:
    """The linear-Gaussian world of the algorithm tests."""
    path = Path(__file__).parent.parent / "algorithms" / "toy.py"
    spec = importlib.util.spec_from_file_location("toy_of_faults", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["toy_of_faults"] = module
    spec.loader.exec_module(module)
    return module


@functools.cache
def pairs() -> tuple[Judgements, Judgements]:
    """Judged pairs of the small world: to learn from, and held out."""
    made = []
    for judged in (
        judged_pairs(20, 0, "train", HPS_CROWD),
        judged_pairs(8, 0, "heldout", HPS_CROWD),
    ):
        rows = zip(judged.captions, judged.first, judged.second, judged.preferred, strict=True)
        made.append(Judgements.of([Pair(c, a, b, {"overall": float(p)}) for c, a, b, p in rows]))
    return made[0], made[1]


def warm(pipeline: str) -> None:
    """Import what loading a pipeline needs, in the process that forks."""
    _policy(Path(pipeline))


def prepare() -> None:
    """What children would otherwise do again and again: load, draw, import."""
    toy()
    pairs()
    reward_models.backbones.load_tower("tiny-clip")
    for name in RUNS:
        catalogue.load(catalogue.resolve(name).target)


_TRAIN = TrainOptions(
    steps=16,
    learning_rate=1e-2,
    schedule="cosine",
    warmup_steps=3,
    accumulation=2,
    checkpoint_every=2,
    keep_checkpoints=2,
    sample_every=4,
    ema_decay=0.9,
)
_COLLECTION: dict[str, Any] = {
    "prompts_per_iteration": 3,
    "samples_per_prompt": 4,
    "train_batch_size": 3,
    "buffer_size": 6,
    "buffer_min_count": 4,
}

RUNS: dict[str, SmallRun] = {
    "ddpo": SmallRun(
        _online("ddpo", DDPOOptions(**_COLLECTION, timestep_fraction=0.7, clip_range=0.05)), _TRAIN
    ),
    "rwr": SmallRun(_online("rwr", RWROptions(**_COLLECTION, timesteps_per_sample=2)), _TRAIN),
    "draft": SmallRun(
        _online(
            "draft",
            DraftOptions(
                preset="alignprop",
                prompts_per_iteration=3,
                samples_per_prompt=4,
                train_batch_size=6,
                lv_copies=0,
                range_check="off",
            ),
        ),
        _TRAIN,
        updates=1,
    ),
    "reward": SmallRun(_reward_training, _TRAIN, asks_reward=False, looks=False),
}
