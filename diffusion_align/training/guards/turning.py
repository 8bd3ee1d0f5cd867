"""Whether a held-out reward has turned: risen at first, and fallen again since its best look.

Over-optimisation often looks so: as long as the reward and what it stands for go together, the
witnesses rise too; then they turn, long before they are back below step 0. So each look is compared
with the reward's own best look, picture by picture (both drew the same noise). The best of many
looks is partly luck, and what follows it is expected to be lower; the interval allows for that by
being one of 1 - 0.05 / 20 (Bonferroni, for the best of `CANDIDATES` looks). The number is fixed so
that a run that was cut, and looked once more where it was, decides as the whole one does.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.evaluation.statistics import Floats, Interval

Table = list[list[float]]

CANDIDATES = 20


@dataclass(frozen=True)
class Turn:
    """A look against the best one of the same reward.

    step: of the best look. peak: the mean score there. interval: of the difference, 99.75 %.
    deviation: the difference in standard deviations of step 0. rose: whether the trained reward
    rose between the two, by its 95 % interval; None where it was not scored.
    """

    step: int
    peak: float
    difference: float
    interval: Interval
    deviation: float
    rose: bool | None

    @property
    def fell(self) -> bool:
        """The interval lies below zero."""
        return self.interval[1] < 0


class Peak:
    """The best look of one held-out reward."""

    def __init__(self, base: Table) -> None:
        self._step, self._score = 0, 0.0
        self._table, self._trained = base, list[list[float]]()

    def look(
        self, step: int, gain: float, deviation: float, scores: Floats, trained: Floats | None
    ) -> Turn | None:
        """Scores float64 [P, S] of the model at `step`, NaN where there is none.

        Args:
            gain: their mean difference to step 0.
            deviation: standard deviation of single scores at step 0.
            trained: the trained reward's scores of the same pictures, where it was scored.

        Returns:
            None while step 0 is the best look, and at a new best.
        """
        if gain > self._score:
            self._step, self._score = step, gain
            self._table = scores.tolist()
            self._trained = [] if trained is None else trained.tolist()
            return None
        if self._step == 0:
            return None
        return self._turn(deviation, scores, trained)

    def _turn(self, deviation: float, scores: Floats, trained: Floats | None) -> Turn:
        import numpy as np

        from diffusion_align.evaluation.statistics import CONFIDENCE, t_interval

        best = np.asarray(self._table, dtype=np.float64)
        change = _prompt_differences(best, scores)
        difference = float(change.mean()) if len(change) else math.nan
        rose = None
        if trained is not None and self._trained:
            before = np.asarray(self._trained, dtype=np.float64)
            rose = t_interval(_prompt_differences(before, trained))[0] > 0
        return Turn(
            self._step,
            float(np.nanmean(best)),
            difference,
            t_interval(change, 1 - (1 - CONFIDENCE) / CANDIDATES),
            difference / deviation if deviation > 0 else math.nan,
            rose,
        )

    def state_dict(self) -> dict[str, Any]:
        """The best look and its scores."""
        return {
            "best": [self._step, self._score],
            "scores": [list(row) for row in self._table],
            "trained": [list(row) for row in self._trained],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        step, score = state["best"]
        self._step, self._score = int(step), float(score)
        self._table = [list(row) for row in state["scores"]]
        self._trained = [list(row) for row in state["trained"]]


def _prompt_differences(before: Floats, after: Floats) -> Floats:
    """Mean difference of each prompt [P] over its valid pairs; prompts without one are left out."""
    import numpy as np

    from diffusion_align.evaluation.statistics import prompt_means

    change = after - before
    valid = np.isfinite(change)
    ids = np.repeat(np.arange(len(change)), change.shape[1]).reshape(change.shape)
    return prompt_means(change[valid], ids[valid])
