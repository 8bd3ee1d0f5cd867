"""`demo` and `train`: a config becomes a run folder, and the demo ends with its report."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.progress import bar
from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.assemble import TrainedRun
    from diffusion_align.config import RunConfig

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Change values of the config."),
]


def train(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name in configs/, or a path.")],
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the last checkpoint.")
    ] = False,
    new: Annotated[
        bool, typer.Option("--new", help="Put an existing run aside and begin again.")
    ] = False,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run (default: runs/CONFIG).")
    ] = None,
) -> None:
    """Align a model as a config says.

    Example: diffusion-align train demo train.steps=50
    """
    from diffusion_align.config import load_config

    settled = load_config(config, _words(overrides, output))
    folder = _open(settled, resume=resume, new=new)
    with _interruptible(folder):
        from diffusion_align.assemble import train_run

        run = train_run(settled, resume=resume)
    _stop_if_interrupted(run, folder)
    typer.echo(f"the tuned model: {folder / 'final'}")


def demo(
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder of the run.")
    ] = None,
) -> None:
    """Align the embedded model and prove it: offline, on a CPU, in minutes."""
    from diffusion_align.config import load_config

    settled = load_config("demo", _words(overrides, out))
    # Whoever runs the demo again wants to see it again; an earlier one is put aside, never lost.
    folder = _open(settled, resume=False, new=True)
    with _interruptible(folder):
        from diffusion_align.assemble import compare_run, train_run

        run = train_run(settled, resume=False)
        _stop_if_interrupted(run, folder)
        with bar("comparing") as progress:
            comparison = compare_run(settled, run, progress)
    from diffusion_align.commands.pictures import print_verdict

    print_verdict(comparison)


def _words(overrides: list[str] | None, output: str | None) -> list[str]:
    return [*(overrides or []), *([f"output={output}"] if output else [])]


def _open(config: RunConfig, *, resume: bool, new: bool) -> Path:
    """The run's folder with its config.yaml, settled before anything heavy is imported.

    Raises:
        UserError: a run is there and neither `--resume` nor `--new` was given, none is there to
            resume, or it is resumed with changes that would make it another run.
    """
    from diffusion_align.config import changes_on_resume, load_config, to_yaml
    from diffusion_align.training.run_folder import open_run_folder

    folder = open_run_folder(config.output, resume=resume, new=new).path
    record = folder / "config.yaml"
    if resume and record.exists():
        for line in changes_on_resume(load_config(record), config):
            typer.echo(f"changed since this run began: {line}", err=True)
    unfinished = folder / ".config.yaml"
    try:
        unfinished.write_text(to_yaml(config), encoding="utf-8")
        unfinished.replace(record)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})",
            where=str(record),
            fix="choose another folder with output=...",
        ) from error
    return folder


def _stop_if_interrupted(run: TrainedRun, folder: Path) -> None:
    """After a first Ctrl-C the loop finished its step, saved, and came back."""
    if run.result.interrupted:
        typer.echo(f"stopped by Ctrl-C at step {run.result.steps}, all of it saved", err=True)
        typer.echo(_how_to_go_on(folder), err=True)
        raise typer.Exit(130)


@contextmanager
def _interruptible(folder: Path) -> Iterator[None]:
    """A Ctrl-C that quits at once ends with a word on what was saved."""
    try:
        yield
    except KeyboardInterrupt:
        saved = sorted(folder.glob("checkpoints/step_*"))
        if saved:
            typer.echo(f"\nstopped by Ctrl-C; saved until {saved[-1]}", err=True)
            typer.echo(_how_to_go_on(folder), err=True)
        else:
            typer.echo("\nstopped by Ctrl-C before the first checkpoint was saved", err=True)
        raise typer.Exit(130) from None


def _how_to_go_on(folder: Path) -> str:
    command = shlex.join(["diffusion-align", "train", str(folder / "config.yaml")])
    return f"go on with it:  {command} --resume"
