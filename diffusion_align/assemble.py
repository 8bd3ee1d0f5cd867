"""The only place that turns a resolved config into objects: policy, rewards, algorithm, evaluation.

Everything heavy is imported inside the functions, so that importing this module costs nothing.
Rooms never see a config; here their constructors get plain arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.algorithms.base import Algorithm
    from diffusion_align.config import RunConfig
    from diffusion_align.data.prompts import Prompt
    from diffusion_align.evaluation.comparison import Comparison
    from diffusion_align.policy import Policy
    from diffusion_align.policy.tuned import Tuned
    from diffusion_align.sampling.options import SamplingOptions
    from diffusion_align.training.loop import TrainResult
    from reward_models.base import Reward
    from reward_models.scoring import ScoredFile


Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Drawing:
    """How `sample` and `compare` make pictures; None is the model's own value."""

    steps: int | None = None
    guidance_scale: float | None = None
    seeds: int = 1
    seed: int = 0
    device: str = "auto"
    batch_size: int = 16

    def sampling(self) -> SamplingOptions:
        """Deterministic sampling with these settings."""
        from diffusion_align.sampling.options import SamplingOptions

        return SamplingOptions(
            steps=self.steps,
            guidance_scale=self.guidance_scale,
            eta=0.0,
            batch_size=self.batch_size,
            flow_kind="ode",
        )


@dataclass(frozen=True)
class TrainedRun:
    """A run that ended: the policy it tuned, the rewards it was measured with, what it left."""

    policy: Policy
    rewards: Mapping[str, Reward]
    result: TrainResult


def load_policy(config: RunConfig) -> Policy:
    """The policy that a config describes: LoRA, a LoRA that is continued, or the whole denoiser."""
    from diffusion_align.policy import Policy

    model, lora = config.model, config.lora
    plain: dict[str, Any] = {
        "device": model.device,
        "dtype": model.dtype,
        "revision": model.revision,
        "seed": config.seed,
    }
    if lora is None:
        return Policy.load(model.id, full=True, **plain)
    if lora.path is not None:
        # Rank, alpha and targets are the file's.
        return Policy.load(model.id, lora_path=lora.path, lora_dropout=lora.dropout, **plain)
    return Policy.load(
        model.id,
        lora_rank=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_targets=lora.targets,
        **plain,
    )


def load_tuned(model: str, tuned: Tuned, device: str) -> Policy:
    """The policy to draw with: `model` with a LoRA, or a whole model that was tuned from it.

    A saved pipeline does not say with how many steps and which guidance it is meant to be sampled;
    those are `model`'s.

    Raises:
        UserError: it cannot be loaded, or belongs to a model of another family.
    """
    from diffusion_align.policy import Policy, resolve

    if not tuned.whole:
        return Policy.load(model, lora_path=tuned.path, device=device)
    policy = Policy.load(tuned.path, device=device)
    info = resolve(model)
    if not info.family:
        return policy  # a hub id that is not loaded; the family's own sampling is as good
    if info.family != policy.family.name:
        raise UserError(
            f"this is a whole {policy.family.name} model, but {model} is {info.family}",
            where=str(tuned.path),
            fix="name the model that it was tuned from",
        )
    policy.info = replace(policy.info, steps=info.steps, guidance_scale=info.guidance_scale)
    return policy


def load_rewards(names: Sequence[str], device: object) -> dict[str, Reward]:
    """The rewards of these names, on `device`."""
    import reward_models

    return {name: reward_models.load(name, device=str(device)) for name in names}


def training_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts trained on; those without a negative prompt get the config's."""
    from diffusion_align.data.prompts import load_prompts

    prompts = load_prompts(config.prompts.source)
    negative = config.prompts.negative
    return [p if p.negative else replace(p, negative=negative) for p in prompts]


def heldout_prompts(config: RunConfig) -> list[Prompt]:
    """The prompts of pictures during training and of the comparison."""
    from diffusion_align.data.prompts import load_prompts

    prompts = load_prompts(config.evaluation.prompts)[: config.evaluation.limit]
    negative = config.prompts.negative
    return [p if p.negative else replace(p, negative=negative) for p in prompts]


def scored_with(config: RunConfig) -> list[str]:
    """Names of all rewards of the evaluation: the trained one first, none twice."""
    return list(dict.fromkeys([config.reward, *config.evaluation.rewards]))


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


def train_run(config: RunConfig, *, resume: bool = False) -> TrainedRun:
    """Build everything that a config describes and train; the run folder is open already.

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
    result = train(
        algorithm,
        options=config.train,
        output=config.output,
        resume=resume,
        seed=config.seed,
        reporter=console,
        probe=probe,
    )
    return TrainedRun(policy, rewards, result)


def compare_run(config: RunConfig, run: TrainedRun, progress: Progress | None = None) -> Comparison:
    """The before/after report of a finished run, in its folder `final/`."""
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.evaluation.generate import evaluation_sampling

    options = config.evaluation
    return compare(
        run.policy,
        heldout_prompts(config),
        rewards=run.rewards,
        output=run.result.folder / "final",
        trained_on=[config.reward],
        seeds=options.seeds,
        sampling=evaluation_sampling(
            config.sampling, eta=options.eta, batch_size=options.batch_size
        ),
        run_seed=config.seed,
        tuned_name=str(run.result.folder),
        training_prompts=[prompt.text for prompt in training_prompts(config)],
        against="start",
        progress=progress,
    )


def sample_pictures(
    model: str,
    tuned: Tuned | None,
    prompts: Sequence[Prompt],
    out: Path,
    drawing: Drawing,
    progress: Progress | None = None,
) -> list[Path]:
    """Pictures of `prompts` as PNGs in `out`, and `prompts.jsonl`, which `score` reads."""
    import json

    from diffusion_align.data.images import write_png
    from diffusion_align.evaluation.generate import generate
    from diffusion_align.policy import Policy

    device = drawing.device
    policy = load_tuned(model, tuned, device) if tuned else Policy.load(model, device=device)
    _tell(policy)
    files: list[Path] = []
    rows: list[str] = []
    stride = max(1, drawing.batch_size // drawing.seeds)
    for first in range(0, len(prompts), stride):
        part = prompts[first : first + stride]
        pictures = generate(
            policy,
            part,
            drawing.seeds,
            drawing.sampling(),
            run_seed=drawing.seed,
            first_position=first,
        )
        for index, prompt in enumerate(part):
            for seed in range(drawing.seeds):
                name = f"p{first + index:04d}_s{seed:02d}.png"
                files.append(write_png(out / name, pictures.pixels[index, seed].numpy()))
                rows.append(json.dumps({"path": name, "prompt": prompt.text}, ensure_ascii=False))
        if progress is not None:
            progress(first + len(part), len(prompts))
    (out / "prompts.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return files


def compare_pictures(
    model: str,
    tuned: Tuned,
    prompts: Sequence[Prompt],
    rewards: Sequence[str],
    out: Path,
    drawing: Drawing,
    *,
    trained_on: Sequence[str] | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Comparison:
    """Compare what was tuned with its base model.

    A LoRA is its own base when switched off; of a whole model both are loaded, the base first.

    Args:
        trained_on: rewards of the training; None reads them from the run that `tuned` belongs to.
    """
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.policy import Policy

    run = run_of(tuned, needed=trained_on is None)
    if trained_on is None:
        trained_on = [run.reward] if run else []
    base = Policy.load(model, device=drawing.device) if tuned.whole else None
    policy = load_tuned(model, tuned, drawing.device)
    _tell(base or policy)
    return compare(
        policy,
        prompts,
        rewards=load_rewards(rewards, policy.device),
        output=out,
        trained_on=trained_on,
        seeds=drawing.seeds,
        sampling=drawing.sampling(),
        run_seed=drawing.seed,
        tuned_name=str(tuned.folder),
        training_prompts=[prompt.text for prompt in training_prompts(run)] if run else [],
        base=base,
        overwrite=overwrite,
        progress=progress,
    )


def run_of(tuned: Tuned, *, needed: bool = True) -> RunConfig | None:
    """The config of the run that wrote `tuned`, where it still lies beside it.

    Args:
        needed: whether a config that cannot be read is an error; else it is as good as none.

    Raises:
        UserError: it cannot be read, for instance because its prompts have been moved.
    """
    from diffusion_align.config import load_config

    for folder in (tuned.folder, tuned.folder.parent):
        if not (folder / "config.yaml").is_file():
            continue
        try:
            return load_config(folder / "config.yaml")
        except UserError as error:
            if needed:
                raise UserError(
                    "it tells what the model was trained on, but is not in order",
                    where=str(folder / "config.yaml"),
                    fix=f"{error}\nor name the rewards of the training with --trained-on",
                ) from error
    return None


def score_pictures(
    paths: Sequence[Path],
    rewards: Sequence[str],
    out: Path,
    *,
    prompts: Path | None = None,
    prompt: str = "",
    device: str = "auto",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> list[ScoredFile]:
    """Score images on disk; rows are written to `out` as they come."""
    from diffusion_align.policy.devices import device_of
    from reward_models import find_images, read_prompts, score_files

    images = find_images(paths)
    return score_files(
        images,
        load_rewards(rewards, device_of(device)),
        prompts=read_prompts(prompts, images) if prompts else prompt,
        out=out,
        batch_size=batch_size,
        progress=progress,
    )


def _tell(policy: Policy) -> None:
    """Say on stderr that the model's scheduler was replaced, where it was."""
    from diffusion_align.reporting.console import Console

    if policy.replaced_scheduler:
        Console().message(policy.replaced_scheduler)
