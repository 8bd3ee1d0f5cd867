"""The small-world twins `tiny-aesthetic`, `tiny-hps`, `tiny-mps`: trained rewards that are shipped.

Their files are those that reward training writes (`trained`), so they are the same classes as the
published scorers over the shared tower `tiny-clip`.
"""

from __future__ import annotations

from copy import copy
from typing import Any

from reward_models.base import Reward
from reward_models.table import LoadOptions, Row
from reward_models.trained import load_trained
from reward_models.weights import locate


def load_twin(row: Row, options: LoadOptions) -> Reward:
    """Build a twin; its files are read once per process."""
    if row.weights is None:
        raise ValueError(f"the row {row.info.name} names no weights")
    # The very object is shared by all who load this file: only the copy is called as the row says.
    reward: Any = copy(load_trained(locate(row.weights, options.weights), options))
    reward.info = row.info
    return reward  # type: ignore[no-any-return]
