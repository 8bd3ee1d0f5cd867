"""FSDP2: a network sharded in place by torch's `fully_shard`, and given back whole.

Each repeated block is a unit that is gathered for its forward and freed behind it; the rest of the
network is one more. accelerate would do this on GPUs only (on a CPU it ignores its FSDP plugin and
hands back DDP), so it is done here, alike everywhere.

*Source:* torch.distributed.fsdp.fully_shard. How we differ from its tutorials: frozen weights may
have another dtype than trained ones, the root is freed after its forward too (rollouts make many
forwards without a backward), and everything is undone at the end of a run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

_HOOKS = (
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
)


@dataclass(frozen=True)
class _Part:
    """One module as it was before it was sharded."""

    module: nn.Module
    kind: type[nn.Module]
    names: frozenset[str]
    hooks: dict[str, Any]
    parameters: dict[str, nn.Parameter]


class Sharded:
    """A module whose parameters are shards (DTensors) until `undo`.

    Args:
        module: equal on all ranks, on the run's device.
        device_type: `cpu` or `cuda`.
    """

    def __init__(self, module: nn.Module, device_type: str, size: int) -> None:
        self._parts = [_part(part) for part in module.modules()]
        mesh = init_device_mesh(device_type, (size,))
        for block in repeated_blocks(module):
            fully_shard(block, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
        for part in self._parts:
            for parameter in part.parameters.values():
                parameter.data = parameter.data.new_empty(0)  # the shards hold the numbers now

    @torch.no_grad()
    def undo(self) -> None:
        """The module as it was, with whole parameters: those it has now. All ranks at once."""
        for part in self._parts:
            for name, parameter in part.parameters.items():
                parameter.data = whole(part.module._parameters[name])
                parameter.grad = None
                part.module._parameters[name] = parameter
            part.module.__class__ = part.kind
            for name in set(vars(part.module)) - part.names:
                delattr(part.module, name)
            for name, hooks in part.hooks.items():
                found = getattr(part.module, name)
                found.clear()
                found.update(hooks)
            _forget(part.module)

    @contextmanager
    @torch.no_grad()
    def trained_whole(self, *, keep: bool) -> Iterator[None]:
        """Inside, trained parameters are whole and classes their own, so that a saver finds a plain
        module; it must not be called. All ranks gather, those with `keep` hold the result (on the
        CPU)."""
        shards: list[tuple[nn.Module, str, nn.Parameter]] = []
        kinds = [(part.module, type(part.module)) for part in self._parts]
        for part in self._parts:
            for name in part.parameters:
                shard = part.module._parameters[name]
                if shard is None or not shard.requires_grad:
                    continue
                gathered = whole(shard)
                shards.append((part.module, name, shard))
                if keep:
                    part.module._parameters[name] = nn.Parameter(gathered.cpu())
            part.module.__class__ = part.kind
        try:
            yield
        finally:
            for module, name, shard in shards:
                module._parameters[name] = shard
            for module, kind in kinds:
                module.__class__ = kind


def repeated_blocks(module: nn.Module) -> list[nn.Module]:
    """The elements of the lists that are the network's direct children: `down_blocks` and
    `up_blocks` of a UNet, `transformer_blocks` of a DiT."""
    lists = [child for child in module.children() if isinstance(child, nn.ModuleList)]
    return [block for blocks in lists for block in blocks if any(True for _ in block.parameters())]


def whole(value: Any) -> Any:
    """A shard's whole tensor, on all ranks (which must all ask); anything else as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def is_shard(value: Any) -> bool:
    """Whether a parameter is one."""
    return isinstance(value, DTensor)


@contextmanager
def unsynchronised(module: Any) -> Iterator[None]:
    """Gradients of losses inside are kept whole and not exchanged yet."""
    module.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        module.set_requires_gradient_sync(True)


@torch.no_grad()
def whole_state(state: Any) -> Any:
    """A state (dicts and lists of tensors and plain values) with every shard made whole."""
    if isinstance(state, dict):
        return {key: whole_state(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(whole_state(value) for value in state)
    return whole(state)


def like_parameters(state: Any, parameters: Sequence[Tensor]) -> Any:
    """An optimiser's whole state with its moments cut as `parameters` are."""
    if not any(map(is_shard, parameters)):
        return state
    cut = {
        number: {
            name: like(value, parameters[number])
            if isinstance(value, Tensor) and value.shape == parameters[number].shape
            else value
            for name, value in moments.items()
        }
        for number, moments in state["state"].items()
    }
    return {**state, "state": cut}


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor, equal on all ranks, cut as `target` is (or as it is)."""
    if not isinstance(target, DTensor) or isinstance(value, DTensor):
        return value
    place = target.device_mesh.device_type
    return distribute_tensor(value.to(place), target.device_mesh, target.placements)


def _part(module: nn.Module) -> _Part:
    hooks = {name: dict(getattr(module, name)) for name in _HOOKS}
    parameters = {name: value for name, value in module._parameters.items() if value is not None}
    return _Part(module, type(module), frozenset(vars(module)), hooks, parameters)


def _forget(module: nn.Module) -> None:
    """Let the module be sharded again in a later run: torch remembers whom it sharded."""
    from torch.distributed._composable_state import _module_state_mapping

    _module_state_mapping.pop(module, None)
