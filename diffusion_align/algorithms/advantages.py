"""Advantages: rewards normalised over a prompt's history, a group of samples, or everything.

All take rewards as [B] numbers of any type (integers never truncate: the arithmetic is float64 and
the result float32) and return [B] with NaN exactly where a reward was not finite. Such items take
no part in any mean or standard deviation. The standard deviation is the population's, as in every
published implementation; where it is zero the advantage is zero.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusion_align.secrecy.redaction import redact

EPSILON = 1e-6
"""Added to every standard deviation. *Source:* ddpo-pytorch's ``stat_tracking.py``."""

Floats = NDArray[np.float64]


class PromptStatistics:
    """Running statistics of each prompt's rewards over its last `buffer_size` samples.

    A prompt with fewer than `min_count` remembered rewards (this batch's included) is normalised
    with the statistics of the whole batch. *Source:* DDPO's per-prompt tracker (arXiv 2305.13301,
    section 5; ddpo-pytorch), which works on whatever number type the rewards have; ours does not.

    >>> statistics = PromptStatistics(buffer_size=4, min_count=2)
    >>> statistics.update(["a", "a"], torch.tensor([0, 1])).round(decimals=3)
    tensor([-1.,  1.])
    """

    def __init__(self, buffer_size: int = 32, min_count: int = 16) -> None:
        if not 1 <= min_count <= buffer_size:
            raise ValueError(
                f"min_count must lie between 1 and buffer_size {buffer_size}, got {min_count}"
            )
        self.buffer_size = buffer_size
        self.min_count = min_count
        self._rewards: dict[str, deque[float]] = {}

    def update(self, prompts: Sequence[str], rewards: Tensor) -> Tensor:
        """Remember these rewards and return their advantages, float32 [B], NaN for NaN."""
        values, valid = _numbers(rewards, len(prompts))
        rows: dict[str, list[int]] = {}
        for row, prompt in enumerate(prompts):
            if valid[row]:
                rows.setdefault(prompt, []).append(row)
        result = np.full(len(values), np.nan)
        for prompt, members in rows.items():
            # A checkpoint holds these names.
            buffer = self._rewards.setdefault(redact(prompt), deque(maxlen=self.buffer_size))
            buffer.extend(float(values[row]) for row in members)
            enough = len(buffer) >= self.min_count
            basis = np.asarray(buffer, dtype=np.float64) if enough else values[valid]
            result[members] = _normalise(values[members], basis)
        return _as_tensor(result)

    def state_dict(self) -> dict[str, list[float]]:
        """The remembered rewards, oldest first, by prompt."""
        return {prompt: list(buffer) for prompt, buffer in self._rewards.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Replace what is remembered by what `state_dict` returned."""
        self._rewards = {
            prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()
        }


def group_advantages(rewards: Tensor, groups: Sequence[Hashable]) -> Tensor:
    """(r - mean) / std within each group: GRPO's advantage. `groups` names each item's group."""
    values, valid = _numbers(rewards, len(groups))
    rows: dict[Hashable, list[int]] = {}
    for row, group in enumerate(groups):
        if valid[row]:
            rows.setdefault(group, []).append(row)
    result = np.full(len(values), np.nan)
    for members in rows.values():
        result[members] = _normalise(values[members], values[members])
    return _as_tensor(result)


def global_advantages(rewards: Tensor) -> Tensor:
    """(r - mean) / std over all items."""
    values, valid = _numbers(rewards, rewards.shape[0])
    result = np.full(len(values), np.nan)
    result[valid] = _normalise(values[valid], values[valid])
    return _as_tensor(result)


def without_small(advantages: Tensor, floor: float) -> Tensor:
    """NaN, "not trained on", in place of advantages whose size lies below `floor`.

    They are as they were where that would leave none at all: an iteration must have an update.
    """
    kept = torch.where(advantages.abs() >= floor, advantages, torch.nan)
    return advantages if bool(kept.isnan().all()) else kept


class Normaliser:
    """Rewards to advantages as DDPO's options say, limited to plus and minus `limit`."""

    def __init__(
        self, kind: Literal["prompt", "group", "global"], limit: float, statistics: PromptStatistics
    ) -> None:
        self._kind, self._limit = kind, limit
        self.statistics = statistics

    def __call__(
        self, rewards: Tensor, prompts: Sequence[str], groups: Sequence[Hashable]
    ) -> Tensor:
        """Float32 [B], NaN for NaN. Updates the statistics where they are used (`prompt`)."""
        if self._kind == "prompt":
            raw = self.statistics.update(prompts, rewards)
        elif self._kind == "group":
            raw = group_advantages(rewards, groups)
        else:
            raw = global_advantages(rewards)
        return raw.clamp(-self._limit, self._limit)

    def metrics(self, advantages: Tensor) -> dict[str, float]:
        """Their spread, and the share that the limit reached; failed ones take no part."""
        known = advantages[~advantages.isnan()]
        return {
            "advantage/std": float(known.std(correction=0)),
            "advantage/clipped": float((known.abs() >= self._limit).float().mean()),
        }


def _numbers(rewards: Tensor, count: int) -> tuple[Floats, NDArray[np.bool_]]:
    if rewards.shape != (count,):
        raise ValueError(f"expected {count} rewards [B], got shape {tuple(rewards.shape)}")
    values = rewards.detach().cpu().to(torch.float64).numpy()
    return values, np.isfinite(values)


def _normalise(values: Floats, basis: Floats) -> Floats:
    if basis.size == 0 or np.ptp(basis) == 0:  # equal values: their mean may round off them
        return np.zeros_like(values)
    return (values - basis.mean()) / (basis.std() + EPSILON)


def _as_tensor(values: Floats) -> Tensor:
    return torch.from_numpy(values.astype(np.float32))
