"""`check CONFIG`: will it fit, how long will it take; estimated, then measured on one update."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from diffusion_align.assemble.check import Measured
    from diffusion_align.assemble.estimate import Estimate
    from diffusion_align.config import RunConfig


def check(
    config: Annotated[str, typer.Argument(metavar="CONFIG", help="A name in configs/, or a path.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[key=value ...]", help="Change values of the config."),
    ] = None,
    estimate_only: Annotated[
        bool, typer.Option("--estimate", help="Load no weights and run no update.")
    ] = False,
) -> None:
    """Say what a run needs in memory and time before it is started, then measure one update.

    Example: diffusion-align check ddpo_sd15_aesthetic memory=low
    """
    from diffusion_align.config import RewardRunConfig, load_config

    chosen = load_config(config, overrides or [])
    if isinstance(chosen, RewardRunConfig):
        typer.echo(f"{config}: no problems found")
        typer.echo(
            "Memory and time are estimated of runs that align a model; this one trains a reward.\n"
            "It says its memory at every step (memory/peak_gb)."
        )
        return
    # The profiler speaks of its start and stop, and of blocks that are older than it.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from diffusion_align.assemble.check import least_seconds, measure, missing_weights
    from diffusion_align.assemble.estimate import estimate
    from diffusion_align.assemble.memory_plan import settle

    typer.echo(f"{config}: no problems found")
    plan = settle(chosen)
    for line in plan.lines:
        typer.echo(line)
    found = estimate(plan.config)
    _print_memory(found, plan.config)
    _print_least_time(least_seconds(found, plan.config), plan.config)
    if estimate_only:
        return
    if missing := missing_weights(plan.config):
        typer.echo("\nNo update was run:")
        for line in missing:
            typer.echo(f"  {line}")
        return
    _print_measured(measure(plan.config, _say), found, plan.config)


def _print_memory(found: Estimate, config: RunConfig) -> None:
    from diffusion_align.policy.devices import device_of
    from diffusion_align.training.memory import free_bytes

    device = device_of(config.model.device)
    typer.echo(f"\nMemory on {device}, estimated before anything large is loaded")
    for name, size in (*found.held.items(), *found.later.items(), *found.collected.items()):
        _row(name, _size(size))
    for name, size in found.phases.items():
        if name == "updating":
            _row("gradients", _size(found.gradients))
            _row("training: activations", _size(size - found.gradients))
        else:
            _row(_PHASES.get(name, name), _size(size))
    _row("the most at once", f"{_size(found.peak)}   ({_PHASES[found.fullest]})")
    _row("free now", _size(free_bytes(device)))
    for name, size in found.beside.items():
        _row(f"elsewhere: {name}", _size(size))
    for sentence in found.unknown:
        typer.echo(f"  {sentence}")


_PHASES = {
    "sampling": "sampling: activations",
    "decoding": "decoding: activations",
    "scoring": "scoring: activations",
    "updating": "training: activations",
    "optimiser": "optimiser step",
    "looking": "pictures on the way, report",
    "joining": "joining the samples",
}


def _print_least_time(seconds: Mapping[str, float], config: RunConfig) -> None:
    typer.echo("\nTime, at least (all arithmetic at the speed of a large matrix product here)")
    _print_time({name: value for name, value in seconds.items() if value > 0}, config)


def _print_measured(measured: Measured, found: Estimate, config: RunConfig) -> None:
    typer.echo(
        f"\nOne real update ({measured.samples} samples of {measured.steps} steps): measured "
        "beside estimated"
    )
    weights = sum(
        size
        for name, size in (*found.held.items(), *found.beside.items())
        if name.startswith(("frozen", "trained"))
    )
    _row("the model's weights", f"{_size(measured.level)}   estimated {_size(weights)}")
    ratio = found.step / measured.step if measured.step else float("nan")
    _row(
        "high-water above them",
        f"{_size(measured.step)}   estimated {_size(found.step)} ({ratio:.1%})",
    )
    _print_time(measured.iteration, config)


def _print_time(seconds: Mapping[str, float], config: RunConfig) -> None:
    """Of an iteration by phase, and of the run. A run may end inside an iteration."""
    for name, value in seconds.items():
        _row(f"{name}, an iteration", _duration(value))
    total = sum(seconds.values())
    updates = config.algorithm.options.minibatches / config.train.accumulation
    plural = "" if updates == 1 else "s"
    _row(f"an iteration, {updates:g} update{plural}", _duration(total))
    _row(f"the run, {config.train.steps} updates", _duration(total * config.train.steps / updates))
    typer.echo("  Not in it: loading, pictures on the way, the report, saving.")


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _row(name: str, value: str) -> None:
    typer.echo(f"  {name:<34}{value}")


def _size(size: int) -> str:
    if size >= 2**30:
        return f"{size / 2**30:.2f} GiB"
    return f"{size / 2**20:.1f} MiB" if size >= 2**20 else f"{size / 2**10:.1f} KiB"


def _duration(seconds: float) -> str:
    if seconds < 0.001:
        return "below 1 ms"
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
