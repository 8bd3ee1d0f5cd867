"""Averages of what the losses report, kept on the device and read once per update."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class Means:
    """Running means, or maxima where the name ends in ``_max``, of 0-d tensors by name."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """One more value of each; nothing is synchronised."""
        for name, value in metrics.items():
            before = self._sums.get(name)
            if before is None:
                self._sums[name] = value.detach()
            elif name.endswith("_max"):
                self._sums[name] = torch.maximum(before, value)
            else:
                self._sums[name] = before + value
            self._counts[name] = self._counts.get(name, 0) + 1

    def take(self) -> dict[str, float]:
        """The averages as numbers: the one synchronisation of an update."""
        if not self._sums:
            return {}
        values = torch.stack([value.double() for value in self._sums.values()]).tolist()
        return {
            name: value if name.endswith("_max") else value / self._counts[name]
            for name, value in zip(self._sums, values, strict=True)
        }
