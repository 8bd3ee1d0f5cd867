"""`demo` and `train`: a config becomes a run folder that ends with its report, or with a reward."""

from __future__ import annotations

import math
import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from diffusion_align.commands.outputs import check_file, check_folder
from diffusion_align.commands.progress import bar

if TYPE_CHECKING:
    from diffusion_align.assemble import TrainedReward
    from diffusion_align.config import RewardRunConfig, RunConfig
    from diffusion_align.training.loop import TrainResult

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[key=value ...]", help="Change values of the config."),
]
NoCompare = Annotated[
    bool,
    typer.Option("--no-compare", help="End without the report (also: evaluation.report=false)."),
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
    no_compare: NoCompare = False,
    output: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder of the run (default: runs/CONFIG).")
    ] = None,
) -> None:
    """Align a model as a config says, and compare it with the model it was; or train a reward.

    Example: diffusion-align train demo train.steps=50 output=runs/mine
    """
    from diffusion_align.config import RewardRunConfig, load_config

    chosen = load_config(config, _words(overrides, output))
    if isinstance(chosen, RewardRunConfig):
        if no_compare:
            typer.echo("--no-compare changes nothing here: a reward is not compared", err=True)
        _run_reward(chosen, resume=resume, new=new)
        return
    if no_compare:
        without = replace(chosen.evaluation, report=False, scale_sweep=())
        chosen = replace(chosen, evaluation=without)
    _run(chosen, resume=resume, new=new)


def demo(
    overrides: Overrides = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Folder of the run.")
    ] = None,
    reward: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="What is trained on (tiny-hps ...); other scorers are held out."
        ),
    ] = None,
) -> None:
    """Align the embedded model and prove it: offline, on a CPU, in minutes."""
    from diffusion_align.config import load_config

    words = _words(overrides, out)
    if reward is not None:
        # Behind it come the person's own changes, which may name other held-out rewards.
        heldout = ", ".join(_held_out_beside(reward))
        words = [f"reward={reward}", f"evaluation.rewards=[{heldout}]", *words]
    # Whoever runs the demo again wants to see it again; an earlier one is put aside, never lost.
    _run(load_config("demo", words), resume=False, new=True)


def _held_out_beside(reward: str) -> list[str]:
    """Scorers that share nothing with the trained one: another crowd's, and the truth."""
    from reward_models.catalogue import check_name, components

    check_name(reward)
    trained = {name.lower() for name in components(reward)}
    crowd = "tiny-hps" if "tiny-mps" in trained else "tiny-mps"
    return [name for name in (crowd, "taste", "verifier") if name not in trained]


def _words(overrides: list[str] | None, output: str | None) -> list[str]:
    return [*(overrides or []), *([f"output={output}"] if output else [])]


def _run(config: RunConfig, *, resume: bool, new: bool) -> None:
    """Train, compare, and say what came of it."""
    folder = Path(str(config.output)).expanduser()
    changes = _check(config, folder, resume=resume, new=new)
    final = folder / "final"
    with _interruptible(folder, new=new):
        from diffusion_align.assemble import compare_run, sweep_run, train_run

        run = train_run(config, resume=resume, new=new)
        if not _is_main_process():
            return
        _stop_if_interrupted(run.result, folder)
        typer.echo(f"the tuned model: {final}")
        if not config.evaluation.report:
            return
        # Training replaces final/. Where a report is still there, nothing was left to train, and it
        # stands unless something else was asked of it.
        stands = (final / "summary.json").exists() and not any(
            c.startswith("evaluation.") for c in changes
        )
        if stands:
            typer.echo(f"\nreport: {final / 'report.html'}")
        else:
            with bar("comparing") as progress:
                comparison = compare_run(config, run, progress)
            from diffusion_align.commands.pictures import print_verdict

            print_verdict(comparison)
        swept = stands and (folder / "sweep" / "sweep.json").exists()
        if config.evaluation.scale_sweep and not swept:
            from diffusion_align.commands.sweep import print_sweep

            with bar("sweeping") as progress:
                found = sweep_run(config, run, progress)
            print_sweep(found)


def _run_reward(config: RewardRunConfig, *, resume: bool, new: bool) -> None:
    """Train a reward, show how it agrees with what was held out, and say how it is used."""
    folder = Path(str(config.output)).expanduser()
    config.data.check_files()
    _check(config, folder, resume=resume, new=new)
    with _interruptible(folder, new=new):
        from diffusion_align.assemble import train_reward

        run = train_reward(config, resume=resume, new=new)
        if not _is_main_process():
            return
        _stop_if_interrupted(run.result, folder)
    _print_validations(run)
    typer.echo(f"the trained reward: {run.file}")
    command = shlex.join(["diffusion-align", "score", "PICTURES", "--reward", str(folder)])
    typer.echo(f"use it:  {command}")


def _print_validations(run: TrainedReward) -> None:
    """One line for each validation; the one whose weights were kept is marked."""
    history, best = run.training.history, run.training.best
    if best is None:
        typer.echo("nothing was held out: these are the last weights, of unknown quality")
        return
    names = [name for name in history[0] if name != "iteration"]
    typer.echo("\t".join(["iteration", *(name.replace("_", " ") for name in names)]))
    for entry in history:
        numbers = [f"{entry.get(name, math.nan):.4f}" for name in names]
        mark = ["kept"] if entry["iteration"] == best["iteration"] else []
        typer.echo("\t".join([f"{entry['iteration']:g}", *numbers, *mark]))


def _check(
    config: RunConfig | RewardRunConfig, folder: Path, *, resume: bool, new: bool
) -> list[str]:
    """Refuse what could not end well, before anything heavy is imported; nothing is changed yet.

    Returns:
        `key: old -> new` of what a resumed run changes; it is told as well.

    Raises:
        UserError: a run is there and neither `--resume` nor `--new` was given, none is there to
            resume, it is resumed with changes that would make it another run, or the folder
            cannot be written.
    """
    from diffusion_align.config import changes_on_resume, load_config
    from diffusion_align.training.run_folder import RunFolder, open_run_folder

    record = folder / "config.yaml"
    check_folder(folder, fix=_ELSEWHERE)
    if resume or (RunFolder(folder).holds_a_run() and not new):
        open_run_folder(folder, resume=resume, new=new)  # refuses, or is there already
    if not new:
        check_file(record, fix=_ELSEWHERE)
    changes: list[str] = []
    if resume and record.exists():
        changes = changes_on_resume(load_config(record, stored=True), config)
    for line in changes:
        typer.echo(f"changed since this run began: {line}", err=True)
    return changes


_ELSEWHERE = "choose another folder with output=..."


def _stop_if_interrupted(result: TrainResult, folder: Path) -> None:
    """After a first Ctrl-C the loop finished its step, saved, and came back."""
    if result.interrupted:
        typer.echo(f"stopped by Ctrl-C at step {result.steps}, all of it saved", err=True)
        typer.echo(_how_to_go_on(folder), err=True)
        raise typer.Exit(130)


@contextmanager
def _interruptible(folder: Path, *, new: bool) -> Iterator[None]:
    """A Ctrl-C that quits at once ends with a word on what was saved."""
    before = _identity(folder) if new else None
    try:
        yield
    except KeyboardInterrupt:
        # An earlier run that was not put aside yet is none of this one's.
        begun = before is None or _identity(folder) != before
        saved = sorted(folder.glob("checkpoints/step_*")) if begun else []
        if saved:
            typer.echo(f"\nstopped by Ctrl-C; saved until {saved[-1]}", err=True)
            typer.echo(_how_to_go_on(folder), err=True)
        else:
            typer.echo("\nstopped by Ctrl-C before the first checkpoint was saved", err=True)
        raise typer.Exit(130) from None


def _is_main_process() -> bool:
    """Of several processes of a launcher one talks, and draws the comparison."""
    return os.environ.get("RANK", "0") == "0"


def _identity(folder: Path) -> int | None:
    """Tells a folder from another one of the same name."""
    return folder.stat().st_ino if folder.exists() else None


def _how_to_go_on(folder: Path) -> str:
    command = shlex.join(["diffusion-align", "train", str(folder / "config.yaml")])
    return f"go on with it:  {command} --resume"
