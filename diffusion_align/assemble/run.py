"""A run: train what a config describes, and compare the end with the beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from diffusion_align.assemble.loading import load_policy, load_rewards
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.algorithms.base import Algorithm
    from diffusion_align.config import RewardRunConfig, RunConfig
    from diffusion_align.data.prompts import Prompt
    from diffusion_align.evaluation.comparison import Comparison
    from diffusion_align.policy import Policy
    from diffusion_align.training.loop import TrainResult
    from diffusion_align.training.run_folder import RunFolder
    from reward_models.base import Reward


@dataclass(frozen=True)
class TrainedRun:
    """A run that ended: the policy it tuned, the rewards it was measured with, what it left."""

    policy: Policy
    rewards: Mapping[str, Reward]
    result: TrainResult


def training_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts trained on; those without a negative prompt get the config's."""
    from diffusion_align.data.prompts import load_prompts

    return with_negative(load_prompts(config.prompts.source), config)


def heldout_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of pictures during training and of the comparison."""
    from diffusion_align.data.prompts import load_prompts

    prompts = load_prompts(config.evaluation.prompts)[: config.evaluation.limit]
    return with_negative(prompts, config)


def with_negative(prompts: Sequence[Prompt], config: RunConfig) -> list[Prompt]:
    """`prompts`, where those without a negative prompt get the config's."""
    negative = config.prompts.negative
    return [p if p.negative else replace(p, negative=negative) for p in prompts]


def scored_with(config: RunConfig) -> list[str]:
    """Names of all rewards of the evaluation: the trained one first, none twice."""
    return list(dict.fromkeys([config.reward, *config.evaluation.rewards]))


def trained_on(config: RunConfig) -> list[str]:
    """Names of what the run learns from: its reward and, of a sum, every term."""
    from reward_models.catalogue import components

    return list(dict.fromkeys([config.reward, *components(config.reward)]))


def load_algorithm(
    config: RunConfig, policy: Policy, reward: Reward, prompts: Sequence[Prompt]
) -> Algorithm[Any, Any]:
    """The algorithm that a config names, with its options."""
    from diffusion_align.algorithms import catalogue

    build = catalogue.load(catalogue.resolve(config.algorithm.name).target)
    algorithm: Algorithm[Any, Any] = build(
        policy,
        reward,
        prompts,
        options=config.algorithm.options,
        sampling=config.sampling,
        seed=config.seed,
    )
    return algorithm


def begin_run(
    config: RunConfig | RewardRunConfig, *, resume: bool = False, new: bool = False
) -> RunFolder:
    """The run's folder, opened, with the resolved config in it.

    Raises:
        UserError: as `open_run_folder`, or the config cannot be written.
    """
    from diffusion_align.config import to_yaml
    from diffusion_align.training.run_folder import open_run_folder

    folder = open_run_folder(config.output, resume=resume, new=new)
    record, unfinished = folder.path / "config.yaml", folder.path / ".config.yaml"
    try:
        unfinished.write_text(to_yaml(config), encoding="utf-8")
        unfinished.replace(record)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})",
            where=str(record),
            fix="choose another folder with output=...",
        ) from error
    return folder


def train_run(config: RunConfig, *, resume: bool = False, new: bool = False) -> TrainedRun:
    """Build everything that a config describes, then open the run's folder and train.

    Args:
        resume, new: as in `train`. An earlier run is put aside only when all has been loaded.

    Raises:
        UserError, RewardError: anything a person can put right.
    """
    import reward_models
    from diffusion_align.algorithms import catalogue
    from diffusion_align.evaluation.probe import Probe
    from diffusion_align.reporting.console import Console
    from diffusion_align.training.loop import train

    console = Console()
    policy = load_policy(config)
    if policy.replaced_scheduler:
        console.message(policy.replaced_scheduler)
    needs = catalogue.resolve(config.algorithm.name).needs
    prompts = training_prompts(config)
    reward = reward_models.load(
        config.reward, device=str(policy.device), needs_gradient=needs.differentiable_reward
    )
    others = [name for name in scored_with(config) if name != config.reward]
    rewards = {config.reward: reward, **load_rewards(others, policy.device)}
    algorithm = load_algorithm(config, policy, reward, prompts)
    probe = Probe(
        policy,
        heldout_prompts(config),
        rewards=rewards,
        options=config.evaluation,
        sampling=config.sampling,
        run_seed=config.seed,
    )
    folder = begin_run(config, resume=resume, new=new)
    result = train(
        algorithm,
        options=config.train,
        output=folder.path,
        resume=resume,
        seed=config.seed,
        reporter=console,
        probe=probe,
    )
    return TrainedRun(policy, rewards, result)


def compare_run(
    config: RunConfig, run: TrainedRun, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """The before/after report of a finished run, in its folder `final/`."""
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.evaluation.generate import evaluation_sampling

    options = config.evaluation
    return compare(
        run.policy,
        heldout_prompts(config),
        rewards=run.rewards,
        output=run.result.folder / "final",
        trained_on=trained_on(config),
        seeds=options.seeds,
        sampling=evaluation_sampling(
            config.sampling, eta=options.eta, batch_size=options.batch_size
        ),
        run_seed=config.seed,
        tuned_name=str(run.result.folder),
        training_prompts=[prompt.text for prompt in training_prompts(config)],
        against="start",
        overwrite=True,  # what lies there is an earlier report of this same run
        progress=progress,
    )
