"""The contract of a tracker, and what it is told when a run begins or goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from diffusion_align.errors import UserError

PROJECT = "diffusion-align"
"""Under this name W&B and trackio keep the runs together."""

Row = Mapping[str, float]


@dataclass(frozen=True)
class Picture:
    """A picture file and what it shows, for example its prompt."""

    path: Path
    caption: str = ""

    @property
    def name(self) -> str:
        """`samples/p0003_s01`: the same picture of every step goes under one name."""
        return f"samples/{self.path.stem}"


@dataclass(frozen=True)
class Sitting:
    """One sitting of a run, as a tracker is told of it.

    Args:
        folder: of the run.
        step: optimiser steps done; whatever was logged past it will be logged again.
        run_id: what the tracker called the run in an earlier sitting; None in the first.
        config: the resolved config, without secrets.
        environment: versions and machine, without secrets.
    """

    folder: Path
    step: int = 0
    run_id: str | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)

    @property
    def described(self) -> dict[str, Any]:
        """Config and environment in one, for a tracker that takes one tree of values."""
        return {**self.config, "environment": dict(self.environment)}


class Tracker(Protocol):
    """Takes rows and pictures as they come."""

    @property
    def run_id(self) -> str | None:
        """By which a later sitting finds the same run; None where the run folder is enough."""
        ...

    def log(self, row: Row) -> None:
        """One row: `step` and namespaced numbers; those that are not finite are left out."""
        ...

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """The sample pictures of `step`, which lie on disk."""
        ...

    def close(self) -> None:
        """No more will come; what was logged is kept."""
        ...


def finite(row: Row) -> dict[str, float]:
    """The numbers of a row that are numbers."""
    return {name: value for name, value in row.items() if math.isfinite(value)}


def tracker_package(module: str, *, extra: str) -> Any:
    """The module of a tracker's package, imported.

    Raises:
        UserError: it is not there; `extra` installs it.
    """
    try:
        return import_module(module)
    except ImportError as error:
        raise UserError(
            f"the tracker {extra} is not installed",
            where="train.trackers",
            fix=f"pip install 'diffusion-align[{extra}]'",
        ) from error
