"""What the loop shows of a model on the way: sample pictures and held-out scores."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

if TYPE_CHECKING:
    from diffusion_align.evaluation.statistics import Floats


class Probe(Protocol):
    """Supplied by the caller; must use eval seeds and leave the policy as it was."""

    def samples(self, step: int, folder: Path) -> None:
        """Write pictures of the policy as it is now into `folder`, which exists and is empty."""
        ...

    def heldout(self, step: int) -> Mapping[str, float]:
        """Scores by name, for example ``{"taste": 0.41}``; empty where there are none."""
        ...


@runtime_checkable
class ScoredProbe(Probe, Protocol):
    """A probe that also knows the score of every picture: what the held-out guard compares."""

    def scores(self, step: int) -> Mapping[str, Floats]:
        """Float64 [P, S] by reward, NaN where there is none; the same pictures at every step."""
        ...


@runtime_checkable
class InformedProbe(Probe, Protocol):
    """A probe that knows what its rewards say of themselves."""

    def infos(self) -> Mapping[str, Any]:
        """The `RewardInfo` of each, by the names of `heldout`."""
        ...
