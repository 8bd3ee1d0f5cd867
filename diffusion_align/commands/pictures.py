"""`sample` and `compare`: pictures of a model, and the proof that tuning made them better."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.outputs import check_empty, check_folder
from diffusion_align.commands.progress import bar

if TYPE_CHECKING:
    from diffusion_align.evaluation.comparison import Comparison

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A name, a folder, or a hub id.")]
PromptFile = Annotated[
    str, typer.Option(metavar="FILE", help="A .txt or .jsonl file, or a built-in list.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps (default: the run's, or the model's).")
]
Guidance = Annotated[
    float | None, typer.Option(min=0, help="Guidance scale (default: the run's, or the model's).")
]
Eta = Annotated[
    float | None,
    typer.Option(min=0, max=1, help="Noise of DDIM (default: the run's evaluation.eta, or 0)."),
]
Dtype = Annotated[
    str | None, typer.Option(help="float32, bfloat16 or float16 (default: the run's, or float32).")
]
Seed = Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Chooses the noise.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")]
Batch = Annotated[int, typer.Option(min=1, help="Pictures made at once.")]


def sample(
    model: Model,
    prompts: PromptFile,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the pictures go.")],
    lora: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="What was tuned: a run, its final/, or any LoRA."),
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 1,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace earlier pictures there.")
    ] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: Batch = 16,
) -> None:
    """Make pictures of prompts, with the model as it is or as it was tuned.

    What was tuned is drawn as its run was evaluated; options win.

    Example: diffusion-align sample tiny-sd --lora runs/mine --prompts p.txt --out pictures
    """
    from diffusion_align.data.prompts import load_prompts
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.policy.options import ModelOptions
    from diffusion_align.policy.tuned import find_tuned

    resolve(model)
    if dtype is not None:
        ModelOptions(dtype=dtype)  # type: ignore[arg-type]  # its own check refuses other words
    check_empty(out, overwrite=overwrite)
    wanted = load_prompts(prompts)
    tuned = find_tuned(lora) if lora else None
    from diffusion_align.assemble import Drawing, sample_pictures

    drawing = Drawing(steps, guidance, seeds, seed, device, batch_size, eta, dtype)
    with bar("sampling") as progress:
        files = sample_pictures(model, tuned, wanted, out, drawing, progress)
    typer.echo(f"{len(files)} pictures in {out}; their prompts in {out / 'prompts.jsonl'}")


def compare(
    model: Model,
    tuned: Annotated[
        Path, typer.Option(metavar="DIR", help="What was tuned: a run, its final/, or any LoRA.")
    ],
    prompts: PromptFile,
    reward: Annotated[str, typer.Option(metavar="A,B", help="Rewards to score with.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where the report goes.")],
    seeds: Annotated[int, typer.Option(min=1, help="Pictures per prompt.")] = 4,
    trained_on: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Rewards of the training (default: read from the run)."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier comparison there.")
    ] = False,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    dtype: Dtype = None,
    seed: Seed = 0,
    device: Device = "auto",
    batch_size: Batch = 16,
) -> None:
    """Compare a tuned model with its base: same prompts, same noise, one report.html.

    Both are drawn as the run was evaluated; options win.

    Example: diffusion-align compare tiny-sd --tuned runs/mine --prompts small-world:heldout
    --reward tiny-aesthetic,verifier --out comparison
    """
    from diffusion_align.commands.scoring import reward_names
    from diffusion_align.data.prompts import load_prompts
    from diffusion_align.policy.catalogue import resolve
    from diffusion_align.policy.options import ModelOptions
    from diffusion_align.policy.tuned import find_tuned

    resolve(model)
    if dtype is not None:
        ModelOptions(dtype=dtype)  # type: ignore[arg-type]  # its own check refuses other words
    check_folder(out)
    wanted = load_prompts(prompts)
    names = reward_names(reward)
    found = find_tuned(tuned)
    from diffusion_align.assemble import Drawing, compare_pictures

    drawing = Drawing(steps, guidance, seeds, seed, device, batch_size, eta, dtype)
    known = reward_names(trained_on) if trained_on else None
    with bar("comparing") as progress:
        comparison = compare_pictures(
            model,
            found,
            wanted,
            names,
            out,
            drawing,
            trained_on=known,
            overwrite=overwrite,
            progress=progress,
        )
    print_verdict(comparison)


def print_verdict(comparison: Comparison) -> None:
    """The verdict, a line per measurement, warnings, and where the report is."""
    typer.echo("")
    typer.echo(comparison.verdict)
    for result in comparison.results:
        role = "" if result.role == "unknown" else f"  ({result.role})"
        typer.echo(f"  {result.headline}{role}")
    for alarm in comparison.alarms:
        typer.echo(f"  warning: {alarm}")
    for note in comparison.notes:
        typer.echo(f"  note: {note}")
    typer.echo(f"\nreport: {comparison.folder / 'report.html'}")
