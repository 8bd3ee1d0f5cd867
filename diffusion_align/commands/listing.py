"""`rewards`, `models`, `algorithms`, `config`: what there is. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from diffusion_align.commands.tables import show_records, show_table
from diffusion_align.errors import UserError


def rewards(
    presets: Annotated[
        bool, typer.Option("--presets", help="List the normalisations for sums instead.")
    ] = False,
) -> None:
    """List the reward models; MB is what has to be downloaded for one, its tower included."""
    if presets:
        from reward_models.presets import describe

        show_records(("preset", "reward", "formula", "source"), describe(), short=3)
        typer.echo('For sums: --reward "0.5*unit(aesthetic) + 0.5*percent(hpsv2.1)"')
        return
    from reward_models.catalogue import ROWS

    rows = [
        (
            row.info.name,
            row.info.modality,
            _yes(row.info.differentiable),
            _yes(row.info.needs_prompt),
            _size(row.megabytes),
            _yes(row.installed),
            row.info.range,
            row.info.licence,
            row.info.source,
        )
        for row in ROWS.values()
    ]
    heads = ("reward", "input", "gradient", "prompt", "MB", "installed")
    show_records((*heads, "range", "licence", "source"), rows, short=6, numbers=["MB"])
    typer.echo("Your own: package.module:Class, or a function fn(images, prompts) -> [B].")
    typer.echo("Trained here: the folder of its run.   Sums: 0.7*hpsv2.1 + 0.3*aesthetic")


def models() -> None:
    """List the models known by name."""
    from diffusion_align.policy.catalogue import MODELS

    rows = [
        (m.name, m.family, f"{m.width} x {m.height}", str(m.steps), m.licence, m.note)
        for m in MODELS.values()
    ]
    show_table(("model", "family", "pixels", "steps", "licence", ""), rows)
    typer.echo("Also: the folder of a diffusers pipeline, or a hub id owner/name.")


def algorithms() -> None:
    """List the algorithms."""
    from diffusion_align.algorithms.catalogue import ALGORITHMS

    rows = [(a.name, a.description, a.needs.words(), a.source) for a in ALGORITHMS.values()]
    show_table(("algorithm", "", "needs", "source"), rows)


def config(
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema.")] = False,
    show: Annotated[
        str | None,
        typer.Option("--show", metavar="CONFIG", help="Print a config with everything resolved."),
    ] = None,
    copy: Annotated[
        str | None, typer.Option("--copy", metavar="CONFIG", help="Copy a config to change it.")
    ] = None,
    rest: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ... | DEST]", help="Overrides, or where to copy to."),
    ] = None,
) -> None:
    """List the configs; or print their schema, show one resolved, copy one."""
    from diffusion_align import config as configs

    rest = rest or []
    if sum((schema, show is not None, copy is not None)) > 1:
        raise UserError("choose one of --schema, --show and --copy")
    if schema:
        _nothing_more(rest)
        typer.echo(configs.json_schema())
    elif show is not None:
        typer.echo(configs.to_yaml(configs.load_config(show, rest)), nl=False)
    elif copy is not None:
        _nothing_more(rest[1:])
        target = configs.copy_config(copy, rest[0] if rest else None)
        typer.echo(f"{target}\nrun it: diffusion-align train {target}")
    else:
        _nothing_more(rest)
        for name in configs.config_names():
            typer.echo(name)


def _nothing_more(rest: Sequence[str]) -> None:
    if rest:
        raise UserError(f"what is {rest[0]!r} ?", fix="see diffusion-align config --help")


def _yes(fact: bool) -> str:
    return "yes" if fact else "-"


def _size(megabytes: float) -> str:
    return f"{megabytes:.0f}" if megabytes else "-"
