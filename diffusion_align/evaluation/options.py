"""What an evaluation is made of: prompts, seeds, rewards (no torch is imported here)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, require


@dataclass(frozen=True)
class EvaluationOptions:
    """Settings of the pictures made during training and of the comparison after it.

    Base and tuned model get the same prompts and the same `eval` noise, so every reported
    difference is a paired one. Errors: a value out of range raises `OptionError`.
    """

    prompts: str | list[str] = field(
        default="small-world:heldout",
        metadata={
            "doc": "prompts never trained on: a .txt or .jsonl file, a built-in list, or a list"
        },
    )
    limit: int | None = field(
        default=None,
        metadata={"doc": "use only the first so many prompts (null = all); 20 is the least"},
    )
    seeds: int = field(
        default=4, metadata={"doc": "pictures per prompt; 2 or more are needed for diversity"}
    )
    rewards: tuple[str, ...] = field(
        default=(),
        metadata={
            "doc": "rewards scored beside the trained one; name at least one that was not trained"
        },
    )
    sample_prompts: int = field(
        default=8,
        metadata={"doc": "how many of the prompts are drawn and scored during training"},
    )
    batch_size: int = field(
        default=32, metadata={"doc": "pictures made at once (higher needs more memory)"}
    )
    eta: float = field(
        default=0.0,
        metadata={"doc": "noise of the sampler while evaluating; 0 is deterministic (DDIM, ODE)"},
    )
    steps: int | None = field(
        default=None,
        metadata={"doc": "denoising steps while evaluating; null = as many as in training"},
    )
    guidance_scale: float | None = field(
        default=None,
        metadata={
            "doc": "guidance while evaluating; null = as in training. What was trained without "
            "guidance may well be used with it"
        },
    )
    report: bool = field(
        default=True,
        metadata={"doc": "whether a run ends with the comparison in its final/"},
    )

    scale_sweep: tuple[float, ...] = field(
        default=(),
        metadata={
            "doc": "scales of the LoRA, such as [0.25, 0.5, 0.75, 1], at which a run is measured "
            "again after its comparison, to choose how much of it to use; [] = none"
        },
    )

    def __post_init__(self) -> None:
        at_least(self, 1, "limit", "seeds", "sample_prompts", "batch_size", "steps")
        at_least(self, 0, "guidance_scale")
        require(self, "lie in [0, 1]", lambda eta: 0 <= eta <= 1, "eta")
        check_scales(self.scale_sweep, name="scale_sweep")
        if self.scale_sweep and not self.report:
            raise OptionError(
                "scale_sweep",
                "is not read with report: false",
                fix="leave it out, or set evaluation.report=true",
                reads=("report",),
            )


def check_scales(scales: Sequence[float], *, name: str, least: int = 0) -> None:
    """Refuse scales of an adapter that nothing could be drawn with, or that name a scale twice.

    Args:
        name: of the option.
        least: how many there must be.

    Raises:
        OptionError: a scale below 0 or not finite, one that comes twice, or too few.
    """
    if len(scales) < least:
        raise OptionError(name, "is empty", fix="name some, for instance 0.25,0.5,0.75,1")
    for scale in scales:
        if not (math.isfinite(scale) and scale >= 0):
            raise OptionError(name, f"must be at least 0, not {scale}")
    shown = [f"{scale:g}" for scale in scales]
    if twice := sorted({scale for scale in shown if shown.count(scale) > 1}):
        raise OptionError(name, f"{', '.join(twice)} comes twice")
