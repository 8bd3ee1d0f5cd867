"""Rewards of one iteration, chunk by chunk: beside the sampling of the next chunk, with a time-out.

With `overlap` a chunk is scored in a thread while the caller samples the next one of the same
iteration; `finish` waits for the last, so nothing is ever scored across an update. One chunk is
scored at a time, in order and in the same shapes, so the numbers are the same bits either way, as
long as the reward is a function of what it is given.
"""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from diffusion_align.algorithms.plan import Item
from diffusion_align.errors import UserError
from reward_models.base import Reward, RewardError, Scores, check_scores

LOOK_EVERY = 1.0
"""Seconds between two looks at a thread: an endless wait would be deaf to Ctrl-C on Windows."""

LINGER = 2.0
"""Seconds that a failing iteration gives a reward to end, so that nothing meets it halfway."""


def gains_by_overlap(reward: Reward, device: torch.device) -> bool:
    """Whether scoring beside sampling is sound and worth it without anybody having asked for it.

    It is where the reward computes elsewhere: it says so (`overlaps = True`, as one that asks a
    server or encodes files), or it, or what it holds, has a `device` that is not the policy's. A
    sum does where all of its terms do. Any other reward shares the policy's device and would only
    compete for it, and a user's own may share more than that (a VAE, a global random state).
    """
    if terms := getattr(reward, "terms", None):
        return all(gains_by_overlap(term, device) for _, _, term in terms)
    # A user's own class or function inside its checks.
    inner = getattr(reward, "inner", getattr(reward, "function", reward))
    declared = getattr(inner, "overlaps", None)
    if declared is not None:
        return bool(declared)
    places = [
        getattr(part, "device", None) for part in (inner, *getattr(inner, "__dict__", {}).values())
    ]
    known = [torch.device(place) for place in places if isinstance(place, str | torch.device)]
    return bool(known) and all(_apart(place, device) for place in known)


def _apart(one: torch.device, other: torch.device) -> bool:
    # cuda alone is the current device, which may be any of them.
    either_current = one.index is None or other.index is None
    return one.type != other.type or (not either_current and one.index != other.index)


class ChunkScorer:
    """Scores what is added, in order. A context: leaving it by an error waits a moment.

    Args:
        reward: of scope `group`, it is asked once per prompt, with all of its samples.
        iteration: for messages.
        overlap: `add` returns at once and the chunk is scored in a thread.
        timeout: seconds that one call of the reward may take; 0 is no limit. A call that takes
            longer is left behind in a thread that does not keep the process from ending.
        fps: of clips, frames per second; None where unknown.
        keyed: name every item by a `key` in its metadata (iteration, position, sample), unless its
            prompt brings one: by it a `FrameReward` draws its frames, others in each iteration.
    """

    def __init__(
        self,
        reward: Reward,
        iteration: int,
        *,
        overlap: bool = False,
        timeout: float = 0.0,
        fps: float | None = None,
        keyed: bool = False,
    ) -> None:
        self._reward, self._iteration = reward, iteration
        self._fps, self._keyed = fps, keyed
        self._overlap, self._timeout = overlap, timeout
        self._by_group = reward.info.scope == "group"
        self._held: list[tuple[Tensor, Item]] = []  # of a prompt that is not complete yet
        self._scores: list[Scores] = []
        self._task: _Task | None = None

    def __enter__(self) -> ChunkScorer:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        if kind is not None and self._task is not None:
            self._task.finished.wait(LINGER)

    def add(self, pixels: Tensor, items: Sequence[Item]) -> None:
        """Score these B items. pixels: float32 [B, 3, H, W] or [B, F, 3, H, W] in [0, 1].

        Raises:
            UserError: this or (with `overlap`) the chunk before it failed or took too long.
        """
        if not self._by_group:
            self._begin([(pixels, items)])
            return
        complete: list[tuple[Tensor, Sequence[Item]]] = []
        for row, item in zip(pixels, items, strict=True):
            if self._held and self._held[-1][1].position != item.position:
                complete.append(self._release())
            self._held.append((row, item))
        if complete:
            self._begin(complete)

    def finish(self) -> Scores:
        """All scores in the order of adding: float32 [N] on the CPU, and the parts.

        Raises:
            UserError: the reward failed or took too long.
        """
        if self._held:
            self._begin([self._release()])
        self._wait()
        return _join(self._scores)

    def _release(self) -> tuple[Tensor, Sequence[Item]]:
        pixels = torch.stack([row for row, _ in self._held])
        items = [item for _, item in self._held]
        self._held = []
        return pixels, items

    def _begin(self, parts: Sequence[tuple[Tensor, Sequence[Item]]]) -> None:
        self._wait()
        if not self._overlap and not self._timeout:
            self._scores += [self._score(pixels, items) for pixels, items in parts]
            return
        calls = [lambda p=pixels, i=items: self._score(p, i) for pixels, items in parts]
        self._task = _Task(calls)
        name = f"reward {self._reward.info.name}"
        # A daemon: one that hangs must not keep the process alive.
        threading.Thread(target=self._task.run, name=name, daemon=True).start()
        if not self._overlap:
            self._wait()

    def _wait(self) -> None:
        """Take over the results of the running thread, if there is one."""
        task = self._task
        if task is None:
            return
        while not task.finished.wait(task.patience(self._timeout)):
            if task.overdue(self._timeout):
                self._task = None  # left behind: waiting for it once more would not help
                raise UserError(
                    f"gave no answer within {self._timeout:g} s",
                    where=f"reward {self._reward.info.name}, iteration {self._iteration}",
                    fix="see what it waits for (a server that is down?), or give it longer: "
                    "algorithm.reward_timeout",
                )
        self._task = None
        if task.error is not None:
            raise task.error
        self._scores += task.results

    def _score(self, pixels: Tensor, items: Sequence[Item]) -> Scores:
        info = self._reward.info
        prompts = [item.prompt.text for item in items]
        metadata: list[Any] = [item.prompt.metadata for item in items]
        if self._keyed:
            keys = [f"{self._iteration}/{item.position}/{item.sample}" for item in items]
            metadata = [{"key": k, **(m or {})} for k, m in zip(keys, metadata, strict=True)]
        said = any(metadata)
        try:
            scores = self._reward.score(
                pixels, prompts, fps=self._fps, metadata=metadata if said else None
            )
            checked = check_scores(scores, len(items), info.name)
        except Exception as error:
            raise _named(error, info.name, self._iteration) from error
        return Scores(
            checked.values.detach().cpu().float(),
            {name: part.detach().cpu().float() for name, part in checked.parts.items()},
        )


class _Task:
    """Calls made one after another in a thread of their own, and what came of them."""

    def __init__(self, calls: Sequence[Callable[[], Scores]]) -> None:
        self.results: list[Scores] = []
        self.error: BaseException | None = None
        self.finished = threading.Event()
        self._calls = calls
        self._began = time.monotonic()
        # The current device belongs to a thread; a new one would begin on the first.
        self._cuda = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def run(self) -> None:
        device = torch.cuda.device(self._cuda) if self._cuda is not None else nullcontext()
        try:
            with torch.no_grad(), device:  # gradient mode belongs to a thread as well
                for call in self._calls:
                    self._began = time.monotonic()
                    self.results.append(call())
        except BaseException as error:  # raised again where it is waited for
            self.error = error
        finally:
            self.finished.set()

    def patience(self, timeout: float) -> float:
        """Seconds until somebody should look again."""
        left = self._began + timeout - time.monotonic() if timeout else LOOK_EVERY
        return min(LOOK_EVERY, max(0.0, left))

    def overdue(self, timeout: float) -> bool:
        """Whether the present call has taken too long."""
        return timeout > 0 and time.monotonic() - self._began >= timeout


def _named(error: Exception, name: str, iteration: int) -> UserError:
    """What a reward raised, with its name, the iteration and the line it came from."""
    if isinstance(error, UserError | RewardError):
        where = error.where or f"reward {name}"
        return UserError(error.what, where=f"{where}, iteration {iteration}", fix=error.fix)
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return UserError(
        f"raised {type(error).__name__}: {error}",
        where=f"reward {name}, iteration {iteration}",
        fix=f"the error is at {frame.filename}:{frame.lineno}, in {frame.name}",
    )


def _join(scores: Sequence[Scores]) -> Scores:
    if not scores:
        return Scores(torch.empty(0))
    parts = {name: torch.cat([chunk.parts[name] for chunk in scores]) for name in scores[0].parts}
    return Scores(torch.cat([chunk.values for chunk in scores]), parts)
