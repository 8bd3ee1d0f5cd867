"""What `train` returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffusion_align.training.run_folder import RunFolder


@dataclass(frozen=True)
class TrainResult:
    """What `train` leaves behind. metrics: the last row of metrics.jsonl."""

    folder: Path
    steps: int
    iterations: int
    metrics: Mapping[str, float]
    interrupted: bool

    def rows(self) -> list[dict[str, Any]]:
        """All rows of metrics.jsonl."""
        return RunFolder(self.folder).rows()
