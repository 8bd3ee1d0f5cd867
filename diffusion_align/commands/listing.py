"""`rewards`, `models`, `algorithms`, `config`: what there is. Nothing is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from diffusion_align.errors import UserError


def rewards() -> None:
    """List the reward models."""
    from reward_models.catalogue import ROWS

    rows = [
        (
            row.info.name,
            row.info.modality,
            _yes(row.info.differentiable),
            _yes(row.info.needs_prompt),
            _yes(row.installed),
            row.info.range,
            row.info.licence,
        )
        for row in ROWS.values()
    ]
    heads = ("reward", "input", "gradient", "prompt", "installed", "range", "licence")
    _table(heads, rows)
    typer.echo("Your own: package.module:Class, or a function fn(images, prompts) -> [B].")


def models() -> None:
    """List the models known by name."""
    from diffusion_align.policy.catalogue import MODELS

    rows = [
        (m.name, m.family, f"{m.width} x {m.height}", str(m.steps), m.licence, m.note)
        for m in MODELS.values()
    ]
    _table(("model", "family", "pixels", "steps", "licence", ""), rows)
    typer.echo("Also: the folder of a diffusers pipeline, or a hub id owner/name.")


def algorithms() -> None:
    """List the algorithms."""
    from diffusion_align.algorithms.catalogue import ALGORITHMS

    rows = [(a.name, a.description, a.needs.words(), a.source) for a in ALGORITHMS.values()]
    _table(("algorithm", "", "needs", "source"), rows)


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


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on a terminal; tab-separated lines, whole, where another program reads."""
    import sys

    if not sys.stdout.isatty():
        for row in (heads, *rows):
            typer.echo("\t".join(row))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD)
    for index, head in enumerate(heads):
        table.add_column(head, no_wrap=index == 0)
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
