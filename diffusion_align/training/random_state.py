"""The global random generators, borrowed for a run and given back as they were.

Everything of ours draws from item streams. Dropout and other people's rewards use the global
generators; a run seeds them inside its own scope so that it can be repeated, and checkpoints them
so that it can be resumed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


@contextmanager
def borrowed(seed: int) -> Iterator[None]:
    """Seed all global generators inside this context; outside nothing has changed."""
    before = capture()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed % 2**63)  # torch takes no larger one
        yield
    finally:
        restore(before)


def capture() -> dict[str, Any]:
    """The generators' states as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)  # type: ignore[misc]
    words = np.asarray(keys).astype(np.int64)
    return {
        "python": random.getstate(),
        "numpy": [str(name), torch.from_numpy(words), int(position), int(has_gauss), float(cached)],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def restore(state: Mapping[str, Any]) -> list[str]:
    """Put back what `capture` returned; what could not be, in words."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if len(state["cuda"]) != here:
        return [f"random state of {len(state['cuda'])} CUDA devices was kept, here are {here}"]
    if here:
        torch.cuda.set_rng_state_all(state["cuda"])
    return []
