"""What the online methods keep from one iteration to the next, whatever they learn from it.

The plan of prompts, the statistics that rewards are normalised with, and the calls spent so far.
A method holds one of these and adds its equation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from diffusion_align.algorithms.advantages import Normaliser, PromptStatistics
from diffusion_align.algorithms.collection import Collection
from diffusion_align.algorithms.likelihood import branches
from diffusion_align.algorithms.options import CollectionOptions
from diffusion_align.algorithms.plan import Plan
from diffusion_align.data.prompts import PromptSource, load_prompts
from diffusion_align.policy import Policy
from diffusion_align.sampling.options import ResolvedSampling


class Online:
    """Plan, normaliser and the cost so far.

    Args:
        policy: says how many forwards a guided prediction takes.
        prompts: as `load_prompts` takes them.
        options: of the method.
        sampling: how an iteration is sampled.
        seed: of everything random in the plan.
    """

    def __init__(
        self,
        policy: Policy,
        prompts: PromptSource,
        options: CollectionOptions,
        sampling: ResolvedSampling,
        seed: int,
    ) -> None:
        known = load_prompts(prompts)
        self.plan = Plan(known, options.prompts_per_iteration, options.samples_per_prompt, seed)
        statistics = PromptStatistics(options.buffer_size, options.buffer_min_count)
        self._normaliser = Normaliser(options.advantages, options.advantage_clip, statistics)
        self._passes = sampling.steps * branches(sampling.guidance_scale, policy)
        self.calls = 0
        """Denoiser forwards of one sample; a backward counts as two."""

    def normalised(self, collected: Collection) -> Tensor:
        """The rewards as advantages, float32 [N], NaN for NaN; per-prompt statistics move on."""
        return self._normaliser(
            collected.scores.values,
            [item.prompt.text for item in collected.items],
            [item.position for item in collected.items],
        )

    def spread(self, advantages: Tensor) -> dict[str, float]:
        """`advantage/std` and `advantage/clipped`, for the metrics."""
        return self._normaliser.metrics(advantages)

    def spend(self, trained: int) -> dict[str, float]:
        """Count an iteration: its sampling, and `trained` calls of learning. Returns the total."""
        self.calls += len(self.plan) * self._passes + trained
        return {"cost/calls": float(self.calls)}

    def state_dict(self) -> dict[str, Any]:
        """Per-prompt statistics, calls so far, which prompts.

        The data cursor is the iteration itself: the plan is a function of seed and iteration.
        """
        return {
            "prompts": self.plan.fingerprint,
            "statistics": self._normaliser.statistics.state_dict(),
            "calls": self.calls,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned.

        Raises:
            UserError: of a run on other prompts.
        """
        self.plan.check_same(state["prompts"])
        self._normaliser.statistics.load_state_dict(state["statistics"])
        self.calls = state["calls"]
