"""`score`: rewards of images and videos on disk, restartable."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.outputs import check_file
from diffusion_align.commands.progress import bar
from diffusion_align.commands.tables import show_table
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from reward_models.rows import ScoredFile

_NAMED_FAILURES = 50
"""Lines about files without a score; all of them stand in the result."""


def score(
    paths: Annotated[
        list[Path],
        typer.Argument(
            metavar="PATH...",
            help="Images, videos, folders, 'patterns/**/*.png', tables with a column path "
            "(.jsonl, .csv, .parquet).",
        ),
    ],
    reward: Annotated[
        str, typer.Option(metavar="A,B", help="Rewards or sums of them (diffusion-align rewards).")
    ],
    out: Annotated[
        Path,
        typer.Option(metavar="FILE", help=".jsonl, .csv or .parquet; what is there is continued."),
    ] = Path("scores.jsonl"),
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Table with path and prompt (.jsonl, .csv, .parquet)."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="One prompt for all that have none of their own.")
    ] = None,
    frames: Annotated[
        str,
        typer.Option(
            metavar="HOW",
            help="What image rewards see of a video: all, first, uniform:N ...",
        ),
    ] = "uniform:8",
    pool: Annotated[
        str,
        typer.Option(
            metavar="HOW", help="How scores of frames become one: mean, min, softmin:TAU."
        ),
    ] = "mean",
    parts: Annotated[
        bool, typer.Option("--parts", help="Write sub-scores too, as reward/part.")
    ] = False,
    sheet: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Draw the best and worst by each reward.")
    ] = None,
    sheet_count: Annotated[
        int, typer.Option(min=1, max=100, help="How many of the best, and of the worst.")
    ] = 8,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
    batch_size: Annotated[int, typer.Option(min=1, help="Images scored at once.")] = 16,
) -> None:
    """Score images and videos with one or more rewards.

    Example: diffusion-align score pictures --reward aesthetic,compressibility --out scores.jsonl
    """
    names = reward_names(reward)
    if prompt is not None and prompts is not None:
        raise UserError("choose --prompt or --prompts, not both")
    if prompts is not None and not prompts.is_file():
        raise UserError("no such file", where=str(prompts))
    _check_outputs(out, sheet)
    from diffusion_align.assemble import score_pictures

    try:
        with bar("scoring") as progress:
            scored = score_pictures(
                paths,
                names,
                out,
                prompts=prompts,
                prompt=prompt or "",
                frames=frames,
                pool=pool,
                parts=parts,
                device=device,
                batch_size=batch_size,
                progress=progress,
            )
    except KeyboardInterrupt:
        typer.echo(f"\nInterrupted. {_kept(out)}", err=True)
        raise typer.Exit(130) from None
    rows = scored.rows
    _summarise(names, rows)
    _tell_truncated(scored.truncated)
    _tell_failures(rows, out)
    done = sum(row.has_a_score for row in rows)
    if sheet is not None and done:
        from reward_models.sheet import draw_sheet

        draw_sheet(rows, names, sheet, count=sheet_count)
        typer.echo(f"best and worst: {sheet}")
    typer.echo(f"{done} of {len(rows)} scored: {out}")
    if not done:
        raise typer.Exit(2)


def reward_names(words: str) -> list[str]:
    """The names in `a,b`, each known, in its canonical spelling, and given once.

    Raises:
        UserError: no name, or one given twice, be it in two spellings.
        RewardError: an unknown name, with the nearest one.
    """
    from reward_models.catalogue import canonical, check_name

    given = [word.strip() for word in words.split(",") if word.strip()]
    if not given:
        raise UserError("no reward is named", where="--reward", fix="see diffusion-align rewards")
    for name in given:
        check_name(name)
    names = [canonical(name) for name in given]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if twice:
        raise UserError(
            f"a reward is named twice: {twice[0]}", where="--reward", fix=f"given: {words}"
        )
    return names


def _check_outputs(out: Path, sheet: Path | None) -> None:
    check_file(out)
    if sheet is None:
        return
    from reward_models.sheet import check_sheet

    check_sheet(sheet)
    check_file(sheet, fix="choose another place with --sheet")


def _kept(out: Path) -> str:
    from reward_models.rows import journal_of

    for place in (journal_of(out), out):
        if place.exists():
            return f"Rows so far are in {place}; the same command goes on."
    return "Nothing was scored yet."


def _summarise(names: Sequence[str], rows: Sequence[ScoredFile]) -> None:
    """Count, spread and range of every reward, and of its parts where rows hold them."""
    keys = list(dict.fromkeys(key for row in rows for key in row.scores))
    heads = ("reward", "count", "failed", "mean", "std", "min", "median", "max")
    table = []
    for key in sorted(keys, key=lambda key: key not in names):
        values = [value for row in rows if (value := row.scores.get(key)) is not None]
        # A file that could not be read has no sub-scores, and its row does not even name them.
        failed = len(rows) - len(values)
        table.append((key, str(len(values)), str(failed), *map(_number, _spread(values))))
    show_table(heads, table, numbers=heads[1:])


def _spread(values: Sequence[float]) -> list[float | None]:
    """Mean, standard deviation (n - 1), smallest, median and largest; None where there is none."""
    if not values:
        return [None] * 5
    std = statistics.stdev(values) if len(values) > 1 else None
    return [
        statistics.fmean(values),
        std,
        min(values),
        statistics.median(values),
        max(values),
    ]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def _tell_truncated(truncated: Mapping[str, int]) -> None:
    for name, count in truncated.items():
        if count:
            what = "prompt was" if count == 1 else "prompts were"
            typer.echo(f"{name}: {count} {what} longer than it reads, and cut", err=True)


def _tell_failures(rows: Sequence[ScoredFile], out: Path) -> None:
    """Every file that no reward could score, or not all; the same reason of many only once."""
    failed = [row for row in rows if row.error]
    images_only = [row for row in failed if row.has_a_score]
    reasons: dict[str, list[str]] = {}
    for row in images_only:
        reasons.setdefault(str(row.error), []).append(row.path)
    lines = []
    for row in failed:
        if not row.has_a_score:
            # What could not be read at all names the file itself.
            named = str(row.error).startswith(f"{row.path}: ")
            lines.append(f"not scored: {'' if named else f'{row.path}: '}{row.error}")
    for reason, paths in reasons.items():
        what = paths[0] if len(paths) == 1 else f"{paths[0]} and {len(paths) - 1} more"
        lines.append(f"not wholly scored: {what}: {reason}")
    for line in lines[:_NAMED_FAILURES]:
        typer.echo(line, err=True)
    if len(lines) > _NAMED_FAILURES:
        typer.echo(f"and {len(lines) - _NAMED_FAILURES} more; see error in {out}", err=True)
