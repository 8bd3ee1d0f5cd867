"""Align diffusion models with human preference, and prove it.

The public names below are loaded on first use (PEP 562), so that `import diffusion_align` and the
command line stay free of torch until something is really computed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.algorithms.ddpo import DDPO
    from diffusion_align.algorithms.draft import Draft
    from diffusion_align.algorithms.draft_options import DraftOptions
    from diffusion_align.algorithms.options import DDPOOptions
    from diffusion_align.algorithms.reward_options import RewardOptions
    from diffusion_align.algorithms.reward_training import RewardTraining
    from diffusion_align.algorithms.rwr import RWR
    from diffusion_align.algorithms.rwr_options import RWROptions
    from diffusion_align.algorithms.supervised import Supervised
    from diffusion_align.algorithms.supervised_options import SupervisedOptions
    from diffusion_align.errors import UserError
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.policy import Policy
    from diffusion_align.sampling.options import SamplingOptions
    from diffusion_align.training.loop import train
    from diffusion_align.training.options import TrainOptions

__version__ = "0.1.0"

_HOMES = {
    "DDPO": "diffusion_align.algorithms.ddpo",
    "DDPOOptions": "diffusion_align.algorithms.options",
    "Draft": "diffusion_align.algorithms.draft",
    "DraftOptions": "diffusion_align.algorithms.draft_options",
    "GuardOptions": "diffusion_align.training.guard_options",
    "Policy": "diffusion_align.policy",
    "RWR": "diffusion_align.algorithms.rwr",
    "RWROptions": "diffusion_align.algorithms.rwr_options",
    "RewardOptions": "diffusion_align.algorithms.reward_options",
    "RewardTraining": "diffusion_align.algorithms.reward_training",
    "SamplingOptions": "diffusion_align.sampling.options",
    "Supervised": "diffusion_align.algorithms.supervised",
    "SupervisedOptions": "diffusion_align.algorithms.supervised_options",
    "TrainOptions": "diffusion_align.training.options",
    "UserError": "diffusion_align.errors",
    "compare": "diffusion_align.evaluation.compare",
    "train": "diffusion_align.training.loop",
}

__all__ = [
    "DDPO",
    "DDPOOptions",
    "Draft",
    "DraftOptions",
    "GuardOptions",
    "Policy",
    "RWR",
    "RWROptions",
    "RewardOptions",
    "RewardTraining",
    "SamplingOptions",
    "Supervised",
    "SupervisedOptions",
    "TrainOptions",
    "UserError",
    "__version__",
    "compare",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
