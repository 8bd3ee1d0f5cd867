"""What a run's rewards hold in memory: counted where they are small and loaded, else worked out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from diffusion_align.assemble.named import scored_with

if TYPE_CHECKING:
    from torch import nn

    from diffusion_align.config import RunConfig
    from reward_models.base import Reward
    from reward_models.table import Row
    from reward_models.weights import WeightFile

FLOAT = 4
_LOADED_AT_ONCE = 100.0
"""Rewards of up to this many megabytes, already on this machine, are loaded to be part of it."""


def small_rewards(config: RunConfig) -> dict[str, Reward]:
    """Those rewards of the run that are small and already here, by name, on their device."""
    import reward_models
    from diffusion_align.policy.devices import device_of

    device = str(device_of(config.reward_device or config.model.device))
    found: dict[str, Reward] = {}
    for name in scored_with(config):
        rows = rows_of(name)
        known = [row for row in rows if row is not None]
        if len(known) == len(rows) and all(
            row.installed and row.megabytes <= _LOADED_AT_ONCE for row in known
        ):
            found[name] = reward_models.load(name, device=device)
    return found


def bytes_of_rewards(config: RunConfig, loaded: Mapping[str, Reward]) -> int:
    """Bytes of all of them in memory, where towers and heads are float32.

    Args:
        loaded: those that are at hand, whose tensors are counted (shared ones once).
    """
    from diffusion_align.training.memory import reachable_bytes

    towers: set[str] = set()
    files: dict[str, WeightFile] = {}
    for name in scored_with(config):
        for row in rows_of(name):
            if name in loaded or row is None:
                continue
            own = (*((row.weights,) if row.weights else ()), *row.extra)
            files |= {file.name: file for file in own}
            if row.tower:
                towers.add(row.tower)
    worked_out = sum(map(_tower, towers)) + sum(map(_in_memory, files.values()))
    return reachable_bytes(list(loaded.values())) + worked_out


def rows_of(name: str) -> list[Row | None]:
    """The catalogue's rows of a reward; None stands for a user's own or a trained one."""
    from reward_models.catalogue import RewardError, components, find

    rows: list[Row | None] = []
    for component in components(name):
        try:
            rows.append(find(component))
        except RewardError:
            rows.append(None)
    return rows


def _tower(name: str) -> int:
    """Of a tower, counted on an empty one: its file may be in half precision, or compressed."""
    from diffusion_align.training.memory import tensor_bytes

    return tensor_bytes(empty_tower(name))


def empty_tower(name: str) -> nn.Module:
    """A CLIP of the catalogue's towers on torch's `meta` device: shapes and no memory."""
    import torch

    from reward_models.backbones import open_clip_package, tower_config

    with torch.device("meta"):
        model: nn.Module = open_clip_package().CLIP(**tower_config(name))
    return model


def _in_memory(file: WeightFile) -> int:
    """Numbers in the file times four; of what is not here, or says nothing, its own size."""
    from safetensors import SafetensorError, safe_open

    from reward_models.weights import on_disk

    path = on_disk(file)
    if path is None:
        return int(file.megabytes * 1e6)
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, "np") as held:
                shapes = [held.get_slice(key).get_shape() for key in held.keys()]  # noqa: SIM118
            return FLOAT * sum(map(math.prod, shapes))
        except SafetensorError:
            pass  # loading it says what is wrong
    return path.stat().st_size
