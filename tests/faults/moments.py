"""The moments of a run at which something may happen to it, and what happens. For forked children.

`install` wraps the places where a run works, in this process alone: phases of a collection, the
backward pass (from inside autograd), updates, rows of metrics, and every file of every write. Each
passing of such a place is an event with a name; one of them is the fault's.
"""

from __future__ import annotations

import os
import resource
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from diffusion_align.reporting.trackers import JsonlTracker
from diffusion_align.training import checkpoint, loop
from diffusion_align.training.phases import PhaseClock
from diffusion_align.training.run_folder import RunFolder
from diffusion_align.training.setup import Machinery

Deed = Literal["kill", "tear", "interrupt", "full", "readonly"]
NOBODY = 65534


@dataclass(frozen=True)
class Fault:
    """What happens at which event.

    Args:
        deed: kill: SIGKILL. tear: half of the file just written is lost, then SIGKILL. interrupt:
            SIGINT. full: from here on no file takes another byte (RLIMIT_FSIZE). readonly: from
            here on the run's folders may not be written.
        nth: which event, from 1; of those that bear `name`, of all where that is empty.
        delay: seconds after the event that a kill waits, in another thread: it meets the run
            anywhere, inside C code as well.
        again: an interrupt comes a second time at the nth event after the first; 0 = never.
    """

    deed: Deed
    nth: int
    name: str = ""
    delay: float = 0.0
    again: int = 0


class Moments:
    """Counts events, and does the deed at its time."""

    def __init__(self, fault: Fault | None, folder: Path) -> None:
        self.names: list[str] = []
        self._fault, self._folder = fault, folder
        self._due = fault.nth if fault else 0

    def pass_by(self, name: str, file: Path | None = None) -> None:
        """An event of this name; `file` is what was just written."""
        self.names.append(name)
        fault = self._fault
        if fault is None or self._due <= 0 or (fault.name and fault.name != name):
            return
        self._due -= 1
        if self._due == 0:
            self._do(fault, name, file)

    def _do(self, fault: Fault, name: str, file: Path | None) -> None:
        if fault.deed == "interrupt":
            if fault.again:
                self._fault, self._due = Fault("interrupt", fault.again), fault.again
            os.kill(os.getpid(), signal.SIGINT)
        elif fault.deed == "full":
            _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))
        elif fault.deed == "readonly":
            _forbid_writing(self._folder)
        else:
            self._note(name)
            if fault.deed == "tear":
                assert file is not None, f"nothing to tear at {name}"
                os.truncate(file, file.stat().st_size // 2)
            if fault.delay:
                threading.Timer(fault.delay, os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGKILL)

    def _note(self, name: str) -> None:
        with (self._folder.parent / "kills.txt").open("a", encoding="utf-8") as stream:
            stream.write(f"{name}\n")


def _forbid_writing(folder: Path) -> None:
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        place.chmod(0o555)
    if os.geteuid() == 0:  # whom permissions do not bind
        os.seteuid(NOBODY)


def install(moments: Moments) -> None:
    """Wrap the places. Never undone: the process is a child that ends with its run."""
    passing = moments.pass_by

    def before(owner: Any, attribute: str, name: Callable[..., str]) -> None:
        plain = getattr(owner, attribute)

        def wrapped(*args: Any, **options: Any) -> Any:
            passing(name(*args))
            return plain(*args, **options)

        setattr(owner, attribute, wrapped)

    def around(owner: Any, attribute: str, file: Callable[..., Any]) -> None:
        plain = getattr(owner, attribute)

        def wrapped(*args: Any, **options: Any) -> Any:
            path = file(*args)
            if not isinstance(path, str | Path):  # a stream
                return plain(*args, **options)
            path = Path(path)
            passing(f"write {path.name}")
            result = plain(*args, **options)
            with suppress(FileNotFoundError):
                passing(f"written {path.name}", path)
            return result

        setattr(owner, attribute, wrapped)

    before(PhaseClock, "progress", lambda clock, phase, *rest: phase)
    before(Machinery, "update", lambda *args: "update")
    before(JsonlTracker, "log", lambda *args: "write metrics.jsonl")
    before(loop, "write_final", lambda *args: "write final")
    before(RunFolder, "cut", lambda *args: "cut")
    before(checkpoint, "flush", lambda path: "flush")
    before(checkpoint.os, "rename", lambda source, target: f"rename {_kind(target)}")
    around(checkpoint, "save_file", lambda tensors, path: path)
    around(torch, "save", lambda content, path: path)
    around(Path, "write_text", lambda path, *rest: path)
    _inside_backward(passing)


def _inside_backward(passing: Callable[[str], None]) -> None:
    plain = Machinery.backward

    def wrapped(machinery: Machinery, loss: torch.Tensor) -> None:
        if loss.requires_grad:
            loss.register_hook(lambda gradient: passing("backward"))
        plain(machinery, loss)

    Machinery.backward = wrapped  # type: ignore[method-assign, assignment]


def _kind(target: Any) -> str:
    """The name of what a rename makes visible, without its step."""
    return Path(target).name.split("_")[0]
