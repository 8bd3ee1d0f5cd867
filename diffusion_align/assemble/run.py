"""A run: train what a config describes, and compare the end with the beginning."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.assemble.loading import load_policy, load_rewards, place_of_rewards
from diffusion_align.assemble.named import (
    heldout_prompts,
    load_algorithm,
    run_name,
    scored_with,
    shown_names,
    trained_on,
    training_prompts,
)
from diffusion_align.assemble.publishing import publish_run, write_model_card
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.assemble.inputs import Inputs
    from diffusion_align.config import RewardRunConfig, RunConfig
    from diffusion_align.evaluation.comparison import Comparison
    from diffusion_align.policy import Policy
    from diffusion_align.training.loop import TrainResult
    from diffusion_align.training.run_folder import RunFolder
    from reward_models.base import Reward


@dataclass(frozen=True)
class TrainedRun:
    """A run that ended: the policy it tuned, the rewards it was measured with, what it left.

    `check` is the self-check of its files in a sentence, "" where none was made; `at_once` is how
    many pictures `memory` lets the comparison make at once, None as the config says.
    """

    policy: Policy
    rewards: Mapping[str, Reward]
    result: TrainResult
    check: str = ""
    at_once: int | None = None


def begin_run(
    config: RunConfig | RewardRunConfig,
    inputs: Inputs,
    *,
    resume: bool = False,
    new: bool = False,
) -> RunFolder:
    """The run's folder, opened, with the resolved config and what it reads in it.

    Of several processes the main one does this, before the loop lets the others in.

    Raises:
        UserError: as `open_run_folder`, or the config or `inputs` cannot be written.
    """
    from diffusion_align.assemble.inputs import write_inputs
    from diffusion_align.config import to_yaml
    from diffusion_align.training.distribution import is_main_process
    from diffusion_align.training.run_folder import RunFolder, open_run_folder

    if not is_main_process():
        return RunFolder(Path(str(config.output)).expanduser())
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
    write_inputs(folder, inputs)
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
    from diffusion_align.assemble.inputs import look_at_inputs
    from diffusion_align.assemble.memory_plan import write_plan
    from diffusion_align.assemble.together import settle_together
    from diffusion_align.evaluation.probe import Probe
    from diffusion_align.reporting.console import Console, Quiet
    from diffusion_align.training.distribution import is_main_process
    from diffusion_align.training.loop import train

    writes = is_main_process()  # of several processes one talks and writes
    console = Console() if writes else Quiet()
    inputs = look_at_inputs(config, resume=resume, say=console.message)
    plan = settle_together(config, resume=resume)
    for line in plan.lines:
        console.message(line)
    asked, config = config, plan.config
    policy = load_policy(config, say=console.message)
    if policy.replaced_scheduler:
        console.message(policy.replaced_scheduler)
    needs = catalogue.resolve(config.algorithm.name).needs
    prompts = training_prompts(config)
    reward_device = place_of_rewards(config, policy)
    reward = reward_models.load(
        config.reward, device=reward_device, needs_gradient=needs.differentiable_reward
    )
    others = [name for name in scored_with(config) if name != config.reward]
    rewards = {config.reward: reward, **load_rewards(others, reward_device)}
    algorithm = load_algorithm(config, policy, reward, prompts)
    probe = Probe(
        policy,
        heldout_prompts(config),
        rewards=rewards,
        options=config.evaluation,
        sampling=config.sampling,
        run_seed=config.seed,
    )
    folder = begin_run(asked, inputs, resume=resume, new=new)
    if writes:
        write_plan(folder.path, plan)
    result = train(
        algorithm,
        options=config.train,
        guards=config.guards,
        output=folder.path,
        resume=resume,
        seed=config.seed,
        reporter=console,
        probe=probe,
    )
    # Who interrupts a run waits for nothing; `push` makes up for it.
    check = ""
    if writes and not result.interrupted:
        check = publish_run(asked, policy, folder.path, console.message)
    return TrainedRun(policy, rewards, result, check, config.evaluation.batch_size)


def compare_run(
    config: RunConfig, run: TrainedRun, progress: Callable[[int, int], None] | None = None
) -> Comparison:
    """The before/after report of a finished run, in its folder `final/`."""
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.evaluation.generate import evaluation_sampling
    from diffusion_align.policy.tuned import find_tuned
    from diffusion_align.reporting.console import Console

    options, learnt = config.evaluation, trained_on(config)
    shown = shown_names([*run.rewards, *learnt])
    comparison = compare(
        run.policy,
        heldout_prompts(config),
        rewards={shown[name]: reward for name, reward in run.rewards.items()},
        output=run.result.folder / "final",
        trained_on=[shown[name] for name in learnt],
        seeds=options.seeds,
        sampling=evaluation_sampling(config.sampling, options, batch_size=run.at_once),
        run_seed=config.seed,
        tuned_name=run_name(run.result.folder),
        training_prompts=[prompt.text for prompt in training_prompts(config)],
        against="start",
        overwrite=True,  # what lies there is an earlier report of this same run
        progress=progress,
    )
    write_model_card(config, find_tuned(run.result.folder), run.check, Console().message)
    return comparison
