"""What a comparison found: scores, their statistics, and the warnings that belong to them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.statistics import (
    MIN_PROMPTS,
    Floats,
    Paired,
    headline,
    in_words,
    paired,
)
from reward_models.catalogue import components

Role = Literal["trained", "held-out", "unknown", "diversity"]
Side = Literal["base", "tuned"]

DIVERSITY = "diversity"


@dataclass(frozen=True)
class Setup:
    """How the pictures were made: everything needed to make them again."""

    model: str
    tuned: str
    sampler: str
    steps: int
    guidance_scale: float
    height: int
    width: int
    seeds: int
    run_seed: int


@dataclass(frozen=True)
class Result:
    """One reward, one part of a reward (`verifier/strict`), or diversity.

    Attributes:
        name: as in `summary.json`; a part is `reward/part`.
        role: `trained` if the run was rewarded with it, `unknown` where nobody said what the run
            was rewarded with; parts share their reward's role.
        unit: the reward's range or the distance used, in words.
        base, tuned: float64 `[P, S]`, NaN where not scored; diversity is `[P, 1]`.
        part_of: the reward this is a part of.
    """

    name: str
    role: Role
    unit: str
    base: Floats
    tuned: Floats
    part_of: str | None = None

    @cached_property
    def paired(self) -> Paired:
        ids = np.repeat(np.arange(len(self.base)), self.base.shape[1])
        return paired(self.base.reshape(-1), self.tuned.reshape(-1), [int(i) for i in ids])

    @property
    def headline(self) -> str:
        line = headline(self.name, self.paired)
        # Diversity has one number per prompt, so its pairs are prompts.
        return line.replace(" pairs", " prompts") if self.role == "diversity" else line

    @property
    def verdict(self) -> str:
        return in_words(self.paired)

    def prompt_difference(self, prompt: int) -> float:
        """Mean difference of one prompt over its valid pairs; NaN where there is none."""
        differences = self.tuned[prompt] - self.base[prompt]
        valid = differences[np.isfinite(differences)]
        return float(valid.mean()) if len(valid) else math.nan


@dataclass(frozen=True)
class Comparison:
    """Base against tuned on the same prompts and noise.

    Attributes:
        results: trained rewards first, then held-out ones, each followed by its parts; diversity
            last, where it could be measured.
        trained_on: the rewards of the run, as the caller named them; empty where unknown.
        alarms: signs of overfitting to the reward. `notes`: what limits the evidence.
        folder: where pictures and report lie.
    """

    setup: Setup
    prompts: tuple[Prompt, ...]
    results: tuple[Result, ...]
    trained_on: tuple[str, ...]
    alarms: tuple[str, ...]
    notes: tuple[str, ...]
    folder: Path

    @property
    def pairs(self) -> int:
        return len(self.prompts) * self.setup.seeds

    @property
    def primary(self) -> Result:
        """The result in the title: the trained reward where it was scored, else the first one."""
        return self.results[0]

    @property
    def headline(self) -> str:
        return self.primary.headline

    @property
    def verdict(self) -> str:
        return self.primary.verdict

    def result(self, name: str) -> Result:
        """The result called `name`. Raises `KeyError` where there is none."""
        for result in self.results:
            if result.name == name:
                return result
        raise KeyError(name)

    def picture(self, side: Side, prompt: int, seed: int) -> Path:
        """The PNG of one picture."""
        return self.folder / picture_name(side, prompt, seed)

    def summary(self) -> dict[str, Any]:
        """`summary.json`; numbers that do not exist are None."""
        return {
            "pairs": self.pairs,
            "prompts": len(self.prompts),
            "trained_on": list(self.trained_on),
            "rewards": numbers_of(self.results),
        }


def numbers_of(results: Iterable[Result]) -> dict[str, dict[str, Any]]:
    """`rewards` of `summary.json`: name -> base, tuned, difference, win rate, their intervals."""
    numbers = {}
    for result in results:
        pairs = result.paired
        numbers[result.name] = {
            "base": _number(pairs.base),
            "tuned": _number(pairs.tuned),
            "difference": _number(pairs.difference),
            "ci95": [_number(bound) for bound in pairs.ci95],
            "win_rate": _number(pairs.win_rate),
            "win_rate_ci95": [_number(bound) for bound in pairs.win_rate_ci95],
        }
    return numbers


def picture_name(side: Side, prompt: int, seed: int) -> Path:
    """Where a picture lies in a comparison's folder."""
    return Path("pictures") / side / f"p{prompt:04d}_s{seed:02d}.png"


def find_alarms(results: Sequence[Result]) -> tuple[str, ...]:
    """Overfitting to the reward: a trained reward rose while a held-out one or diversity fell.

    Both intervals must exclude zero. Parts of rewards take no part: with every one of them another
    chance to fall by luck, false alarms would be common.
    """
    wholes = [result for result in results if not result.part_of]
    rose = [result for result in wholes if result.role == "trained" and result.paired.rose]
    fell = [result for result in wholes if result.role != "trained" and result.paired.fell]
    if not rose:
        return ()
    gain = " and ".join(result.name for result in rose)
    return tuple(
        f"{gain} rose, which was trained on, while "
        + (
            "the samples of a prompt became more alike"
            if result.role == "diversity"
            else f"{result.name} fell, which was not"
        )
        + f" ({result.headline})."
        for result in fell
    )


def find_notes(
    results: Sequence[Result],
    *,
    trained_on: Sequence[str] | None,
    prompts: Sequence[Prompt],
    training_prompts: Sequence[str],
    seeds: int,
) -> tuple[str, ...]:
    """What limits the evidence, in sentences for the person who reads the report."""
    notes: list[str] = []
    if len(prompts) < MIN_PROMPTS:
        notes.append(
            f"Only {len(prompts)} prompt{'s' * (len(prompts) != 1)}: no verdict is given below "
            f"{MIN_PROMPTS}."
        )
    seen = set(training_prompts) & {prompt.text for prompt in prompts}
    if seen:
        notes.append(
            f"{len(seen)} of the {len(prompts)} prompts were trained on: they show how well the "
            "run did on its own prompts, not on new ones."
        )
    if trained_on is None:
        notes.append(
            "It is not known which rewards the model was trained on: any of these may be one of "
            "them, so that none is proof of more than its own rise."
        )
    elif not any(result.role == "held-out" for result in results):
        notes.append(
            "No held-out reward was scored: a rise of the trained reward alone may be "
            "overfitting to it. Add a reward that was not trained on."
        )
    if seeds < 2:
        notes.append("One picture per prompt: diversity cannot be measured; use 2 seeds or more.")
    scored = {result.name for result in results}
    parts = {part for part in (name.partition("/")[2] for name in scored) if part}
    missing = [name for name in trained_on or () if name not in scored | parts]
    if missing:
        notes.append(f"Trained on, but not scored here: {', '.join(missing)}.")
    for result in results:
        lost = result.paired.invalid
        # With one picture per prompt there is a note about diversity already.
        if lost and not result.part_of and not (result.role == "diversity" and seeds < 2):
            total = result.base.size
            notes.append(f"{result.name}: {lost} of {total} pairs could not be scored; left out.")
    return tuple(notes)


def arranged(
    scores: Mapping[str, tuple[Floats, Floats]],
    units: Mapping[str, str],
    trained_on: Sequence[str] | None,
) -> list[Result]:
    """Results of rewards and their parts, trained rewards first; a part that repeats its whole is
    left out.

    Args:
        scores: name -> (base, tuned); a name that is no reward is a part, `reward/part`.
        units: the range in words of every reward.
        trained_on: which rewards the run was trained with; None where that is unknown.
    """
    results = []
    for name, (base, tuned) in scores.items():
        whole = None if name in units else _whole(name, units)
        if whole is not None and all(
            np.array_equal(part, full, equal_nan=True)
            for part, full in zip((base, tuned), scores[whole], strict=True)
        ):
            continue
        role: Role = "unknown"
        if trained_on is not None:
            # A sum with a trained reward in it has been trained on as well.
            known = {whole or name, *components(whole or name)}
            role = "trained" if known & set(trained_on) else "held-out"
        results.append(Result(name, role, units.get(name, ""), base, tuned, whole))
    return sorted(results, key=lambda result: result.role != "trained")


def _whole(part: str, rewards: Iterable[str]) -> str:
    return next(name for name in rewards if part.startswith(f"{name}/"))


def _number(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
