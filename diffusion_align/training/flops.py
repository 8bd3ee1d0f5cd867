"""How much arithmetic runs: the matrix products, convolutions and attention of a piece of code.

Counts from shapes alone, by torch's own formulas, so it works on tensors without memory. What a
device makes of it is measured with one large matrix product: no network gets more out of it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

_SIDE = 1024
_REPEATS = 5


class Flops(TorchDispatchMode):
    """Counts the floating point operations inside this context: `by_phase[phase]`.

    A multiplication and an addition are two. Element-wise operators count nothing.
    """

    def __init__(self) -> None:
        super().__init__()
        self.phase = "run"
        self.by_phase: dict[str, float] = {}
        self._factor = 1.0

    @contextmanager
    def times(self, factor: float) -> Iterator[None]:
        """Inside, everything counts so many times: a part stands for the whole."""
        before, self._factor = self._factor, self._factor * factor
        yield
        self._factor = before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            count = self._factor * formula(*args, **(kwargs or {}), out_val=result)
            self.by_phase[self.phase] = self.by_phase.get(self.phase, 0.0) + count
        return result


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a 1024 x 1024 matrix product, the best of a few."""
    a = torch.ones(_SIDE, _SIDE, device=device, dtype=dtype)
    best = 0.0
    for _ in range(_REPEATS):
        began = time.perf_counter()
        a @ a
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, 2 * _SIDE**3 / (time.perf_counter() - began))
    return best
