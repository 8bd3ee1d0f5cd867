"""What a denoiser needs beside x_t and the timestep, for a batch of items.

The arguments were captured from the pipeline (`capture.py`), so nothing here knows their names or
meaning. Each tensor keeps the pipeline's own layout; `axes` says which of its dimensions counts
items. A guided item has two branches, (negative, positive); an unguided one has (positive,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ArgumentPath = tuple[str, ...]
"""Where an argument sits: ("encoder_hidden_states",) or ("added_cond_kwargs", "time_ids")."""


@dataclass(frozen=True)
class Branch:
    """The arguments of one guidance branch.

    Args:
        tensors: one entry per argument with a batch axis, B long along `axes[path]`.
        axes: the batch axis of each entry of `tensors`.
        constants: arguments that are the same whatever the batch (flags, None, shared tensors).
    """

    tensors: Mapping[ArgumentPath, Tensor]
    axes: Mapping[ArgumentPath, int]
    constants: Mapping[ArgumentPath, object]

    def take(self, indices: Tensor) -> Branch:
        """The items at `indices` (long [N], any order, repeats allowed)."""
        chosen = {
            path: value.index_select(self.axes[path], indices.to(value.device))
            for path, value in self.tensors.items()
        }
        return replace(self, tensors=chosen)

    def to(self, device: torch.device | str) -> Branch:
        """The same branch with its tensors on `device`."""
        return Branch(
            {path: value.to(device) for path, value in self.tensors.items()},
            self.axes,
            {
                path: mapped(value, lambda tensor: tensor.to(device))
                for path, value in self.constants.items()
            },
        )

    def arguments(self) -> dict[str, Any]:
        """The denoiser's keyword arguments, nested again as the pipeline nests them."""
        nested: dict[str, Any] = {}
        for path, value in (*self.constants.items(), *self.tensors.items()):
            target = nested
            for name in path[:-1]:
                target = target.setdefault(name, {})
            target[path[-1]] = value
        return nested


def join(branches: Sequence[Branch]) -> Branch:
    """Branches one after another along the batch axis, as one branch of sum(B) items.

    Raises:
        ValueError: they were captured with different arguments, shapes or constants.
    """
    first = branches[0]
    for other in branches[1:]:
        _check_alike(first, other)
    tensors = {
        path: torch.cat([branch.tensors[path] for branch in branches], dim=axis)
        for path, axis in first.axes.items()
    }
    return replace(first, tensors=tensors)


@dataclass(frozen=True)
class Conditioning:
    """The captured arguments of B items, and what they were captured for.

    Args:
        prompts, negative_prompts: B texts each; an empty negative is the pipeline's own default.
        height, width: size of the pictures in pixels.
        latent_shape: shape of one item's latent, without the batch axis.
        branches: (negative, positive) when guided, (positive,) otherwise.
    """

    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    height: int
    width: int
    latent_shape: tuple[int, ...]
    branches: tuple[Branch, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def guided(self) -> bool:
        """Whether both guidance branches were captured."""
        return len(self.branches) == 2

    @property
    def nbytes(self) -> int:
        """Memory held by the tensors, in bytes."""
        return sum(
            value.numel() * value.element_size()
            for branch in self.branches
            for value in branch.tensors.values()
        )

    def take(self, indices: Tensor | Sequence[int]) -> Conditioning:
        """The items at `indices` (long [N], any order, repeats allowed)."""
        index = torch.as_tensor(indices, dtype=torch.long)
        order = index.tolist()
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in order),
            negative_prompts=tuple(self.negative_prompts[i] for i in order),
            branches=tuple(branch.take(index) for branch in self.branches),
        )

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning with its tensors on `device`."""
        return replace(self, branches=tuple(branch.to(device) for branch in self.branches))

    @classmethod
    def collate(cls, parts: Sequence[Conditioning]) -> Conditioning:
        """The items of `parts`, in order.

        Raises:
            ValueError: no parts, or parts of different size, guidance or arguments.
        """
        if not parts:
            raise ValueError("nothing to collate")
        first = parts[0]
        for other in parts[1:]:
            mine = (first.height, first.width, first.latent_shape, first.guided)
            theirs = (other.height, other.width, other.latent_shape, other.guided)
            if mine != theirs:
                raise ValueError(
                    f"(height, width, latent shape, guided) differ: {mine} and {theirs}"
                )
        return replace(
            first,
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            negative_prompts=tuple(text for part in parts for text in part.negative_prompts),
            branches=tuple(join(column) for column in zip(*(part.branches for part in parts))),
        )


def _check_alike(first: Branch, other: Branch) -> None:
    if first.axes != other.axes or first.constants.keys() != other.constants.keys():
        raise ValueError("the parts were captured with different arguments")
    for path, value in first.constants.items():
        if not _same(value, other.constants[path]):
            raise ValueError(f"argument {'.'.join(path)} differs between the parts")


def mapped(value: object, change: Callable[[Tensor], Tensor]) -> object:
    """A constant with its tensors changed, where it is one or a tuple of some (rotary tables)."""
    if isinstance(value, tuple):
        return tuple(mapped(part, change) for part in value)
    return change(value) if isinstance(value, Tensor) else value


def _same(a: object, b: object) -> bool:
    if isinstance(a, tuple) and isinstance(b, tuple):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a is b or (a.shape == b.shape and bool(torch.equal(a, b.to(a.device))))
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return False
    return bool(a == b)
