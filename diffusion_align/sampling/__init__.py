"""Making pictures: one random stream per item, rollouts, trajectories.

Nothing is imported until it is used (PEP 562): the options need no torch. The function `rollout` is
imported from its module, `diffusion_align.sampling.rollout`, which bears the same name.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.sampling.options import (
        ResolvedSampling,
        SamplingOptions,
        resolve_sampling,
    )
    from diffusion_align.sampling.rollout import Trajectory
    from diffusion_align.sampling.seeds import normal, stream

_HOMES = {
    "ResolvedSampling": "diffusion_align.sampling.options",
    "SamplingOptions": "diffusion_align.sampling.options",
    "resolve_sampling": "diffusion_align.sampling.options",
    "Trajectory": "diffusion_align.sampling.rollout",
    "normal": "diffusion_align.sampling.seeds",
    "stream": "diffusion_align.sampling.seeds",
}

__all__ = [
    "ResolvedSampling",
    "SamplingOptions",
    "Trajectory",
    "normal",
    "resolve_sampling",
    "stream",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
