"""What a run left behind, to be held bit for bit against what another one left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from diffusion_align.training.checkpoint import load_checkpoint

# Columns of metrics.jsonl that tell of the machine, not of the run.
OF_THE_MACHINE = ("seconds", "time/", "memory/")
_READERS = {".safetensors": load_file, ".pt": torch.load}


def leftovers(folder: Path) -> dict[str, Any]:
    """Flat names -> bytes, numbers or tensors: metrics, samples, final/, the last checkpoint."""
    left: dict[str, Any] = {}
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines):
        row = json.loads(line)
        left |= {f"metrics/{number}/{k}": v for k, v in row.items() if not _of_the_machine(k)}
    for path in sorted((folder / "samples").rglob("*")):
        if path.is_file():
            left[f"samples/{path.relative_to(folder)}"] = path.read_bytes()
    for path in sorted([*(folder / "final").rglob("*"), *(folder / "best").rglob("*")]):
        if path.suffix in _READERS:
            name = path.relative_to(folder)
            left |= {f"{name}/{k}": v for k, v in _READERS[path.suffix](path).items()}
    last = load_checkpoint(max((folder / "checkpoints").glob("step_*")))
    left |= {"step": last.step, "iteration": last.iteration}
    left |= {f"parameters/{name}": value for name, value in last.parameters.items()}
    return left | _flat(last.state, "state")


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """Names whose values are not the same bits, or that only one of them has."""
    return [
        name
        for name in dict.fromkeys([*first, *second])
        if name not in first or name not in second or not _same(first[name], second[name])
    ]


def sound_checkpoints(folder: Path) -> dict[str, int]:
    """Name -> step of every checkpoint that is visible; raises where one is not sound."""
    found = sorted((folder / "checkpoints").glob("step_*"))
    return {path.name: load_checkpoint(path).step for path in found}


def _of_the_machine(name: str) -> bool:
    return any(
        name == word or (word[-1] == "/" and name.startswith(word)) for word in OF_THE_MACHINE
    )


def _same(first: Any, second: Any) -> bool:
    if isinstance(first, Tensor):
        return (
            isinstance(second, Tensor)
            and first.dtype == second.dtype
            and first.shape == second.shape
            # Bits, so that NaN equals itself and 0.0 is not -0.0.
            and first.contiguous()
            .reshape(-1)
            .view(torch.uint8)
            .equal(second.contiguous().reshape(-1).view(torch.uint8))
        )
    return type(first) is type(second) and repr(first) == repr(second)


def _flat(value: Any, name: str) -> dict[str, Any]:
    if isinstance(value, Mapping):
        items = [(str(key), inner) for key, inner in value.items()]
    elif isinstance(value, list | tuple):
        items = [(str(number), inner) for number, inner in enumerate(value)]
    else:
        return {name: value}
    flat: dict[str, Any] = {name: type(value).__name__ + str(len(items))}
    for key, inner in items:
        flat |= _flat(inner, f"{name}/{key}")
    return flat
