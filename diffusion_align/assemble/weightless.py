"""Tensors that have shapes and no memory: weights made of them, and numbers asked of them."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

NEXT_TO_NOTHING = 1e-30
"""What a number is said to be that is asked of a tensor without memory: not zero, and below every
bar."""


def make_fake(modules: Sequence[nn.Module], device: torch.device) -> None:
    """Replace every weight of these by a fake one on `device`, in place."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    made: dict[int, Tensor] = {}  # tied weights stay tied
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in (inner for outer in modules for inner in outer.modules()):
            for store in (module._parameters, module._buffers):
                for name, value in store.items():
                    if value is None:
                        continue
                    if id(value) not in made:
                        fake = torch.empty(value.shape, dtype=value.dtype, device=device)
                        trains = value.requires_grad
                        made[id(value)] = (
                            nn.Parameter(fake, trains) if isinstance(value, nn.Parameter) else fake
                        )
                    store[name] = made[id(value)]  # type: ignore[assignment]


def answering() -> AbstractContextManager[Any]:
    """Inside, a number that is asked of a fake tensor is `NEXT_TO_NOTHING`."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensor
    from torch.utils._python_dispatch import TorchDispatchMode

    class Answering(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            asks = func is torch.ops.aten._local_scalar_dense.default
            if asks and isinstance(args[0], FakeTensor):
                return NEXT_TO_NOTHING
            return func(*args, **(kwargs or {}))

    return Answering()
