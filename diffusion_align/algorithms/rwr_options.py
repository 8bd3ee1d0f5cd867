"""Options of reward-weighted regression: a frozen standard-library dataclass, no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from diffusion_align.algorithms.options import CollectionOptions
from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, positive, require

TEMPERATURE = 1.0
QUANTILE = 0.75
_NORMALISING = ("advantages", "buffer_size", "buffer_min_count", "advantage_clip")


@dataclass(frozen=True)
class RWROptions(CollectionOptions):
    """What steers RWR. *Source:* Black et al. 2023 (arXiv 2305.13301), section 4.1.

    Errors: a value out of range, or batches that do not divide, raise `OptionError`.
    """

    weighting: Literal["exponential", "sparse"] = field(
        default="exponential",
        metadata={
            "doc": "a sample's weight: exp(normalised reward / temperature), or (sparse) 1 where "
            "it is among the best and 0 elsewhere; either way 1 on average"
        },
    )
    temperature: float | None = field(
        default=None,
        metadata={
            "doc": "exponential: low trusts the best few samples (at 1 about a third of them count,"
            f" at 0.5 a fiftieth), high weighs all alike; null = {TEMPERATURE:g}"
        },
    )
    quantile: float | None = field(
        default=None,
        metadata={
            "doc": "sparse: samples above this share of the iteration are learnt from; "
            f"null = {QUANTILE:g}"
        },
    )
    threshold: float | None = field(
        default=None,
        metadata={
            "doc": "sparse: raw rewards of at least this are learnt from, not a quantile. An "
            "iteration in which none is that high teaches nothing (guards.equal_rewards)"
        },
    )
    timesteps_per_sample: int = field(
        default=4,
        metadata={"doc": "noised copies of each sample per inner epoch, each at another timestep"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        positive(self, "temperature")
        require(self, "lie in [0, 1)", lambda share: 0 <= share < 1, "quantile")
        require(self, "be a number", lambda _: True, "threshold")
        at_least(self, 1, "timesteps_per_sample")
        if self.weighting == "exponential":
            for name in ("quantile", "threshold"):
                self._unread(name, "weighting", ", or set algorithm.weighting=sparse")
            return
        self._unread("temperature", "weighting", ", or set algorithm.weighting=exponential")
        if self.threshold is not None:
            self._unread("quantile", "threshold", ", or the threshold")
            for name in _NORMALISING:
                self._unread(name, "threshold", why=", which is a raw reward")

    @property
    def used_temperature(self) -> float:
        """What was asked for, or the default."""
        return TEMPERATURE if self.temperature is None else self.temperature

    @property
    def used_quantile(self) -> float:
        """What was asked for, or the default."""
        return QUANTILE if self.quantile is None else self.quantile

    def _unread(self, name: str, because: str, instead: str = "", why: str = "") -> None:
        """Refuse `name` where it was given although `because` leaves it without effect."""
        default = next(option.default for option in fields(self) if option.name == name)
        if getattr(self, name) == default:
            return
        shown = "null" if default is None else default
        raise OptionError(
            name,
            f"is not read with {because}: {getattr(self, because)}{why}",
            fix=f"leave it out (algorithm.{name}={shown}){instead}",
            reads=(because,),
        )

    def trained_steps(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """The noised copies of each sample, each at another of so many timesteps."""
        return min(self.timesteps_per_sample, sampling_steps)
