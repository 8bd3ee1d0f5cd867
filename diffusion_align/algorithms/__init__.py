"""Algorithms: pure losses and advantages, then one file per method with its equations."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "DDPO": "ddpo",
    "DDPOOptions": "options",
    "Draft": "draft",
    "DraftOptions": "draft_options",
    "RWR": "rwr",
    "RWROptions": "rwr_options",
    "RewardOptions": "reward_options",
    "RewardTraining": "reward_training",
    "Supervised": "supervised",
    "SupervisedOptions": "supervised_options",
    "ALGORITHMS": "catalogue",
    "Needs": "catalogue",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
