"""`sweep`: how much of a run's LoRA to use."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.outputs import check_folder
from diffusion_align.commands.progress import bar
from diffusion_align.commands.tables import show_table
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.evaluation.statistics import Paired
    from diffusion_align.evaluation.sweep import Sweep


def sweep(
    run: Annotated[
        Path,
        typer.Argument(metavar="RUN", help="A run with a LoRA, its final/, or one of its best/."),
    ],
    scales: Annotated[
        str, typer.Option(metavar="A,B", help="Shares of the LoRA's strength; 0 is the base.")
    ] = "0.25,0.5,0.75,1",
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Where it goes (default: RUN/sweep).")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Pictures made at once (default: the run's).")
    ] = None,
) -> None:
    """Compare a run's LoRA with its base at several scales, on its held-out prompts.

    The numbers are those of the run's comparison: same prompts, noise, rewards and settings. They
    go to sweep.json, pictures to sweep.png.

    Example: diffusion-align sweep runs/mine --scales 0.25,0.5,0.75,1
    """
    from diffusion_align.assemble.sweeping import FOLDER, run_to_sweep
    from diffusion_align.evaluation.options import check_scales

    wanted = _numbers(scales)
    check_scales(wanted, name="--scales", least=1)
    _, home, _ = run_to_sweep(run)
    check_folder(out or home / FOLDER)
    from diffusion_align.assemble.sweeping import sweep_folder

    with bar("sweeping") as progress:
        found = sweep_folder(
            run, wanted, out=out, device=device, batch_size=batch_size, progress=progress
        )
    print_sweep(found)


def print_sweep(found: Sweep) -> None:
    """Each reward's difference to the base with its interval, per scale, and what follows."""
    rewards = list(dict.fromkeys(r.name for point in found.points for r in point.wholes))
    roles = {r.name: r.role for point in found.points for r in point.wholes}
    # "diversity" is its own role, and unknown says nothing.
    known = {name: f" ({role})" for name, role in roles.items() if role in ("trained", "held-out")}
    rows = []
    for point in found.points:
        measured = {result.name: result.paired for result in point.wholes}
        cells = [_cell(measured[name]) if name in measured else "-" for name in rewards]
        rows.append([f"{point.scale:g}", *cells])
    heads = ["scale", *(f"{name}{known.get(name, '')}" for name in rewards)]
    typer.echo(f"\ndifference to the base, with its 95 % interval ({found.prompts} prompts)")
    show_table(heads, rows, numbers=heads)
    if found.verdict:
        typer.echo(found.verdict)
    typer.echo(f"\nnumbers: {found.folder / 'sweep.json'}")
    typer.echo(f"pictures: {found.folder / 'sweep.png'}")


def _cell(result: Paired) -> str:
    from diffusion_align.evaluation.statistics import difference_text

    return difference_text(result)


def _numbers(text: str) -> list[float]:
    words = [word.strip() for word in text.split(",") if word.strip()]
    try:
        return [float(word) for word in words]
    except ValueError as error:
        raise UserError(
            f"{text!r} is no list of numbers",
            where="--scales",
            fix="write for instance --scales 0.25,0.5,0.75,1",
        ) from error
