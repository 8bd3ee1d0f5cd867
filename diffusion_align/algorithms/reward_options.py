"""Options of reward training: frozen standard-library dataclasses, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, require, words
from reward_models.base import RewardError
from reward_models.plan import RewardPlan

Loss = Literal["bradley-terry", "bradley-terry-ties", "soft-label", "regression"]


@dataclass(frozen=True)
class RewardStart(RewardPlan):
    """The reward that is trained: what it starts from, its head, and what of it trains.

    Errors: a value out of range raises `OptionError`.
    """

    device: str = field(
        default="auto", metadata={"doc": "auto (CUDA where there is one), cpu, cuda, cuda:1 ..."}
    )

    def __post_init__(self) -> None:
        words(self)
        try:
            super().__post_init__()
        except RewardError as error:
            raise OptionError(
                error.where, error.what, fix=error.fix, reads=_READ_TOGETHER.get(error.where, ())
            ) from None

    @property
    def plan(self) -> RewardPlan:
        """The same without what `reward_models` does not know."""
        return RewardPlan(**{k: v for k, v in vars(self).items() if k != "device"})


_READ_TOGETHER = {
    "attributes": ("head",),
    "hidden": ("layers",),
    "image_blocks": ("trains",),
    "text_blocks": ("trains", "head"),
    "trains": ("image_blocks", "text_blocks"),
}


@dataclass(frozen=True)
class RewardOptions:
    """What steers reward training. *Sources* of the losses: see `reward_losses`.

    Errors: a value out of range raises `OptionError`.
    """

    loss: Loss | None = field(
        default=None,
        metadata={
            "doc": "bradley-terry drops ties, bradley-terry-ties models them, soft-label takes "
            "shares of votes (a tie is one half), regression takes ratings; null = soft-label for "
            "pairs, regression for ratings"
        },
    )
    batch_size: int = field(default=32, metadata={"doc": "pairs or ratings in one minibatch"})
    batches_per_iteration: int = field(
        default=1,
        metadata={
            "doc": "minibatches loaded together; validation and checkpoints fall between iterations"
        },
    )
    tie_constant: float = field(
        default=5.0,
        metadata={
            "doc": "k of bradley-terry-ties, above 1: at equal scores (k - 1) / (k + 1) of all "
            "answers are ties"
        },
    )
    flip: bool = field(
        default=False,
        metadata={"doc": "mirror half of the rows (wrong where prompts say left or right)"},
    )
    validate_every: int = field(
        default=50,
        metadata={"doc": "iterations between validations; the best weights are kept"},
    )
    cache_gb: float = field(
        default=2.0,
        metadata={
            "doc": "memory for pictures and prompts as the trained part takes them (features of "
            "frozen towers, else pixels); what does not fit is made again for each batch"
        },
    )
    workers: int = field(default=4, metadata={"doc": "threads that read picture files"})

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "batch_size", "batches_per_iteration", "validate_every", "workers")
        at_least(self, 0, "cache_gb")
        require(self, "be above 1", lambda k: k > 1, "tie_constant")
        if self.tie_constant != 5.0 and self.loss != "bradley-terry-ties":
            raise OptionError(
                "tie_constant",
                "is read by bradley-terry-ties alone",
                fix="leave it out, or set loss: bradley-terry-ties",
                reads=("loss",),
            )

    @property
    def minibatches(self) -> int:
        """Minibatches of one iteration."""
        return self.batches_per_iteration

    @property
    def arithmetic(self) -> str:
        """How the number of minibatches comes about, for messages."""
        return f"{self.batches_per_iteration} batches an iteration = {self.minibatches} minibatches"
