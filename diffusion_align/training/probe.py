"""What the loop shows of a model on the way: sample pictures and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Probe(Protocol):
    """Supplied by the caller; must use eval seeds and leave the policy as it was."""

    def samples(self, step: int, folder: Path) -> None:
        """Write pictures of the policy as it is now into `folder`, which exists and is empty."""
        ...

    def heldout(self, step: int) -> Mapping[str, float]:
        """Scores by name, for example ``{"taste": 0.41}``; empty where there are none."""
        ...
