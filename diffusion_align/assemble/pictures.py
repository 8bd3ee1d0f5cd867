"""Models and pictures on disk: sample from a model, compare two, score picture files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion_align.assemble.loading import load_rewards, load_tuned
from diffusion_align.assemble.named import (
    run_name,
    shown_names,
    training_prompts,
    with_negative,
)
from diffusion_align.assemble.named import trained_on as rewards_of
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.data.prompts import Prompt
    from diffusion_align.evaluation.comparison import Comparison
    from diffusion_align.policy import Policy
    from diffusion_align.policy.tuned import Tuned
    from diffusion_align.sampling.options import SamplingOptions
    from reward_models.scoring import Scored


Progress = Callable[[int, int], None]
"""Called with what is done and what there is in all."""


@dataclass(frozen=True)
class Drawing:
    """How `sample` and `compare` make pictures; None is the run's value, else the model's own."""

    steps: int | None = None
    guidance_scale: float | None = None
    seeds: int = 1
    seed: int = 0
    device: str = "auto"
    batch_size: int = 16
    eta: float | None = None
    dtype: str | None = None

    def sampling(self, run: RunConfig | None) -> SamplingOptions:
        """These settings over those of the evaluation of `run`; deterministic without a run."""
        from diffusion_align.evaluation.generate import evaluation_sampling
        from diffusion_align.evaluation.options import EvaluationOptions
        from diffusion_align.sampling.options import SamplingOptions

        known = run.evaluation if run else EvaluationOptions()
        guidance = self.guidance_scale
        chosen = replace(
            known,
            steps=known.steps if self.steps is None else self.steps,
            guidance_scale=known.guidance_scale if guidance is None else guidance,
            eta=known.eta if self.eta is None else self.eta,
        )
        return evaluation_sampling(
            run.sampling if run else SamplingOptions(), chosen, batch_size=self.batch_size
        )

    def loading(self, model: str, run: RunConfig | None) -> dict[str, Any]:
        """What `Policy.load` is told beside the model."""
        dtype = self.dtype or (run.model.dtype if run else "float32")
        revision = run.model.revision if run and run.model.id == model else None
        return {"device": self.device, "dtype": dtype, "revision": revision}


def sample_pictures(
    model: str,
    tuned: Tuned | None,
    prompts: Sequence[Prompt],
    out: Path,
    drawing: Drawing,
    progress: Progress | None = None,
) -> list[Path]:
    """Pictures of `prompts` as PNGs in `out`, and `prompts.jsonl`, which `score` reads.

    What was tuned is drawn as its run was evaluated, where it says so. Pictures of an earlier call
    in `out` are removed first.
    """
    import json

    from diffusion_align.data.images import write_png
    from diffusion_align.evaluation.generate import generate
    from diffusion_align.policy import Policy
    from diffusion_align.secrecy.redaction import redact

    run = run_of(tuned, needed=False) if tuned else None
    how = drawing.loading(model, run)
    policy = load_tuned(model, tuned, **how) if tuned else Policy.load(model, **how)
    _tell(policy)
    prompts = with_negative(prompts, run) if run else prompts
    _clear(out)
    files: list[Path] = []
    rows: list[str] = []
    stride = max(1, drawing.batch_size // drawing.seeds)
    for first in range(0, len(prompts), stride):
        part = prompts[first : first + stride]
        pictures = generate(
            policy,
            part,
            drawing.seeds,
            drawing.sampling(run),
            run_seed=drawing.seed,
            first_position=first,
        )
        for index, prompt in enumerate(part):
            for seed in range(drawing.seeds):
                name = f"p{first + index:04d}_s{seed:02d}.png"
                files.append(write_png(out / name, pictures.pixels[index, seed].numpy()))
                row = {"path": name, "prompt": redact(prompt.text)}
                rows.append(json.dumps(row, ensure_ascii=False))
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
    """Compare what was tuned with its base model, drawn as its run was evaluated.

    A LoRA is its own base when switched off; of a whole model both are loaded, the base first.

    Args:
        trained_on: rewards of the training; None reads them from the run that `tuned` belongs to,
            and without a run they are unknown.
    """
    from diffusion_align.evaluation.compare import compare
    from diffusion_align.policy import Policy

    run = run_of(tuned, needed=trained_on is None)
    known = [prompt.text for prompt in training_prompts(run)] if run else []
    if trained_on is None and run:
        trained_on = rewards_of(run)
    elif run is None and (record := record_of(tuned)):
        # A run started from Python has no config, but says what it learnt from.
        trained_on = record["trained_on"] if trained_on is None else trained_on
        known = record["prompts"]
    how = drawing.loading(model, run)
    base = Policy.load(model, **how) if tuned.whole else None
    policy = load_tuned(model, tuned, **how)
    _tell(base or policy)
    shown = shown_names([*rewards, *(trained_on or ())])
    return compare(
        policy,
        with_negative(prompts, run) if run else prompts,
        rewards={
            shown[name]: reward for name, reward in load_rewards(rewards, policy.device).items()
        },
        output=out,
        trained_on=None if trained_on is None else [shown[name] for name in trained_on],
        seeds=drawing.seeds,
        sampling=drawing.sampling(run),
        run_seed=drawing.seed,
        tuned_name=run_name(tuned.folder),
        training_prompts=known,
        base=base,
        overwrite=overwrite,
        progress=progress,
    )


def score_pictures(
    paths: Sequence[Path],
    rewards: Sequence[str],
    out: Path,
    *,
    prompts: Path | None = None,
    prompt: str = "",
    frames: str = "uniform:8",
    pool: str = "mean",
    parts: bool = False,
    device: str = "auto",
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Scored:
    """Score images and videos on disk; rows are written to `out` as they come.

    Inputs, prompts and what `out` holds already are looked at before any weights are loaded.
    """
    from reward_models.inputs import look, read_prompts, with_prompts
    from reward_models.rows import Results

    found = look(paths)
    files = [item.path for item in found.items]
    items = with_prompts(found.items, read_prompts(prompts, files) if prompts else prompt)
    results = Results(out, rewards, parts=parts)
    results.made_with(frames=frames, pool=pool)  # a difference is refused before weights are read
    from diffusion_align.policy.devices import device_of
    from reward_models.clips import ClipView
    from reward_models.scoring import refuse_missing_prompts, score_items

    refuse_missing_prompts(items, [name for name in rewards if _needs_prompt(name)])
    if left_out := found.left_out_in_words(but=(prompts, out)):
        print(left_out, file=sys.stderr)  # a bar of progress lets such lines pass above it
    view = ClipView(frames, pool, batch_size=batch_size)
    return score_items(
        items,
        load_rewards(rewards, device_of(device)),
        results,
        batch_size=batch_size,
        view=view,
        parts=parts,
        progress=progress,
    )


def _needs_prompt(name: str) -> bool:
    """Whether the catalogue says so; of a reward that is not in it, loading tells."""
    from reward_models.base import RewardError
    from reward_models.catalogue import components, find

    for component in components(name):
        try:
            if find(component).info.needs_prompt:
                return True
        except RewardError:
            continue
    return False


def record_of(tuned: Tuned) -> dict[str, list[str]] | None:
    """`trained_on` and `prompts` of the run that wrote `tuned`, from its run.json; None without."""
    import json

    for folder in (tuned.folder, tuned.folder.parent):
        try:
            record = json.loads((folder / "run.json").read_text(encoding="utf-8"))
            return {
                name: [str(word) for word in record[name]] for name in ("trained_on", "prompts")
            }
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return None


def run_of(tuned: Tuned, *, needed: bool = True) -> RunConfig | None:
    """The config of the run that wrote `tuned`, where it still lies beside it.

    Args:
        needed: whether a config that cannot be read is an error; else it is as good as none, which
            is said.

    Raises:
        UserError: it cannot be read, for instance because its prompts have been moved.
    """
    from diffusion_align.config import RunConfig, load_config
    from diffusion_align.reporting.console import Console

    for folder in (tuned.folder, tuned.folder.parent):
        record = folder / "config.yaml"
        if not record.is_file():
            continue
        try:
            config = load_config(record, stored=True)
        except UserError as error:
            if needed:
                raise UserError(
                    "it tells what the model was trained on, but is not in order",
                    where=str(record),
                    fix=f"{error}\nor name the rewards of the training with --trained-on",
                ) from error
            Console().message(f"{record} is not in order: drawn with the model's own settings")
            return None
        if not isinstance(config, RunConfig):
            raise UserError(
                "this run trained a reward, not a model that makes pictures",
                where=str(folder),
                fix=f"score pictures with it:  diffusion-align score PICTURES --reward {folder}",
            )
        return config
    return None


def _clear(out: Path) -> None:
    """Remove the pictures of an earlier call, and nothing else that lies there."""
    for path in (out / "prompts.jsonl", *out.glob("p[0-9]*_s[0-9]*.png")):
        path.unlink(missing_ok=True)


def _tell(policy: Policy) -> None:
    """Say on stderr that the model's scheduler was replaced, where it was."""
    from diffusion_align.reporting.console import Console

    if policy.replaced_scheduler:
        Console().message(policy.replaced_scheduler)
