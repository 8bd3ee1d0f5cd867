"""Two meters of tensor memory: one for a dry run, one for a real step. Neither looks at the RSS.

Both give the high-water of tensor bytes above the level at which they began. `LiveBytes` counts
the storages that operators return, so it also works where tensors have no memory behind them
(fake tensors): the same code, run dry, is its own estimate. `high_water` asks the allocator: on
CUDA its own peak, on a CPU the allocations and frees that the profiler records. It also sees what
operators need for themselves while they run, which `LiveBytes` cannot.
"""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, ModuleType
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Result = TypeVar("Result")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of every storage that is made inside this context and still alive.

    Views share a storage, which counts once; what existed before counts nothing. Autograd's saved
    tensors are storages like any other. Works on real, fake and meta tensors.

    Attributes:
        now: bytes alive.
        peaks: phase -> the most that was alive within it, in bytes; `phase` names the current one.
        kept: phase -> what was alive when it began for the first time.
    """

    def __init__(self, phase: str = "run") -> None:
        super().__init__()
        self.now = 0
        self.peaks: dict[str, int] = {}
        self.kept: dict[str, int] = {}
        self._known: set[int] = set()
        self.enter_phase(phase)

    @property
    def peak(self) -> int:
        """The most that was alive at any moment, in bytes."""
        return max(self.peaks.values())

    def enter_phase(self, name: str) -> None:
        """What follows belongs to the phase `name`, which may have been entered before."""
        self.phase = name
        self.kept.setdefault(name, self.now)
        self.peaks[name] = max(self.peaks.get(name, 0), self.now)

    @contextmanager
    def during(self, name: str) -> Iterator[None]:
        """The phase `name`, and afterwards the one before."""
        before = self.phase
        self.enter_phase(name)
        try:
            yield
        finally:
            self.enter_phase(before)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._see(value, counts=False)
        result = func(*args, **(kwargs or {}))
        # An operator that writes into its argument makes nothing new.
        counts = not func._schema.is_mutable
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._see(value, counts=counts)
        return result

    def _see(self, tensor: Tensor, *, counts: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        size = storage.nbytes() if counts else 0
        self.now += size
        self.peaks[self.phase] = max(self.peaks[self.phase], self.now)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def high_water(device: torch.device, work: Callable[[], Result]) -> tuple[Result, int]:
    """Do `work` and measure its high-water of tensor bytes above the level before it.

    On CUDA the caching allocator's figure, in whole blocks; on a CPU the cumulated sum of what the
    profiler records of the allocator, which slows the work down.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    gc.collect()  # else what was given up before counts as given back by the work
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    recorded: Any = profiler.profiler
    moves = sorted(
        (event.start_ns(), event.nbytes())
        for event in recorded.kineto_results.events()
        if event.name() == "[memory]"
    )
    level = highest = 0
    for _, size in moves:
        level += size
        highest = max(highest, level)
    return result, highest


def tensor_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, shared ones once."""
    held = {id(t): t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers())}
    return sum(held.values())


def reachable_bytes(things: object) -> int:
    """Bytes of every storage reachable through attributes and containers, shared ones once."""
    storages = [thing.untyped_storage() for thing in reachable(things) if isinstance(thing, Tensor)]
    return sum({storage._cdata: storage.nbytes() for storage in storages}.values())


def reachable(things: object) -> Iterator[object]:
    """Every object reachable through attributes and containers, itself included, each once."""
    seen: set[int] = set()
    waiting = [things]
    while waiting:
        thing = waiting.pop()
        if id(thing) in seen or isinstance(thing, type | ModuleType | FunctionType):
            continue
        seen.add(id(thing))
        yield thing
        if isinstance(thing, Tensor):
            continue
        if isinstance(thing, Mapping):
            waiting += thing.values()
        elif isinstance(thing, list | tuple | set | frozenset):
            waiting += thing
        else:
            waiting.append(getattr(thing, "__dict__", {}))


def free_bytes(device: torch.device) -> int:
    """What is free on a device now: on CUDA what the driver says, on a CPU available memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return int(psutil.virtual_memory().available)
