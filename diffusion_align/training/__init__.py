"""Training: one loop for every algorithm, checkpoints, guards."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_EXPORTS = {
    "GuardOptions": "guard_options",
    "TrainOptions": "options",
    "TrainResult": "result",
    "train": "loop",
}


def __getattr__(name: str) -> Any:
    if name in _EXPORTS:
        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
