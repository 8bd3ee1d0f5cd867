"""The interval that a likelihood ratio is clipped to. No torch: the options are checked with it."""

from __future__ import annotations

import math
from typing import Literal

from diffusion_align.errors import OptionError

FLOAT32_STEP = 2.0**-23
"""Distance from 1 to the next float32."""


def clip_bounds(clip_range: float, unit: Literal["mean", "nats"] = "mean") -> tuple[float, float]:
    """The interval that the ratio is clipped to.

    `mean`: 1 - c to 1 + c on the ratio of dimension-averaged log-probabilities, as every published
    recipe. `nats`: exp(-c) to exp(c) on the ratio of summed ones, which stays positive for a
    range above 1 (1e-4 mean is 1.6 nats at SD 1.5).

    Raises:
        OptionError: not positive, so small that a bound lies under ten float32 steps from 1, or a
            `mean` range of 1 or more.
    """
    if not clip_range > 0 or not math.isfinite(clip_range):
        raise OptionError("clip_range", f"must be above 0, not {clip_range}")
    if clip_range < 10 * FLOAT32_STEP:
        raise OptionError(
            "clip_range",
            f"{clip_range:g} ({unit}) is under ten float32 steps from 1 "
            f"({10 * FLOAT32_STEP:.2g}): rounding alone would clip",
        )
    if unit == "nats":
        return math.exp(-clip_range), math.exp(clip_range)
    if clip_range >= 1:
        raise OptionError(
            "clip_range",
            f"{clip_range:g} (mean) reaches a ratio of 0",
            fix="mean ranges lie below 1; for a range in nats set clip_unit",
            reads=("clip_unit",),
        )
    return 1 - clip_range, 1 + clip_range
