"""`score`: rewards of pictures on disk, restartable."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.outputs import check_file
from diffusion_align.commands.progress import bar
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from reward_models.scoring import ScoredFile


def score(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Images and folders.")],
    reward: Annotated[str, typer.Option(metavar="A,B", help="Rewards (diffusion-align rewards).")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="JSON lines; an existing file is continued.")
    ] = Path("scores.jsonl"),
    prompts: Annotated[
        Path | None, typer.Option(metavar="FILE", help='JSON lines {"path", "prompt"}.')
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="One prompt for all.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
) -> None:
    """Score images with one or more rewards.

    Example: diffusion-align score pictures --reward aesthetic,compressibility --out scores.jsonl
    """
    names = reward_names(reward)
    if prompt is not None and prompts is not None:
        raise UserError("choose --prompt or --prompts, not both")
    for path in (*paths, *([prompts] if prompts else [])):
        if not path.exists():
            raise UserError("no such file or folder", where=str(path))
    check_file(out)
    from diffusion_align.assemble import score_pictures

    try:
        with bar("scoring") as progress:
            rows = score_pictures(
                paths,
                names,
                out,
                prompts=prompts,
                prompt=prompt or "",
                device=device,
                batch_size=batch_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. Rows so far are in {out}; the same command goes on.", err=True)
        raise typer.Exit(130) from None
    for name in names:
        typer.echo(_summary(name, rows))
    failed = [row for row in rows if row.error]
    for row in failed:
        # What could not be read at all names the file itself.
        named = str(row.error).startswith(f"{row.path}: ")
        typer.echo(f"not scored: {'' if named else f'{row.path}: '}{row.error}", err=True)
    typer.echo(f"{len(rows) - len(failed)} of {len(rows)} scored: {out}")
    if len(failed) == len(rows):
        raise typer.Exit(2)


def reward_names(words: str) -> list[str]:
    """The names in `a,b`, each known and given once.

    Raises:
        UserError: no name, or one given twice.
        RewardError: an unknown name, with the nearest one.
    """
    from reward_models.catalogue import check_name

    names = [word.strip() for word in words.split(",") if word.strip()]
    if not names:
        raise UserError("no reward is named", where="--reward", fix="see diffusion-align rewards")
    for name in names:
        check_name(name)
    if len(set(names)) < len(names):
        raise UserError("a reward is named twice", where="--reward", fix=f"given: {words}")
    return names


def _summary(name: str, rows: Sequence[ScoredFile]) -> str:
    values = [value for row in rows if (value := row.scores.get(name)) is not None]
    if not values:
        return f"{name}: nothing scored"
    mean = math.fsum(values) / len(values)
    return f"{name}: mean {mean:.4g}, lowest {min(values):.4g}, highest {max(values):.4g}"
