"""The command line `diffusion-align`: what a person can ask for, and how mistakes are answered.

The commands themselves live in `commands/`, one file per group. Importing this module imports
neither torch nor pydantic: each command brings in what it needs when it runs.
"""

from __future__ import annotations

import sys
import warnings
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from diffusion_align import __version__
from diffusion_align.commands import (
    check,
    doctor,
    listing,
    pictures,
    publish,
    scoring,
    sweep,
    training,
)
from diffusion_align.errors import UserError
from diffusion_align.secrecy.redaction import redact
from diffusion_align.secrecy.streams import redact_standard_streams

_DEBUG = "--debug"


class Guarded(TyperGroup):
    """The command group that turns errors a person can act on into a message and exit code 2."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command; only bugs keep their traceback (and everything does with `--debug`)."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.echo("\nInterrupted.", err=True)
            raise typer.Exit(130) from None
        except Exception as error:
            if ctx.params.get("debug") or not _actionable(error):
                raise
            typer.echo(redact(str(error)), err=True)
            raise typer.Exit(2) from None


def _actionable(error: Exception) -> bool:
    if isinstance(error, UserError):
        return True
    # reward_models stands alone and has an error of its own; where it was never imported, it raised
    # nothing.
    base = sys.modules.get("reward_models.base")
    return base is not None and isinstance(error, base.RewardError)


app = typer.Typer(
    cls=Guarded,
    name="diffusion-align",
    help="Align diffusion models with human preference, and prove it.",
    epilog="Start with: diffusion-align demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option(_DEBUG, help="Show tracebacks.")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Options before the command."""


_RUN, _LOOK = "Run", "Look up"
app.command(rich_help_panel=_RUN)(training.demo)
app.command(rich_help_panel=_RUN)(training.train)
app.command(rich_help_panel=_RUN)(check.check)
app.command(rich_help_panel=_RUN)(pictures.sample)
app.command(rich_help_panel=_RUN)(scoring.score)
app.command(rich_help_panel=_RUN)(pictures.compare)
app.command(rich_help_panel=_RUN)(sweep.sweep)
app.command(rich_help_panel=_RUN)(publish.merge)
app.command(rich_help_panel=_RUN)(publish.push)
app.command(rich_help_panel=_LOOK)(listing.rewards)
app.command(rich_help_panel=_LOOK)(listing.models)
app.command(rich_help_panel=_LOOK)(listing.algorithms)
app.command(rich_help_panel=_LOOK)(listing.config)
app.command(rich_help_panel=_LOOK)(doctor.doctor)


def _format_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """What we say ourselves, plain `UserWarning`s, is one line without a place in the source."""
    if category is UserWarning:
        return f"{message}\n"
    return _FORMAT_WARNING(message, category, filename, lineno, line)


_FORMAT_WARNING = warnings.formatwarning


def main() -> None:
    """Entry point of the console script. `--debug` is understood anywhere on the line."""
    warnings.formatwarning = _format_warning
    redact_standard_streams()
    arguments = sys.argv[1:]
    if _DEBUG in arguments:
        arguments = [_DEBUG, *(word for word in arguments if word != _DEBUG)]
    app(args=arguments, prog_name="diffusion-align")


if __name__ == "__main__":
    main()
