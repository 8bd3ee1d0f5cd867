"""The adapter-scale sweep of a run: at its end, or later of what lies on disk."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.assemble.loading import load_rewards, load_tuned, place_of_rewards
from diffusion_align.assemble.named import heldout_prompts, scored_with, shown_names, trained_on
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffusion_align.assemble.run import TrainedRun
    from diffusion_align.config import RunConfig
    from diffusion_align.evaluation.generate import Reference
    from diffusion_align.evaluation.sweep import Sweep
    from diffusion_align.policy import Policy
    from diffusion_align.policy.tuned import Tuned
    from reward_models.base import Reward

    Progress = Callable[[int, int], None]

FOLDER = "sweep"


def sweep_run(config: RunConfig, run: TrainedRun, progress: Progress | None = None) -> Sweep:
    """The sweep that a run ends with (`evaluation.scale_sweep`), in its folder `sweep/`.

    The base is what it is in the run's own comparison: the policy as its training began.
    """
    return _sweep(
        config,
        run.policy,
        run.rewards,
        config.evaluation.scale_sweep,
        run.result.folder / FOLDER,
        run.at_once,
        "start",
        progress,
    )


def sweep_folder(
    folder: Path,
    scales: Sequence[float],
    *,
    out: Path | None = None,
    device: str = "auto",
    batch_size: int | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """The sweep of a run on disk, drawn and scored as its config says.

    The base is the model without any LoRA, as in `compare`.

    Args:
        folder: a run, its `final/`, or weights that it kept in `best/`.
        out: where the sweep goes; None is `sweep/` in the run.
        batch_size: pictures made at once; None as the config says.

    Raises:
        UserError: no run, or one whose model has no LoRA.
    """
    tuned, home, config = run_to_sweep(folder)
    policy = load_tuned(
        config.model.id,
        tuned,
        device,
        dtype=config.model.dtype,
        revision=config.model.revision,
    )
    rewards = load_rewards(scored_with(config), place_of_rewards(config, policy))
    place = home / FOLDER if out is None else out
    return _sweep(config, policy, rewards, scales, place, batch_size, "base", progress)


def run_to_sweep(folder: Path) -> tuple[Tuned, Path, RunConfig]:
    """What was tuned, the run's folder and its config; nothing heavy is loaded.

    Raises:
        UserError: no run, a config that is not in order, or a model without a LoRA.
    """
    from diffusion_align.config import RunConfig, load_config
    from diffusion_align.policy.tuned import find_tuned

    tuned = find_tuned(folder)
    if tuned.whole:
        raise UserError(
            "every weight of this model was trained, so there is no LoRA to scale",
            where=str(folder),
            fix="sweep a run that trained a LoRA; for this one, compare its kept checkpoints",
        )
    for home in (tuned.folder, *tuned.folder.absolute().parents[:2]):
        if (home / "config.yaml").is_file():
            config = load_config(home / "config.yaml", stored=True)
            if isinstance(config, RunConfig):
                return tuned, home, config
    raise UserError(
        "no config.yaml of a run lies beside this LoRA, so its prompts and rewards are not known",
        where=str(folder),
        fix="give the folder of a run that a config described; in Python: "
        "diffusion_align.evaluation.sweep.sweep",
    )


def _sweep(
    config: RunConfig,
    policy: Policy,
    rewards: Mapping[str, Reward],
    scales: Sequence[float],
    output: Path,
    batch_size: int | None,
    against: Reference,
    progress: Progress | None,
) -> Sweep:
    from diffusion_align.evaluation.generate import evaluation_sampling
    from diffusion_align.evaluation.sweep import sweep

    options, learnt = config.evaluation, trained_on(config)
    shown = shown_names([*rewards, *learnt])
    return sweep(
        policy,
        heldout_prompts(config),
        scales=scales,
        rewards={shown[name]: reward for name, reward in rewards.items()},
        output=output,
        trained_on=[shown[name] for name in learnt],
        seeds=options.seeds,
        sampling=evaluation_sampling(config.sampling, options, batch_size=batch_size),
        run_seed=config.seed,
        against=against,
        progress=progress,
    )
