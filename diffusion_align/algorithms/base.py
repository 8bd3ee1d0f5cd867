"""The algorithm contract: what the training loop knows of any method (DESIGN section 4).

The loop calls `collect`, cuts the batch with `minibatches`, and back-propagates every loss that
`losses` yields *before it asks for the next*. It knows nothing of rollouts, rewards or pairs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from diffusion_align.algorithms.catalogue import Needs

__all__ = ["Algorithm", "Batch", "Listener", "Minibatch", "Needs", "Samples", "Silence", "Trainee"]


class Trainee(Protocol):
    """What the loop needs of a policy; `diffusion_align.policy.Policy` has it and much more."""

    denoiser: nn.Module
    """The slot: the loop puts the prepared (distributed, compiled) module here."""

    @property
    def device(self) -> torch.device: ...

    def trainable_parameters(self) -> list[nn.Parameter]: ...

    def reference(self) -> AbstractContextManager[Any]: ...

    def save(self, folder: Path) -> Any: ...


@dataclass(frozen=True)
class Samples:
    """A few of a batch's results, to be looked at.

    pixels: float32 [B, 3, H, W] in [0, 1] on the CPU; rewards: float32 [B].
    """

    pixels: Tensor
    prompts: Sequence[str]
    rewards: Tensor


class Batch(Protocol):
    """What one `collect` made. `metrics` are plain numbers, namespaced as ``reward/mean``."""

    @property
    def metrics(self) -> Mapping[str, float]: ...

    @property
    def samples(self) -> Samples | None: ...


class Listener(Protocol):
    """Whom an algorithm tells what it is doing; the loop puts its reporter there."""

    def progress(self, phase: str, done: int, total: int) -> None:
        """``progress("sampling", 32, 64)``: a long phase, as it goes."""
        ...

    def message(self, text: str) -> None:
        """One line for the person who watches."""
        ...


class Silence:
    """The listener that ignores everything."""

    def progress(self, phase: str, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


Minibatch = TypeVar("Minibatch")
AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Algorithm(Protocol[AnyBatch, Minibatch]):
    """One method: its equation and nothing about files, accelerate or trackers.

    The loop sets `listener`. Everything random is a function of the algorithm's seed and the
    iteration, so an iteration can be repeated exactly from the state before it.
    """

    needs: Needs
    policy: Any
    listener: Listener

    def collect(self, iteration: int) -> AnyBatch:
        """Make what is learnt from, without gradients."""
        ...

    def minibatches(self, batch: AnyBatch) -> Iterable[Minibatch]:
        """Cut the batch; deterministic given the iteration. The loop accumulates over these."""
        ...

    def minibatch_count(self) -> int:
        """How many minibatches one batch is cut into, known before anything is collected."""
        ...

    def minibatch_arithmetic(self) -> str:
        """How that number comes about, for messages: ``24 pairs / 3 = 8 minibatches``."""
        ...

    def losses(
        self, minibatch: Minibatch, scale: float
    ) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        """Yield (loss, metrics). `scale` is applied here, exactly once per loss.

        Metrics are 0-d tensors without a graph. The loop averages them over an update, or takes
        the maximum where the name ends in ``_max``.
        """
        ...

    def loss_count(self, minibatch: Minibatch) -> int:
        """How many losses `losses` will yield, so that only the last one synchronises."""
        ...

    def describe(self) -> list[str]:
        """Lines printed before training: units, sizes, whatever a reader of the log must know."""
        ...

    def record(self) -> dict[str, Any]:
        """What a reader of the finished run must know, as JSON values.

        `trained_on`, the names of its rewards, and `prompts`, their texts, are what a comparison
        looks for; either may be empty.
        """
        ...

    def state_dict(self) -> dict[str, Any]:
        """What must survive a restart beyond the parameters, as a copy.

        Tensors, numbers, text, None, lists, tuples and dicts of these; nothing else is loaded.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...
