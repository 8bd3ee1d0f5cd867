"""Texts that are encoded once: the negative prompt is the same beside every prompt.

A pipeline encodes prompt and negative prompt together, one text encoder forward each, and it is
captured prompt by prompt; so the same negative would be encoded anew beside every one of them.
Inside `TextMemory.remembering` a text encoder that is called again with the same token ids gives
back what it gave before, which are the same bits.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

KEPT = 4
"""Texts remembered per text encoder, the least recently used go first: a negative and its like."""


class TextMemory:
    """What a pipeline's text encoders (`text_encoder`, `text_encoder_2`, ...) said last."""

    def __init__(self, pipeline: Any) -> None:
        self._pipeline = pipeline
        self._said: dict[str, OrderedDict[Hashable, Any]] = {}

    @contextmanager
    def remembering(self) -> Iterator[None]:
        """Inside, a text encoder runs only for what it does not remember."""
        with ExitStack() as stack:
            for name, part in self._pipeline.components.items():
                if name.startswith("text_encoder") and isinstance(part, nn.Module):
                    said = self._said.setdefault(name, OrderedDict())
                    stack.enter_context(_replaced(part, _remembering(part.forward, part, said)))
            yield


@contextmanager
def _replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    # Offloading puts a forward of its own on the instance; it must be there again afterwards.
    own = vars(module).get("forward")
    module.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own  # type: ignore[method-assign]


def _remembering(
    forward: Callable[..., Any], module: nn.Module, said: OrderedDict[Hashable, Any]
) -> Callable[..., Any]:
    def remembered(*given: Any, **named: Any) -> Any:
        parts = [*given, *(part for name in sorted(named) for part in (name, named[name]))]
        if torch.is_grad_enabled() or not all(map(_has_key, parts)):
            return forward(*given, **named)
        first = next(module.parameters(), None)
        weights = None if first is None else (first.dtype, first.device)
        key = (weights, *map(_key, parts))
        if key not in said:
            said[key] = forward(*given, **named)
        said.move_to_end(key)
        while len(said) > KEPT:
            said.popitem(last=False)
        return said[key]

    return remembered


def _has_key(part: object) -> bool:
    # Ids and masks are whole numbers; embeddings that are passed in are not worth comparing.
    if isinstance(part, Tensor):
        return not part.is_floating_point()
    return part is None or isinstance(part, bool | int | float | str)


def _key(part: Any) -> Hashable:
    if isinstance(part, Tensor):
        return (part.device, part.dtype, tuple(part.shape), part.cpu().numpy().tobytes())
    return (type(part), part)
