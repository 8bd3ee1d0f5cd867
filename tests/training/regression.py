"""The smallest algorithm of the contract: regression on random points, with dropout and a state.

Each minibatch yields two losses; between them the generator looks at the gradient, as reward
backpropagation will. Loaded by path from the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffusion_align.algorithms.base import Listener, Needs, Samples, Silence


class Student:
    """A policy that is one linear layer."""

    def __init__(self, dropout: float = 0.5) -> None:
        self.denoiser: nn.Module = nn.Linear(6, 2)
        self.bare = self.denoiser
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.bare.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self.dropout = dropout
        self.device = torch.device("cpu")

    def trainable_parameters(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.bare.parameters() if parameter.requires_grad]

    def save(self, folder: Path) -> None:
        save_file(
            {k: v.contiguous() for k, v in self.bare.state_dict().items()}, folder / "w.safetensors"
        )


@dataclass(frozen=True)
class Points:
    x: Tensor
    metrics: Mapping[str, float]
    samples: Samples | None = None


def nothing(place: str) -> None:
    """The event handler that does nothing."""


@dataclass
class Regression:
    """`event` is called at "collect", "losses" and "between"; tests make it raise or kill."""

    policy: Student = field(default_factory=Student)
    event: Callable[[str], None] = nothing
    reward_std: float = 1.0
    needs: Needs = field(default_factory=Needs)
    listener: Listener = field(default_factory=Silence)
    collected: int = 0
    scales: list[float] = field(default_factory=list)

    def describe(self) -> list[str]:
        return ["regression"]

    def record(self) -> dict[str, Any]:
        return {"trained_on": ["nearness"], "prompts": []}

    def minibatch_count(self) -> int:
        return 4

    def minibatch_arithmetic(self) -> str:
        return "16 points / 4 = 4 minibatches"

    def collect(self, iteration: int) -> Points:
        self.listener.progress("sampling", 0, 1)
        self.event("collect")
        generator = np.random.Generator(np.random.Philox(key=iteration))
        x = torch.from_numpy(generator.standard_normal((16, 6), dtype=np.float32))
        self.collected += 1
        # Something that only the global generators know.
        noise = float(torch.rand(())) + float(np.random.rand())
        metrics = {"reward/mean": float(x.mean()), "reward/std": self.reward_std, "noise": noise}
        return Points(x, {**metrics, "collected": float(self.collected)})

    def minibatches(self, batch: Points) -> Iterator[Tensor]:
        yield from batch.x.split(4)

    def loss_count(self, minibatch: Tensor) -> int:
        return 2

    def losses(self, minibatch: Tensor, scale: float) -> Iterator[tuple[Tensor, dict[str, Tensor]]]:
        self.scales.append(scale)
        self.event("losses")
        target = minibatch[:, :2] - minibatch[:, 2:4]
        parameter = next(iter(self.policy.bare.parameters()))
        for half in (slice(0, 2), slice(2, 4)):
            before = None if parameter.grad is None else parameter.grad.clone()
            kept = nn.functional.dropout(minibatch[half], self.policy.dropout)
            error = (self.policy.denoiser(kept) - target[half]).square().mean()
            yield error * scale * 0.5, {"loss": error.detach(), "error_max": error.detach()}
            self.event("between")
            if parameter.requires_grad:
                # The loop back-propagated before it came back here.
                assert parameter.grad is not None
                assert before is None or not torch.equal(parameter.grad, before)

    def state_dict(self) -> dict[str, Any]:
        return {"collected": self.collected}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.collected = state["collected"]
