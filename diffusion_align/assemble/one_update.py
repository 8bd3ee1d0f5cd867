"""A run cut to one update whose largest moments are those of the whole run.

Memory peaks where a chunk is sampled, decoded or scored and where a group of timesteps is trained
on. All of these have the same shapes in one update on few samples and few steps as in the run.
What may be cut is known to the method's own options (`fewer`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

from diffusion_align.errors import UserError
from diffusion_align.sampling.options import resolve_sampling

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Policy
    from diffusion_align.policy.catalogue import ModelInfo


class Sampled(Protocol):
    """What options say of an iteration, of any method that learns from pictures it samples."""

    @property
    def samples(self) -> int: ...

    @property
    def train_batch_size(self) -> int: ...

    @property
    def caveat(self) -> str: ...

    def trained_steps(self, sampling_steps: int, *, quiet_end: int = 1) -> int: ...

    def trained_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int: ...

    def different_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int: ...

    def sampled_calls(self, sampling_steps: int) -> float: ...

    def fewer(self, at_once: int, steps: int, accumulation: int) -> tuple[Any, int, int]: ...

    def dry(self) -> Any: ...


@dataclass(frozen=True)
class Amount:
    """What one iteration does, and one update of it.

    samples: of the iteration; steps: denoising steps of each; calls: of the denoiser, to sample
    them all; pairs: (sample, step) pairs that are trained on, each inner epoch's counted;
    different: those that a replay computes, at the most; per_update: those of one update.
    """

    samples: int
    steps: int
    calls: float
    pairs: int
    different: int
    per_update: int


def cut_to_one_update(config: RunConfig, info: ModelInfo) -> RunConfig:
    """`config` with one update, as few samples as fill its batches and as few steps.

    Args:
        info: the model's own number of steps, where the config leaves it open.

    Raises:
        UserError: an algorithm that samples nothing, or held-out prompts that are missing.
    """
    options, given = options_of(config), config.sampling.steps or info.steps
    fewer, steps, parts = options.fewer(
        config.sampling.batch_size, given, config.train.accumulation
    )
    return replace(
        config,
        sampling=replace(config.sampling, steps=steps),
        algorithm=replace(config.algorithm, options=fewer),
        train=replace(config.train, steps=1, accumulation=parts),
        # A look keeps its last latents alone: how many steps led there changes no memory.
        evaluation=replace(
            config.evaluation, steps=min(2, given), sample_prompts=_looked_at(config)
        ),
    )


def without_meaning(config: RunConfig) -> RunConfig:
    """`config` for pictures that are none: nothing is left that their scores would decide."""
    return replace(config, algorithm=replace(config.algorithm, options=options_of(config).dry()))


def _looked_at(config: RunConfig) -> int:
    """How many prompts fill a batch of pictures on the way or, where it is made, of the report."""
    from diffusion_align.assemble.named import heldout_prompts

    evaluation, known = config.evaluation, len(heldout_prompts(config))
    prompts = known if evaluation.report else min(known, evaluation.sample_prompts)
    return max(1, min(prompts, math.ceil(evaluation.batch_size / evaluation.seeds)))


def amount(config: RunConfig, info: ModelInfo, quiet_end: int) -> Amount:
    """What an iteration of `config` does.

    Args:
        quiet_end: how many steps at the end of a sample take no noise (`quiet_end`).
    """
    options, steps = options_of(config), config.sampling.steps or info.steps
    trained = options.trained_steps(steps, quiet_end=quiet_end)
    return Amount(
        samples=options.samples,
        steps=steps,
        calls=options.samples * options.sampled_calls(steps),
        pairs=options.trained_pairs(steps, quiet_end=quiet_end),
        different=options.different_pairs(steps, quiet_end=quiet_end),
        per_update=options.train_batch_size * trained * config.train.accumulation,
    )


def quiet_end(config: RunConfig, policy: Policy) -> int:
    """How many steps at the end take no noise, in this model's schedule and the config's sampler.

    One where the last step lands on clean data, none where noise is left.
    """
    s = resolve_sampling(config.sampling, policy.info)
    noisy = policy.schedule(s.steps, height=s.height, width=s.width).stochastic_steps(
        eta=s.eta, flow_kind=s.flow_kind, noise_level=s.noise_level
    )
    return s.steps - 1 - int(noisy[-1]) if len(noisy) else s.steps


def options_of(config: RunConfig) -> Sampled:
    """The method's own options.

    Raises:
        UserError: a method that samples nothing.
    """
    from diffusion_align.algorithms import catalogue

    if catalogue.resolve(config.algorithm.name).trains != "policy":
        raise UserError(
            f"what {config.algorithm.name} needs cannot be estimated: it samples no pictures",
            where="algorithm.name",
            fix="watch memory/peak_gb of the first steps instead",
        )
    options: Sampled = config.algorithm.options
    return options
