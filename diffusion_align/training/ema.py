"""A running average of the trained weights (EMA).

    a_0 = p_0,   a_k = d a_{k-1} + (1 - d) p_k,   so   a_n = d^n p_0 + (1 - d) sum_k d^(n-k) p_k

where p_k are the weights at the k-th update of the average (every `ema_every` steps). The average
is kept in float32 whatever the weights are, because (1 - d)(p - a) vanishes in narrower types. It
is never trained on: pictures and scores on the way, and `final/`, are made with it, while the
optimiser and the rollouts go on with the raw weights.

*Source:* Polyak and Juditsky 1992; in this field Flow-GRPO averages with d = 0.9 every 8 steps.
How we differ: no warm-up of d, so that the formula above holds from the first step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Average:
    """The average of these parameters; it begins as a copy of them.

    Args:
        parameters: the trained ones, as the optimiser holds them.
        decay: d, in (0, 1).
        every: steps between updates.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], decay: float, every: int) -> None:
        self._parameters, self._decay, self._every = list(parameters), decay, every
        self.values: list[Tensor] = [
            p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for p in self._parameters
        ]

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Optimiser step number `step`, from 1, is done."""
        if step % self._every:
            return
        for average, parameter in zip(self.values, self._parameters, strict=True):
            average.lerp_(parameter.to(average.dtype), 1 - self._decay)

    @torch.no_grad()
    def load(self, values: Sequence[Tensor] | None) -> None:
        """Go on from these values; None begins again at the present weights."""
        for average, value in zip(self.values, values or self._parameters, strict=True):
            average.copy_(value)

    @torch.no_grad()
    def adopt(self) -> None:
        """The averages become the weights."""
        for average, parameter in zip(self.values, self._parameters, strict=True):
            parameter.copy_(average)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside, the weights are the averages; afterwards they are the same bits as before."""
        raw = [parameter.detach().clone() for parameter in self._parameters]
        try:
            self.adopt()
            yield
        finally:
            with torch.no_grad():
                for parameter, value in zip(self._parameters, raw, strict=True):
                    parameter.copy_(value)
