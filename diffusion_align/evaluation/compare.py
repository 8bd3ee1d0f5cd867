"""Base against tuned: generate, score, measure, report.

Both models draw the prompts slice by slice (`measuring`), and the pictures are written. Scores are
those of the written 8-bit pictures: scoring the PNGs again gives the same numbers. (Of clips all
frames are scored and a strip of four is written.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion_align.data.images import write_png
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.errors import UserError
from diffusion_align.evaluation.comparison import (
    DIVERSITY,
    Comparison,
    Setup,
    Side,
    find_alarms,
    find_notes,
    picture_name,
)
from diffusion_align.evaluation.generate import Pictures, Reference, generate
from diffusion_align.evaluation.measuring import Draw, measure_all, measure_slice, results_of
from diffusion_align.evaluation.report import write_report
from diffusion_align.sampling.options import ResolvedSampling, SamplingOptions, resolve_sampling

if TYPE_CHECKING:
    from diffusion_align.data.diversity import Features
    from diffusion_align.policy import Policy
    from reward_models.base import Reward

DETERMINISTIC = SamplingOptions(eta=0.0, flow_kind="ode")


def compare(
    policy: Policy,
    prompts: str | Path | Sequence[str | Prompt],
    *,
    rewards: Mapping[str, Reward],
    output: str | Path,
    trained_on: Sequence[str] | None = None,
    seeds: int = 4,
    sampling: SamplingOptions = DETERMINISTIC,
    run_seed: int = 0,
    tuned_name: str = "tuned",
    training_prompts: Sequence[str] = (),
    features: Features | None = None,
    against: Reference = "base",
    base: Policy | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Compare a tuned policy with its base and write the report.

    Args:
        policy: a tuned policy; its own reference gives the base, unless `base` is given.
        prompts: what `load_prompts` takes; 20 or more for a verdict.
        rewards: name -> scorer. Name at least one that was not trained on.
        output: folder for pictures, `report.html`, `scores.csv`, `summary.json`, `grid.png`.
        trained_on: which rewards the run was trained with, by name; None where that is unknown,
            and then none of them is called held out.
        seeds: pictures per prompt, 2 or more for diversity.
        sampling: None values stand for the model's own; deterministic unless told otherwise.
        run_seed: chooses the evaluation noise.
        tuned_name: what the report calls the tuned model, e.g. the adapter's folder.
        training_prompts: prompts of the run, so that the report can say where they meet.
        features: pixels `[B, 3, H, W]` -> features `[B, D]`; diversity is measured in this space
            instead of pixel space.
        against: what "base" is: the model without any adapter, or the policy as its training began
            (they differ where it continued from a LoRA).
        base: a base model of its own, for a tuned model that was saved whole; `against` is then
            not read. Both draw with this model's default sampling.
        overwrite: replace an earlier comparison in `output`.
        progress: called with pictures done and pictures in all.

    Raises:
        UserError: no reward, no prompt, `output` holds a comparison already, or `base` and
            `policy` cannot share noise.
        RewardError: a reward broke its contract.
    """
    output = Path(output)
    items = load_prompts(prompts)
    check_asked(rewards, seeds)
    _check_output(output, overwrite)
    info = policy.info if base is None else base.info
    settings = resolve_sampling(sampling, info)
    if base is not None:
        _check_same_noise(base, policy, settings)
    _clear(output)
    sides: dict[Side, Draw] = {
        "base": (
            partial(generate, policy, reference=against)
            if base is None
            else partial(generate, base)
        ),
        "tuned": partial(generate, policy),
    }
    tables = measure_all(
        {side: partial(draw, run_seed=run_seed) for side, draw in sides.items()},
        lambda pictures, part: measure_slice(
            pictures, part, rewards, policy, settings.batch_size, features
        ),
        lambda side, pictures, first: _write_pictures(output, side, pictures, first),
        items,
        seeds,
        settings,
        progress,
    )
    results = results_of(tables["base"], tables["tuned"], rewards, trained_on, features is not None)
    comparison = Comparison(
        setup=Setup(
            model=without_path(info.name),
            tuned=tuned_name,
            sampler=sampler_name(policy.family.schedule, settings),
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            height=settings.height,
            width=settings.width,
            seeds=seeds,
            run_seed=run_seed,
        ),
        prompts=tuple(items),
        results=results,
        trained_on=tuple(trained_on or ()),
        alarms=find_alarms(results),
        notes=find_notes(
            results,
            trained_on=trained_on,
            prompts=items,
            training_prompts=training_prompts,
            seeds=seeds,
        ),
        folder=output,
    )
    write_report(comparison)
    return comparison


def sampler_name(schedule: str, sampling: SamplingOptions) -> str:
    """The sampler in words: `DDIM (eta 0)`, `flow ODE`, `flow SDE (noise level 0.7)`."""
    if schedule == "ddim":
        return f"DDIM (eta {sampling.eta:g})"
    kind = "dance" if sampling.flow_kind == "dance" else sampling.flow_kind.upper()
    strength = "" if sampling.flow_kind == "ode" else f" (noise level {sampling.noise_level:g})"
    return f"flow {kind}{strength}"


def check_asked(rewards: Mapping[str, Reward], seeds: int) -> None:
    """Refuse what nothing can be measured with.

    Raises:
        UserError: no reward, names that the report needs for itself, or no picture per prompt.
    """
    if not rewards:
        raise UserError(
            "a comparison needs at least one reward",
            where="rewards",
            fix="name the trained reward and one that was not trained on",
        )
    if DIVERSITY in rewards:
        raise UserError(
            f"a reward cannot be called {DIVERSITY!r}: the report has a row of that name",
            where="rewards",
            fix="give it another name",
        )
    for name in rewards:
        if any(name.startswith(f"{other}/") for other in rewards):
            raise UserError(
                f"{name!r} reads as a part of another reward",
                where="rewards",
                fix="give it another name",
            )
    if seeds < 1:
        raise UserError(f"{seeds} pictures per prompt", where="seeds", fix="use 1 or more")


def _check_output(output: Path, overwrite: bool) -> None:
    if output.exists() and not output.is_dir():
        raise UserError("this is a file; a folder is needed", where=str(output))
    if (output / "summary.json").exists() and not overwrite:
        raise UserError(
            "this folder already holds a comparison",
            where=str(output),
            fix="choose another folder, or say that it may be overwritten",
        )


def _check_same_noise(base: Policy, tuned: Policy, sampling: ResolvedSampling) -> None:
    """Pairs share their noise, so both models need the same latents and the same process."""
    kinds = [policy.family.name for policy in (base, tuned)]
    if kinds[0] != kinds[1]:
        raise UserError(
            f"{base.info.name} is {kinds[0]} and {tuned.info.name} is {kinds[1]}",
            where="base",
            fix="compare a tuned model with the model it was tuned from",
        )
    size = (sampling.height, sampling.width)
    shapes = [policy.latent_shape(*size) for policy in (base, tuned)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"latents of {base.info.name} are {list(shapes[0])} and of {tuned.info.name} "
            f"{list(shapes[1])}",
            where="base",
            fix="compare a tuned model with the model it was tuned from",
        )


def _write_pictures(output: Path, side: Side, pictures: Pictures, first: int) -> None:
    count, seeds = pictures.valid.shape
    for p in range(count):
        for s in range(seeds):
            path = output / picture_name(side, first + p, s)
            write_png(path, pictures.pixels[p, s].numpy())


def _clear(output: Path) -> None:
    """Remove what an earlier comparison wrote, and nothing else that lies there."""
    for name in ("report.html", "scores.csv", "summary.json", "grid.png"):
        (output / name).unlink(missing_ok=True)
    for path in (output / "pictures").glob("*/p[0-9]*_s[0-9]*.png"):
        path.unlink()


def without_path(model: str) -> str:
    """A model's name; of a folder, its last part: a report is read by others."""
    path = Path(model).expanduser()
    return path.resolve().name if path.is_absolute() or path.is_dir() else model
