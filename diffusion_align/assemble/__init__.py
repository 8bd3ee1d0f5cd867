"""The only place that turns resolved settings into objects: policy, rewards, algorithm, evaluation.

`loading` makes single objects, `run` trains what a config describes and compares it with its
beginning, `sweeping` does so at parts of its LoRA's strength, `reward_run` trains a reward,
`pictures` is about models and pictures that lie on disk.
Rooms never see a config; here their constructors get plain arguments. Everything heavy is imported
inside the functions, and the names below on first use (PEP 562), so that importing any of this
costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.assemble.loading import load_policy, load_rewards, load_tuned
    from diffusion_align.assemble.pictures import (
        Drawing,
        compare_pictures,
        sample_pictures,
        score_pictures,
    )
    from diffusion_align.assemble.publishing import merge_run, prepare_upload
    from diffusion_align.assemble.reward_run import TrainedReward, load_judgements, train_reward
    from diffusion_align.assemble.run import TrainedRun, compare_run, train_run
    from diffusion_align.assemble.sweeping import sweep_folder, sweep_run

_HOMES = {
    "Drawing": "pictures",
    "TrainedReward": "reward_run",
    "TrainedRun": "run",
    "compare_pictures": "pictures",
    "compare_run": "run",
    "load_judgements": "reward_run",
    "merge_run": "publishing",
    "prepare_upload": "publishing",
    "load_policy": "loading",
    "load_rewards": "loading",
    "load_tuned": "loading",
    "sample_pictures": "pictures",
    "score_pictures": "pictures",
    "sweep_folder": "sweeping",
    "sweep_run": "sweeping",
    "train_reward": "reward_run",
    "train_run": "run",
}

__all__ = [
    "Drawing",
    "TrainedReward",
    "TrainedRun",
    "compare_pictures",
    "compare_run",
    "load_judgements",
    "load_policy",
    "load_rewards",
    "load_tuned",
    "merge_run",
    "prepare_upload",
    "sample_pictures",
    "score_pictures",
    "sweep_folder",
    "sweep_run",
    "train_reward",
    "train_run",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
