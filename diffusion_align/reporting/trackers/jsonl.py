"""metrics.jsonl: one JSON object per row, always written."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from diffusion_align.reporting.trackers.base import Picture, Row
from diffusion_align.secrecy.redaction import redact_value


class JsonlTracker:
    """Appends one JSON object per row and flushes it, so that a crash loses nothing.

    Numbers that are not finite are written as null.
    """

    run_id = None

    def __init__(self, path: Path) -> None:
        self._stream = path.open("a", encoding="utf-8")

    def log(self, row: Row) -> None:
        """Append the row."""
        clean = redact_value({name: _finite(value) for name, value in row.items()})
        self._stream.write(json.dumps(clean, allow_nan=False) + "\n")
        self._stream.flush()

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Nothing: they lie in samples/ of the same folder."""

    def close(self) -> None:
        """Close the file."""
        self._stream.close()


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
