"""Proof: base and tuned model on the same prompts and noise, with statistics and pictures.

`generate` makes the pictures, `statistics` and `diversity` measure them, `compare` puts both
together, `report` writes `report.html`, `sweep` does it at parts of a LoRA's strength, and `probe`
does a small version of it during training.
Nothing is imported until it is used (PEP 562). `compare`, `generate` and `sweep` share their names
with their files and come from there: `from diffusion_align.evaluation.compare import compare`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.evaluation.comparison import Comparison, Result, Setup
    from diffusion_align.evaluation.generate import Pictures, evaluation_sampling
    from diffusion_align.evaluation.options import EvaluationOptions
    from diffusion_align.evaluation.probe import Probe
    from diffusion_align.evaluation.report import write_report
    from diffusion_align.evaluation.statistics import Paired, paired
    from diffusion_align.evaluation.sweep import Sweep

_HOMES = {
    "Comparison": "comparison",
    "EvaluationOptions": "options",
    "Paired": "statistics",
    "Pictures": "generate",
    "Probe": "probe",
    "Result": "comparison",
    "Setup": "comparison",
    "Sweep": "sweep",
    "evaluation_sampling": "generate",
    "paired": "statistics",
    "write_report": "report",
}

__all__ = [
    "Comparison",
    "EvaluationOptions",
    "Paired",
    "Pictures",
    "Probe",
    "Result",
    "Setup",
    "Sweep",
    "evaluation_sampling",
    "paired",
    "write_report",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
