"""The weights of the look with the best held-out rewards: `best/step_000040`, as `final/` has them.

A new best is written beside the old one, which goes only when no kept checkpoint knows of it: a run
that is killed and resumed finds the folder that belongs to its checkpoint, also where the newest
checkpoint is damaged and the one before it is taken.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from diffusion_align.training.checkpoint import write_atomically


class BestWeights:
    """The folder `best/` of a run.

    Args:
        folder: where; it appears with the first weights that are kept.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def path(self, step: int) -> Path:
        """Where the weights of `step` lie."""
        return self._folder / f"step_{step:06d}"

    def keep(self, step: int, save: Callable[[Path], Any]) -> None:
        """Let `save` write the weights of `step`.

        Raises:
            UserError: the disk is full or cannot be written.
        """
        write_atomically(self.path(step), save)

    def settle(self, checkpoints: Sequence[int]) -> None:
        """Keep what belongs to these checkpoints, and what is newer than all of them.

        Every new best replaces the one before: a checkpoint's is the last up to its step.
        """
        kept = sorted(step for step, _ in self._kept())
        before = {c: [step for step in kept if step <= c] for c in checkpoints}
        needed = {steps[-1] for steps in before.values() if steps}
        newest = max(checkpoints, default=-1)
        for other, path in self._kept():
            if other not in needed and other <= newest:
                shutil.rmtree(path, ignore_errors=True)

    def cut(self, step: int) -> None:
        """Forget what is past `step`: the resumed run makes it again."""
        for other, path in self._kept():
            if other > step:
                shutil.rmtree(path, ignore_errors=True)

    def _kept(self) -> list[tuple[int, Path]]:
        found = self._folder.glob("step_*")
        return [(int(p.name[5:]), p) for p in found if p.name[5:].isdecimal()]
