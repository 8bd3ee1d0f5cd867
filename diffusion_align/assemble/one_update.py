"""A run cut to one update whose largest moments are those of the whole run.

Memory peaks where a chunk is sampled, decoded or scored and where a group of timesteps is trained
on. All of these have the same shapes in one update on few samples and few steps as in the run.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from diffusion_align.errors import UserError
from diffusion_align.sampling.options import resolve_sampling

if TYPE_CHECKING:
    from diffusion_align.algorithms.options import CollectionOptions
    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Policy
    from diffusion_align.policy.catalogue import ModelInfo


@dataclass(frozen=True)
class Amount:
    """What one iteration does, and one update of it.

    samples: of the iteration; steps: denoising steps of each; pairs: (sample, step) pairs that are
    trained on, each inner epoch's counted; different: those that a replay computes, at the most;
    per_update: those of one update.
    """

    samples: int
    steps: int
    pairs: int
    different: int
    per_update: int


def cut_to_one_update(config: RunConfig, info: ModelInfo) -> RunConfig:
    """`config` with one update, as few samples as fill its batches and as few steps.

    Args:
        info: the model's own number of steps, where the config leaves it open.

    Raises:
        UserError: an algorithm that samples no trajectories, or held-out prompts that are missing.
    """
    options, steps = _options(config), config.sampling.steps or info.steps
    trained, group = options.trained_steps(steps), options.timesteps_per_loss
    # Two losses find gradients in place; so does the second of two accumulated minibatches.
    wanted = max(1, min(2 * group, trained))
    few = next((n for n in range(1, steps) if options.trained_steps(n) >= wanted), steps)
    parts = 2 if config.train.accumulation > 1 and trained <= group else 1
    samples = max(min(config.sampling.batch_size, options.samples), options.train_batch_size)
    prompts = next(
        count
        for count in range(1, options.prompts_per_iteration + 1)
        if (n := count * options.samples_per_prompt) >= samples
        and n % options.train_batch_size == 0
    )
    fewer = replace(options.fitting(few), prompts_per_iteration=prompts, inner_epochs=parts)
    return replace(
        config,
        sampling=replace(config.sampling, steps=few),
        algorithm=replace(config.algorithm, options=fewer),
        train=replace(config.train, steps=1, accumulation=parts),
        # A look keeps its last latents alone: how many steps led there changes no memory.
        evaluation=replace(config.evaluation, steps=None, sample_prompts=_looked_at(config)),
    )


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
    options, steps = _options(config), config.sampling.steps or info.steps
    trained = options.trained_steps(steps, quiet_end=quiet_end)
    return Amount(
        samples=options.samples,
        steps=steps,
        pairs=options.samples * trained * options.inner_epochs,
        different=options.different_pairs(steps, quiet_end=quiet_end),
        per_update=options.train_batch_size * trained * config.train.accumulation,
    )


def quiet_end(config: RunConfig, policy: Policy) -> int:
    """How many steps at the end take no noise, in this model's schedule and the config's sampler.

    One where the last step lands on clean data, none where noise is left.
    """
    s = resolve_sampling(config.sampling, policy.info)
    noisy = policy.schedule(s.steps).stochastic_steps(
        eta=s.eta, flow_kind=s.flow_kind, noise_level=s.noise_level
    )
    return s.steps - 1 - int(noisy[-1]) if len(noisy) else s.steps


def _options(config: RunConfig) -> CollectionOptions:
    from diffusion_align.algorithms.options import CollectionOptions

    options = config.algorithm.options
    if not isinstance(options, CollectionOptions):
        raise UserError(
            f"what {config.algorithm.name} needs cannot be estimated: it samples no pictures",
            where="algorithm.name",
            fix="watch memory/peak_gb of the first steps instead",
        )
    return options
