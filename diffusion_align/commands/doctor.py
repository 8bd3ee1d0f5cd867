"""`doctor`: what this machine has, and whether its scorers give the published numbers."""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer

from diffusion_align.errors import UserError


def doctor(
    rewards: Annotated[
        bool,
        typer.Option("--rewards", help="Score the HPSv2 demo picture, beside its published value."),
    ] = False,
    picture: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Your copy of that picture (else 30 kB are fetched)."),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 ...")] = "auto",
) -> None:
    """Say what this machine has; with --rewards, check scorers against published scores."""
    if picture is not None and not rewards:
        raise UserError("--picture goes with --rewards")
    if rewards:
        _rewards(picture, device)
    else:
        _machine()


def _machine() -> None:
    import torch

    from diffusion_align import __version__
    from diffusion_align.policy.catalogue import MODELS
    from reward_models.published import library_versions
    from reward_models.table import ROWS
    from reward_models.weights import home

    _line("diffusion-align", __version__)
    _line("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})")
    for name, version in library_versions().items():
        _line(name, version)
    _line("processors", f"{os.cpu_count()}, torch uses {torch.get_num_threads()} threads")
    if sys.platform != "win32":
        pages = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        _line("memory", f"{pages / 2**30:.1f} GiB")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            found = torch.cuda.get_device_properties(index)
            _line(f"cuda:{index}", f"{found.name}, {found.total_memory / 2**30:.1f} GiB")
    else:
        _line("accelerator", "none: everything runs on the processor")
    _line("weights", f"{home()} and the Hugging Face cache")
    ready = [name for name, row in ROWS.items() if row.installed]
    _line("rewards", f"{len(ready)} of {len(ROWS)} need no download: {', '.join(ready)}")
    _line("models", ", ".join(MODELS))


def _rewards(picture: Path | None, device: str) -> None:
    from diffusion_align.policy.devices import device_of
    from reward_models.published import check_published, contradicted, library_versions

    versions = "  ".join(f"{name} {found}" for name, found in library_versions().items())
    typer.echo(f"{versions}\n")
    findings = []
    for finding in check_published(device=str(device_of(device)), picture=picture):
        findings.append(finding)
        known = finding.published
        settings = "".join(f", {key}={value}" for key, value in known.settings)
        name = f"{known.reward}{settings}"
        published = "no published value" if known.value is None else f"published {known.value:g}"
        if finding.value is None:
            typer.echo(f"{name}: {published}\n    {finding.problem}")
            continue
        verdict = {
            None: "",
            True: f"   within {known.tolerance:g}",
            False: f"   more than {known.tolerance:g} away",
        }[finding.agrees]
        typer.echo(f"{name}: {published}, ours {finding.value:.4f}{verdict}")
    if all(finding.value is None for finding in findings):
        typer.echo("\nNothing could be checked here.", err=True)
        raise typer.Exit(2)
    # A figure was made with one setting: only a reward that gives it in none of them is wrong.
    if wrong := contradicted(findings):
        typer.echo(f"\nWRONG in every setting: {', '.join(wrong)}", err=True)
        raise typer.Exit(1)


def _line(name: str, value: str) -> None:
    typer.echo(f"{name:<18}{value}")
