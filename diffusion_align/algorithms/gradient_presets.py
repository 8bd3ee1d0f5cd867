"""The published methods of reward backpropagation as gradient plans: data with its sources.

A preset says where the gradient goes; loss, target, learning rate and the number of steps are the
config's. `None` options of the method mean "as the preset says".
"""

from __future__ import annotations

from typing import Literal

from diffusion_align.algorithms.gradient_plan import GradientPlan

Preset = Literal["draft", "draft-k", "draft-lv", "alignprop", "refl", "drtune", "vader"]

PRESETS: dict[Preset, GradientPlan] = {
    # Clark et al. 2023, arXiv 2309.17400: the whole chain.
    "draft": GradientPlan(active="all"),
    # Same paper, DRaFT-K; K here is the tail that VideoX-Fun trains Wan 2.1 1.3B with.
    "draft-k": GradientPlan(active="last", active_steps=5),
    # Same paper, DRaFT-LV: the last step, on x_0 and on copies of it noised again. n = 2 and the
    # detached unconditional branch as in FlowBP's draft_lv.
    "draft-lv": GradientPlan(
        active="last", active_steps=1, lv_copies=2, guidance_gradient="conditional"
    ),
    # Prabhudesai et al. 2023, arXiv 2310.03739: from step N(42, 5) of 50 on. Theirs is drawn once
    # as here; TRL's copy draws anew at every step, which leaves a chain with holes.
    "alignprop": GradientPlan(active="cut", cut="normal", cut_mean=0.84, cut_std=0.1),
    # Xu et al. 2023, arXiv 2304.05977: one step, U{30 .. 39} of 40, and its estimate of x_0. They
    # sample without guidance: sampling.guidance_scale=1.
    "refl": GradientPlan(
        reward_input="estimate",
        active="last",
        active_steps=1,
        stop_start=0.75,
        stop_end=1.0,
        guidance_gradient="conditional",
    ),
    # Wu et al. 2024, arXiv 2405.00760, with FlowBP's values: K = 3 spaced steps whose inputs carry
    # no gradient, an early stop in the last 40 % and the estimate there.
    "drtune": GradientPlan(
        reward_input="estimate",
        active="uniform",
        active_steps=3,
        coupling=0.0,
        stop_start=0.6,
        stop_end=1.0,
        guidance_gradient="conditional",
    ),
    # Prabhudesai et al. 2024, arXiv 2407.08737: the last step, both branches, one random frame.
    "vader": GradientPlan(active="last", active_steps=1),
}

REWARD_FRAMES: dict[Preset, str] = {"vader": "random:1"}
"""Frames of a clip that an image reward sees, by the words of `FrameReward`; all elsewhere."""
