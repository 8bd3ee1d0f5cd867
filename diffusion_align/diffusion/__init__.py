"""The mathematics of diffusion: predictions, noising, reverse steps, schedules. Imports torch only.

`x_0` is data, `x_T` is noise, `x_t = alpha x_0 + sigma eps`. There is exactly one reverse step per
family, `ddim` and `flow`; sampling, likelihood re-evaluation, reward backpropagation and the
comparison all call it, mostly through `Schedule.step`. Names load on first use (PEP 562).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.diffusion.noising import add_noise, target, train_alpha_bar
    from diffusion_align.diffusion.prediction import PredictionKind, convert, to_eps, to_x0
    from diffusion_align.diffusion.schedules import (
        Schedule,
        ddim_schedule,
        flow_schedule,
    )
    from diffusion_align.diffusion.transitions import FlowKind, Reduction, Transition, ddim, flow

_HOMES = {
    "FlowKind": "transitions",
    "PredictionKind": "prediction",
    "Reduction": "transitions",
    "Schedule": "schedules",
    "Transition": "transitions",
    "add_noise": "noising",
    "convert": "prediction",
    "ddim": "transitions",
    "ddim_schedule": "schedules",
    "flow": "transitions",
    "flow_schedule": "schedules",
    "target": "noising",
    "to_eps": "prediction",
    "to_x0": "prediction",
    "train_alpha_bar": "noising",
}

__all__ = [
    "FlowKind",
    "PredictionKind",
    "Reduction",
    "Schedule",
    "Transition",
    "add_noise",
    "convert",
    "ddim",
    "ddim_schedule",
    "flow",
    "flow_schedule",
    "target",
    "to_eps",
    "to_x0",
    "train_alpha_bar",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
