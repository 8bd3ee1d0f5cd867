"""Several processes as one run: what they tell each other, and how they end together.

The network's gradients and parameters are exchanged by DDP or FSDP2. Everything else (rewards,
plain values) goes through a group of its own over gloo on the CPU, so that a rank that fails can
never be taken for one that brings gradients. A rank that fails leaves its message in the store that
the processes met in; whoever waits for it looks there, and ends with the same message.
"""

from __future__ import annotations

import atexit
import os
import pickle
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.training.launchers import check_launcher

if TYPE_CHECKING:
    from diffusion_align.algorithms.base import Listener

PATIENCE = timedelta(hours=2)
"""How long a collective may wait before it fails: as long as a rank may be busy by itself (drawing
sample pictures, saving). A rank that fails is noticed at once, not by this."""

LINGER = 5.0
"""Seconds that a failing rank waits for the others to hear of it before it goes."""

HEARING = 600.0
"""The same, for the main process, where that one has work to save once it has heard."""

SAVING = 600.0
"""Seconds that it waits for a main process that heard of it to save what was learnt."""

_LOOK_EVERY = 0.2
_FAILED, _HEARD, _DONE, _GONE = "failed", "heard", "done", "gone"
_UNSAVED = "unsaved"

T = TypeVar("T")


def process_count() -> int:
    """How many processes were started for this run (torchrun, accelerate launch)."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_process() -> bool:
    """Whether this is the process that writes; known before the processes have met."""
    return int(os.environ.get("RANK", "0")) == 0


class Processes:
    """The processes of one run; made by `meet`. It is the `Group` that algorithms see.

    Attributes:
        rank, size: this one's number, and how many there are.
        lockstep: forwards are made by all ranks at once (FSDP2).
    """

    def __init__(self, rank: int = 0, size: int = 1, *, lockstep: bool = False) -> None:
        self.rank, self.size, self.lockstep = rank, size, lockstep and size > 1
        self._run, self._deserted, self._looked = 0, False, 0.0
        if size == 1:
            return
        self._control: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
        # The public API has no name for the store in which the processes met.
        self._store = dist.distributed_c10d._get_default_store()
        self._run = _next_run()

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and talks."""
        return self.rank == 0

    def gather(self, values: Tensor) -> Tensor:
        """See `Group.gather`. Values of any device travel through the CPU and come back to it.

        Raises:
            UserError: another rank has failed; its message.
        """
        if self.size == 1:
            return values
        own = values.detach().cpu().contiguous()
        counts = self._all(torch.tensor([len(own)]))
        most = int(max(counts))
        if most == 0:
            return values
        padded = torch.zeros((most, *own.shape[1:]), dtype=own.dtype)
        padded[: len(own)] = own
        parts = self._all(padded)
        kept = [part[: int(count)] for part, count in zip(parts, counts, strict=True)]
        return torch.cat(kept).to(values.device)

    def exchange(self, value: T) -> list[T]:
        """A plain value of every rank, in rank order; ranks of one run trust their pickles."""
        if self.size == 1:
            return [value]
        packed = torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8)
        sizes = [int(size) for size in self.gather(torch.tensor([len(packed)]))]
        joined = self.gather(packed).split(sizes)
        return [cast(T, pickle.loads(bytes(part.tolist()))) for part in joined]

    def any(self, claim: bool) -> bool:
        """Whether it holds on any rank."""
        return bool(self.gather(torch.tensor([claim])).any())

    def wait(self) -> None:
        """Until all ranks are here."""
        self.gather(torch.zeros(1))

    def check(self) -> None:
        """A look whether another rank has failed, for whoever is busy by itself; cheap, often.

        Raises:
            UserError: its message.
        """
        now = time.monotonic()
        if self.size > 1 and now - self._looked > _LOOK_EVERY:
            self._looked = now
            self._look()

    def on_main(self, work: Callable[[], T]) -> T:
        """Let the main process do it; its (plain) result, on all ranks.

        Raises:
            Exception: on the main process whatever `work` raised; elsewhere UserError with its
                message.
        """
        result = work() if self.is_main else None
        return cast(T, self.exchange(result)[0])

    def mean(self, metrics: dict[str, float]) -> dict[str, float]:
        """Metrics of all ranks: their mean, or their maximum where the name ends in ``_max``."""
        if self.size == 1:
            return metrics
        every = self.exchange(metrics)
        result = {}
        for name in dict.fromkeys(name for one in every for name in one):
            values = [one[name] for one in every if name in one]
            result[name] = max(values) if name.endswith("_max") else sum(values) / self.size
        return result

    @contextmanager
    def as_one(self) -> Iterator[None]:
        """A run in which all end where one does: an error inside is told to the others.

        Raises:
            UserError: another rank's message, where its end is the reason.
        """
        try:
            yield
        except Exception as error:
            self.fail(error)
            self.leave()
            reason = self.explain(error)
            if reason is error:
                raise
            raise reason from error
        except BaseException as error:
            self.fail(error)
            raise

    def fail(self, error: BaseException, *, unsaved: bool = False) -> None:
        """Tell the others that this rank ends, and why unless another was first.

        unsaved: the main process can save what was learnt, as soon as it hears of it.
        """
        if self.size == 1:
            return
        note_failure()
        if unsaved:
            self._tell(_UNSAVED, "1")
        if self.failure() is None:
            self._tell(_FAILED, f"{self.rank} {_plainly(error)}")
        self._tell(f"{_HEARD}/{self.rank}", "1")

    def failure(self) -> tuple[int, str] | None:
        """The rank that failed first and its message."""
        try:
            if self.size == 1 or not self._knows(_FAILED):
                return None
            number, _, message = self._store.get(self._key(_FAILED)).decode().partition(" ")
        except (RuntimeError, dist.DistError):  # whoever kept the store is gone
            return None
        return int(number), message

    def explain(self, error: Exception) -> Exception:
        """What to raise instead of an error that another rank's end may have caused."""
        failed = self.failure()
        if failed is None or failed[0] == self.rank or isinstance(error, UserError):
            return error
        return _other_failed(*failed)

    def leave(self) -> None:
        """Before a failing rank ends: wait until the others have heard, the main one has saved.

        A launcher ends all processes as soon as one has ended. Bounded: a rank that is stuck in
        gradients it will never get does not hear, and is ended by the launcher. In a collection
        there are none to wait for, but the main one may be busy for minutes before it looks.
        """
        if self.size == 1:
            return
        self._tell(f"{_DONE}/{self.rank}", "1")
        if self._knows(_UNSAVED):
            self._await([f"{_HEARD}/0"], HEARING)
        self._await([f"{_HEARD}/{rank}" for rank in range(self.size)], LINGER)
        if self._knows(f"{_HEARD}/0"):
            self._await([f"{_DONE}/0"], SAVING)
        self._tell(f"{_GONE}/{self.rank}", "1")
        if self.is_main:  # it may keep the store in which the others look
            self._await([f"{_GONE}/{rank}" for rank in range(self.size)], LINGER)

    def _all(self, values: Tensor) -> list[Tensor]:
        """The same shape of every rank; while it waits it looks whether a rank has failed."""
        parts = [torch.empty_like(values) for _ in range(self.size)]
        work: Any = dist.all_gather(parts, values, group=self._control, async_op=True)
        began = looked = time.monotonic()
        while not work.is_completed():
            now = time.monotonic()
            # At first without sleeping: ranks that meet on time wait for microseconds.
            if now - began > 2e-3:
                time.sleep(min(0.02, (now - began) / 20))
            if now - looked > _LOOK_EVERY:
                looked = now
                self._look()
        work.wait()
        return parts

    def _look(self) -> None:
        failed = self.failure()
        if failed is not None and failed[0] != self.rank:
            raise _other_failed(*failed)

    def _knows(self, name: str) -> bool:
        try:
            return not self._deserted and bool(self._store.check([self._key(name)]))
        except (RuntimeError, dist.DistError):  # whoever kept the store is gone
            self._deserted = True
            return False

    def _tell(self, name: str, value: str) -> None:
        with suppress(RuntimeError, dist.DistError):  # else nobody is left to be told
            self._store.set(self._key(name), value)

    def _await(self, names: list[str], seconds: float) -> None:
        until = time.monotonic() + seconds
        while time.monotonic() < until and not all(self._knows(name) for name in names):
            if self._deserted:
                return
            time.sleep(0.05)

    def _key(self, name: str) -> str:
        return f"diffusion_align/{self._run}/{name}"


class Attentive:
    """A listener that passes everything on, and looks at each progress whether a rank failed.

    So a rank that samples and scores by itself hears of it between two chunks.
    """

    def __init__(self, listener: Listener, group: Processes) -> None:
        self._listener, self._group = listener, group

    def progress(self, phase: str, done: int, total: int) -> None:
        """Raises UserError where another rank has failed."""
        self._group.check()
        self._listener.progress(phase, done, total)

    def message(self, text: str) -> None:
        """Passed on."""
        self._listener.message(text)


def meet(*, on_cpu: bool, lockstep: bool = False) -> Processes:
    """Join the other processes of this run, if there are any (RANK and WORLD_SIZE say so).

    Args:
        on_cpu: compute and exchange gradients on the CPU (gloo), whatever else the machine has.
        lockstep: see `Processes`.

    Raises:
        UserError: the launcher asks for what is not done here (DeepSpeed).
    """
    check_launcher()
    if process_count() == 1:
        return Processes()
    if not dist.is_initialized():
        PartialState(cpu=on_cpu, timeout=PATIENCE)
        atexit.register(_part)
    return Processes(dist.get_rank(), dist.get_world_size(), lockstep=lockstep)


_runs = 0


def _next_run() -> int:
    """Runs of one process are numbered: ranks call it equally often."""
    global _runs
    _runs += 1
    return _runs


def _part() -> None:
    """At the end of the process. After a failure others may be gone, and waiting would be vain."""
    if dist.is_initialized() and not _failed:
        dist.destroy_process_group()


_failed = False


def note_failure() -> None:
    """The process ends by an error: do not take leave of others that may be gone."""
    global _failed
    _failed = True


def _plainly(error: BaseException) -> str:
    return str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"


def _other_failed(rank: int, message: str) -> UserError:
    return UserError(f"stopped because process {rank} failed: {message}")


def check_equal(group: Processes, parameters: dict[str, Any]) -> None:
    """Assert that replicated parameters are bit for bit the same on all ranks.

    Two checksums of each parameter's bits are compared; shards, which are nobody's copy, are left
    out.

    Raises:
        UserError: naming the first that differs.
    """
    if group.size == 1:
        return
    names = [name for name, value in parameters.items() if not hasattr(value, "full_tensor")]
    if not names:
        return
    sums = torch.stack([_checksums(parameters[name]) for name in names]).cpu()
    every = group.gather(sums[None])
    differing = (every != every[:1]).any(dim=2)
    if not bool(differing.any()):
        return
    rank, place = differing.nonzero()[0].tolist()
    count = int(differing.any(dim=0).sum())
    raise UserError(
        f"{count} of {len(names)} trained parameters differ between processes after the first "
        f"update: they do not train one model together (first: {names[place]}, processes 0 and "
        f"{rank})",
        where="train.distribution",
        fix="a parameter that the network's forward does not use, or one that was changed outside "
        "the loop, is not kept equal",
    )


_INTEGERS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.int8}


@torch.no_grad()
def _checksums(value: Tensor) -> Tensor:
    """Int64 [2] of a tensor's bits: their sum, and one that depends on their places."""
    flat = value.detach().contiguous().flatten()
    bits = flat.view(_INTEGERS[flat.element_size()]).long()
    place = torch.arange(len(bits), device=bits.device) % 65521 + 1
    return torch.stack([bits.sum(), (bits * place).sum()])
