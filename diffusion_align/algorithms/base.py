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

__all__ = [
    "Algorithm",
    "Alone",
    "Batch",
    "Group",
    "Listener",
    "Minibatch",
    "Needs",
    "Samples",
    "Silence",
    "Trainee",
]


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


class Group(Protocol):
    """The processes that work on one run together; the loop puts its own there.

    Every rank works on its share of an iteration and gathers what must be known of all of it.
    Gradients are averaged over the ranks by whoever wraps the network, so a loss that is a sum of
    shares carries `size`, once.
    """

    @property
    def rank(self) -> int:
        """The number of this process, from 0."""
        ...

    @property
    def size(self) -> int:
        """How many processes there are."""
        ...

    @property
    def lockstep(self) -> bool:
        """Whether a forward is made by all ranks at once (sharded parameters), so that a rank with
        less to do makes forwards whose results nobody needs."""
        ...

    def gather(self, values: Tensor) -> Tensor:
        """[n, ...] of every rank, one after another in rank order; n may differ. No gradient.

        All ranks must call it in the same order. Where another rank has failed it raises.
        """
        ...


@dataclass(frozen=True)
class Alone:
    """The group of one process: what it has is all there is."""

    rank: int = 0
    size: int = 1
    lockstep: bool = False

    def gather(self, values: Tensor) -> Tensor:
        return values


Minibatch = TypeVar("Minibatch")
AnyBatch = TypeVar("AnyBatch", bound=Batch)


class Algorithm(Protocol[AnyBatch, Minibatch]):
    """One method: its equation and nothing about files, accelerate or trackers.

    The loop sets `listener` and `group`. Everything random is a function of the algorithm's seed
    and the iteration, so an iteration can be repeated exactly from the state before it.
    """

    needs: Needs
    policy: Any
    listener: Listener
    group: Group

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
        the maximum where the name ends in ``_max``. In a group it averages over the ranks as well:
        each yields as many losses, and its metrics of a minibatch times its share of the rows
        times the group's size (`batches.weighted`).
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
