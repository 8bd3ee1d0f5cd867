"""Guards: a run that goes wrong says so, says what to do, and stops before it wastes the night.

`alarm` is what all of them share; `gradients`, `rewards`, `drift` and `heldout` each watch one part
of a run; `watch.Guards` is what the loop talks to. docs/guards.md explains every one.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.training.guards.alarm import GuardStop
    from diffusion_align.training.guards.watch import Guards

_HOMES = {"GuardStop": "alarm", "Guards": "watch"}

__all__ = ["GuardStop", "Guards"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
