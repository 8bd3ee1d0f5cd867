"""Reward models: how much would people like this picture?

Worth installing by itself; imports nothing of `diffusion_align`. Two lines score a picture:

    import reward_models
    reward = reward_models.load("aesthetic")
    scores = reward.score(images, prompts)     # images: float32 [B, 3, H, W] in [0, 1]

`reward_models.names()` lists what there is. Everything here is loaded when it is first used, so
importing the package brings in no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from reward_models.base import (
        Reward,
        RewardError,
        RewardInfo,
        Scores,
        check_scores,
        require_gradient,
    )
    from reward_models.catalogue import load, names
    from reward_models.inputs import Item, find_images, find_items, read_prompts
    from reward_models.media import read_image
    from reward_models.plugin import FunctionReward
    from reward_models.rows import ScoredFile
    from reward_models.scoring import score_files
    from reward_models.video.reward import FrameReward

_HOMES = {
    "FrameReward": "video.reward",
    "FunctionReward": "plugin",
    "Item": "inputs",
    "Reward": "base",
    "RewardError": "base",
    "RewardInfo": "base",
    "ScoredFile": "rows",
    "Scores": "base",
    "check_scores": "base",
    "find_images": "inputs",
    "find_items": "inputs",
    "load": "catalogue",
    "names": "catalogue",
    "read_image": "media",
    "read_prompts": "inputs",
    "require_gradient": "base",
    "score_files": "scoring",
}

__all__ = [
    "FrameReward",
    "FunctionReward",
    "Item",
    "Reward",
    "RewardError",
    "RewardInfo",
    "ScoredFile",
    "Scores",
    "check_scores",
    "find_images",
    "find_items",
    "load",
    "names",
    "read_image",
    "read_prompts",
    "require_gradient",
    "score_files",
]


def __getattr__(name: str) -> Any:
    """Import the module that holds `name` on first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
