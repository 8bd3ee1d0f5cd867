"""Trackers: where metrics go. JSONL always, TensorBoard and W&B on request (extras).

A row is one optimiser step: `step`, `iteration`, `seconds` and namespaced numbers such as
``reward/mean``. Numbers that are not finite are written as null.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from diffusion_align.errors import UserError, did_you_mean

Row = Mapping[str, float]


class Tracker(Protocol):
    """Takes rows as they come."""

    def log(self, row: Row) -> None: ...

    def close(self) -> None: ...


class JsonlTracker:
    """Appends one JSON object per row and flushes it, so that a crash loses nothing."""

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        clean = {name: _finite(value) for name, value in row.items()}
        self._stream.write(json.dumps(clean, allow_nan=False) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


class TensorBoardTracker:
    """Scalars for TensorBoard, in `folder`/tensorboard."""

    def __init__(self, folder: Path) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise _missing("tensorboard") from error
        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: Row) -> None:
        for name, value in _numbers(row).items():
            self._writer.add_scalar(name, value, int(row["step"]))

    def close(self) -> None:
        self._writer.close()


class WandbTracker:
    """A Weights & Biases run that a resumed training continues (its id lies in the folder)."""

    def __init__(self, folder: Path) -> None:
        try:
            import wandb
        except ImportError as error:
            raise _missing("wandb") from error
        remembered = folder / "wandb_run_id"
        known = remembered.read_text(encoding="utf-8").strip() if remembered.exists() else None
        self._run: Any = wandb.init(
            project="diffusion-align", name=folder.name, dir=str(folder), id=known, resume="allow"
        )
        remembered.write_text(self._run.id + "\n", encoding="utf-8")

    def log(self, row: Row) -> None:
        self._run.log(_numbers(row), step=int(row["step"]))

    def close(self) -> None:
        self._run.finish()


_TRACKERS: dict[str, Callable[[Path], Tracker]] = {
    "tensorboard": TensorBoardTracker,
    "wandb": WandbTracker,
}


def open_trackers(names: Sequence[str], folder: Path) -> list[Tracker]:
    """metrics.jsonl in `folder`, and the named trackers.

    Raises:
        UserError: an unknown name, or one whose package is not installed (with the pip command).
    """
    others: list[Tracker] = []
    for name in names:
        if name not in _TRACKERS:
            near = did_you_mean(name, _TRACKERS)
            fix = f"did you mean {near} ?" if near else f"known: {', '.join(sorted(_TRACKERS))}"
            raise UserError(f"unknown tracker {name!r}", where="train.trackers", fix=fix)
        others.append(_TRACKERS[name](folder))
    return [JsonlTracker(folder / "metrics.jsonl"), *others]


def _missing(extra: str) -> UserError:
    return UserError(
        f"the tracker {extra} is not installed",
        where="train.trackers",
        fix=f"pip install 'diffusion-align[{extra}]'",
    )


def _numbers(row: Row) -> dict[str, float]:
    return {name: value for name, value in row.items() if _finite(value) is not None}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
