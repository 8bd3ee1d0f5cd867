"""The held-out rules: stop where scores that nobody trained on fall while the trained one rises.

Every look at the model (`train.sample_every`) draws the same prompts from the same noise, so each
look is compared with step 0 picture by picture. With d_p the mean difference of prompt p, the rule
holds at a look where for a held-out reward

    the 95 % interval of mean(d_p) lies below zero (`evaluation/statistics.py`), and
    mean(d_p) <= -fall x sd of its single scores at step 0, and
    the trained reward rose (its own interval above zero; without scores its running mean),

and it acts when the same reward has held it for `looks` looks in a row. Looks are of one base and
correlated, so `looks` guards against a passing dip, the interval against the noise of few pictures.
With one prompt there is no interval, and the rule never acts.

A second rule, of the same form, looks at a reward that rose and turned: below its own best look,
while the trained one rose since (`turning`).

The best look is the one with the highest mean of held-out differences, each in standard deviations
of step 0; step 0 itself has 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards.alarm import Alarm, Finding, Say
from diffusion_align.training.guards.turning import Peak, Turn

if TYPE_CHECKING:
    from diffusion_align.evaluation.statistics import Floats, Paired

Table = list[list[float]]

FALLS, TURNS = "stop_when_heldout_falls", "stop_when_heldout_turns"
_PLEASED = "the reward is being pleased at the cost of what it stands for"
_ADVICE = (
    "train for fewer steps, lower train.learning_rate, raise algorithm.kl_weight, or add the "
    "reward that falls to the trained one"
)


@dataclass(frozen=True)
class Best:
    """The look with the best held-out rewards. score: in standard deviations of step 0."""

    step: int = 0
    score: float = 0.0


class HeldoutGuard:
    """stop_when_heldout_falls, stop_when_heldout_turns, keep_best.

    Args:
        trained_on: names of the rewards that are no witnesses.

    Attributes:
        best: the best look so far.
        ending: why the run should end, or None.
    """

    def __init__(self, options: GuardOptions, say: Say, trained_on: Sequence[str]) -> None:
        self._options, self._say = options, say
        self._trained = list(trained_on)
        self._base: dict[str, Table] = {}
        self._alarms: dict[str, Alarm] = {}
        self._turns: dict[str, Alarm] = {}
        self._peaks: dict[str, Peak] = {}
        self.best = Best()
        self.ending: str | None = None

    @property
    def alarms(self) -> tuple[Alarm, ...]:
        """Two per held-out reward."""
        return (*self._alarms.values(), *self._turns.values())

    def look(self, step: int, scores: Mapping[str, Floats], reward_rose: bool) -> bool:
        """Scores float64 [P, S] by reward, NaN where there is none, of the model at `step`.

        Returns:
            Whether this is the best look so far, and better than step 0.
        """
        if step == 0:
            self._base = {name: values.tolist() for name, values in scores.items()}
            return False
        pairs = {
            name: self._paired(name, values)
            for name, values in scores.items()
            if self._fits(name, values)
        }
        trained = [pairs[name] for name in self._trained if name in pairs]
        rose = trained[0].rose if trained else reward_rose
        heldout = {name: pair for name, pair in pairs.items() if name not in self._trained}
        is_best = self._is_best(step, heldout)
        judge = next((scores[name] for name in self._trained if name in pairs), None)
        for name, pair in heldout.items():
            self._watch(step, name, pair, rose)
            if name not in self._peaks:
                self._peaks[name] = Peak(self._base[name])
            turn = self._peaks[name].look(step, pair.difference, pair.base_sd, scores[name], judge)
            self._watch_turn(step, name, turn, rose)
        return is_best

    def _is_best(self, step: int, heldout: Mapping[str, Paired]) -> bool:
        effects = [pair.effect for pair in heldout.values() if math.isfinite(pair.effect)]
        score = sum(effects) / len(effects) if effects else -math.inf
        if score <= self.best.score:
            return False
        self.best = Best(step, score)
        return True

    def _watch(self, step: int, name: str, pair: Paired, rose: bool) -> None:
        o = self._options
        fell = pair.fell and not pair.effect > -o.heldout_fall
        alarm = self._alarm(name)

        def finding() -> Finding:
            low, high = pair.ci95
            return Finding(
                f"held-out {name} fell from {pair.base:.4g} to {pair.tuned:.4g} "
                f"({pair.difference:+.3g} [{low:+.3g}, {high:+.3g}], {pair.effect:+.2g} standard "
                f"deviations of step 0) in {alarm.held} looks in a row, while the trained reward "
                "rose",
                f"step {step}",
                f"{_PLEASED}; {self._which()}\n{_ADVICE}",
            )

        if alarm.rings(fell and rose, finding) and o.stop_when_heldout_falls == "stop":
            self._end(alarm, finding())

    def _watch_turn(self, step: int, name: str, turn: Turn | None, rose: bool) -> None:
        o = self._options
        alarm = self._turn_alarm(name)
        if turn is None:
            alarm.forgive()
            return
        fell = turn.fell and not turn.deviation > -o.heldout_fall
        known = turn

        def finding() -> Finding:
            low, high = known.interval
            return Finding(
                f"held-out {name} turned: {known.peak + known.difference:.4g} after "
                f"{known.peak:.4g} at step {known.step} ({known.difference:+.3g} [{low:+.3g}, "
                f"{high:+.3g}], {known.deviation:+.2g} standard deviations of step 0) in "
                f"{alarm.held} looks in a row, while the trained reward rose",
                f"step {step}",
                f"{_PLEASED}; {self._which()}\n{_ADVICE}",
            )

        since = rose if turn.rose is None else turn.rose
        if alarm.rings(fell and since, finding) and o.stop_when_heldout_turns == "stop":
            self._end(alarm, finding())

    def _end(self, alarm: Alarm, found: Finding) -> None:
        alarm.forgive()  # a run that is resumed gets as many looks as any other
        self.ending = f"{found.what}; {self._which()}"
        self._say(f"guard {alarm.guard}: {found.where}: {found.what}. {found.fix}")

    def _which(self) -> str:
        if self.best.step == 0:
            return "no look had better held-out rewards than step 0"
        kept = f", kept in best/step_{self.best.step:06d}" if self._options.keep_best else ""
        return (
            f"held-out rewards were best at step {self.best.step} "
            f"({self.best.score:+.2g} standard deviations of step 0{kept})"
        )

    def _alarm(self, name: str) -> Alarm:
        if name not in self._alarms:
            o = self._options
            self._alarms[name] = Alarm(
                FALLS, o.stop_when_heldout_falls, o.heldout_looks, self._say, about=name
            )
        return self._alarms[name]

    def _turn_alarm(self, name: str) -> Alarm:
        if name not in self._turns:
            o = self._options
            self._turns[name] = Alarm(
                TURNS, o.stop_when_heldout_turns, o.heldout_looks, self._say, about=name
            )
        return self._turns[name]

    def _fits(self, name: str, values: Floats) -> bool:
        """Whether step 0 has the same pictures; they differ where a resumed run has others."""
        base = self._base.get(name)
        return base is not None and (len(base), len(base[0])) == values.shape

    def _paired(self, name: str, values: Floats) -> Paired:
        import numpy as np

        from diffusion_align.evaluation.statistics import paired

        base = np.asarray(self._base[name], dtype=np.float64)
        prompts = np.repeat(np.arange(len(base)), base.shape[1])
        return paired(base.reshape(-1), values.reshape(-1), prompts.tolist())

    def state_dict(self) -> dict[str, Any]:
        """The scores of step 0, the counts, the best looks."""
        return {
            "base": {name: [list(row) for row in table] for name, table in self._base.items()},
            "alarms": {name: alarm.state_dict() for name, alarm in self._alarms.items()},
            "turns": {name: alarm.state_dict() for name, alarm in self._turns.items()},
            "peaks": {name: peak.state_dict() for name, peak in self._peaks.items()},
            "best": [self.best.step, self.best.score],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self._base = {name: [list(row) for row in table] for name, table in state["base"].items()}
        for name, counts in state["alarms"].items():
            self._alarm(name).load_state_dict(counts)
        # Checkpoints of earlier versions have neither.
        for name, counts in state.get("turns", {}).items():
            self._turn_alarm(name).load_state_dict(counts)
        for name, peak in state.get("peaks", {}).items():
            self._peaks[name] = Peak([])
            self._peaks[name].load_state_dict(peak)
        step, score = state["best"]
        self.best = Best(int(step), float(score))
        self.ending = None
