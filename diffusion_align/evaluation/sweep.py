"""The adapter-scale sweep: how much of a LoRA to use, by the comparison's own numbers.

A LoRA that was pushed too far is often better at part of its strength: less of the reward, more of
everything else. For each scale the same prompts are drawn from the same noise with the adapter at
that share of its strength, and compared with the base picture by picture, as a comparison does. At
scale 1 the numbers are those of the comparison, at 0 the pictures are the base's. The base is drawn
once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from diffusion_align.data.images import save_grid
from diffusion_align.data.prompts import Prompt, load_prompts
from diffusion_align.evaluation.compare import DETERMINISTIC, check_asked
from diffusion_align.evaluation.comparison import Result, numbers_of
from diffusion_align.evaluation.exports import GRID_PROMPTS, write_text
from diffusion_align.evaluation.generate import Pictures, Reference, generate
from diffusion_align.evaluation.measuring import Progress, measure_all, measure_slice, results_of
from diffusion_align.evaluation.options import check_scales
from diffusion_align.evaluation.statistics import MIN_PROMPTS
from diffusion_align.sampling.options import SamplingOptions, resolve_sampling
from diffusion_align.secrecy.redaction import redact, redact_value

if TYPE_CHECKING:
    from diffusion_align.data.diversity import Features
    from diffusion_align.policy import Policy
    from reward_models.base import Reward

SWEEP_FILE = "sweep.json"
SWEEP_GRID = "sweep.png"
_BASE = "base"


@dataclass(frozen=True)
class Point:
    """The adapter at one scale against the base; `results` are as in a `Comparison`."""

    scale: float
    results: tuple[Result, ...]

    @property
    def wholes(self) -> tuple[Result, ...]:
        """Without parts of rewards."""
        return tuple(result for result in self.results if not result.part_of)

    @property
    def heldout(self) -> float:
        """Mean difference of the held-out rewards, each in standard deviations of the base; NaN
        where there is none."""
        effects = [result.paired.effect for result in self.wholes if result.role == "held-out"]
        known = [effect for effect in effects if math.isfinite(effect)]
        return sum(known) / len(known) if known else math.nan


@dataclass(frozen=True)
class Sweep:
    """What a sweep found; `sweep.json` and `sweep.png` lie in `folder`."""

    prompts: int
    seeds: int
    trained_on: tuple[str, ...]
    points: tuple[Point, ...]
    folder: Path

    @property
    def verdict(self) -> str:
        """At which scale the held-out rewards stand highest, in a sentence; "" where none was
        scored, or too few prompts were."""
        known = [point for point in self.points if math.isfinite(point.heldout)]
        if not known or self.prompts < MIN_PROMPTS:
            return ""
        best = max(known, key=lambda point: point.heldout)
        if best.heldout <= 0:
            return "held-out rewards are at no scale higher than the base's"
        sure = any(r.role == "held-out" and r.paired.rose for r in best.wholes)
        return (
            f"held-out rewards stand highest at scale {best.scale:g} "
            f"({best.heldout:+.2g} standard deviations of the base"
            f"{'' if sure else ', which may be chance'})"
        )

    def summary(self) -> dict[str, Any]:
        """`sweep.json`: per scale the `rewards` of a comparison's `summary.json`."""
        return {
            "pairs": self.prompts * self.seeds,
            "prompts": self.prompts,
            "trained_on": list(self.trained_on),
            "scales": [
                {"scale": point.scale, "rewards": numbers_of(point.results)}
                for point in self.points
            ],
        }


def sweep(
    policy: Policy,
    prompts: str | Path | Sequence[str | Prompt],
    *,
    scales: Sequence[float],
    rewards: Mapping[str, Reward],
    output: str | Path,
    trained_on: Sequence[str] | None = None,
    seeds: int = 4,
    sampling: SamplingOptions = DETERMINISTIC,
    run_seed: int = 0,
    features: Features | None = None,
    against: Reference = "base",
    progress: Progress | None = None,
) -> Sweep:
    """Compare a LoRA at several scales with its base; the arguments are those of `compare`.

    Args:
        scales: shares of the adapter's own strength, at least 0, each once.
        output: folder for `sweep.json` and `sweep.png`; an earlier sweep there is replaced.

    Raises:
        UserError: no LoRA (every weight was trained), no reward, no prompt, no scale.
        RewardError: a reward broke its contract.
    """
    check_asked(rewards, seeds)
    check_scales(scales, name="scales", least=1)
    items = load_prompts(prompts)
    with policy.adapter_scale(1.0):
        pass  # a model without an adapter is refused before anything is drawn
    settings = resolve_sampling(sampling, policy.info)
    names = {f"{scale:g}": float(scale) for scale in scales}
    shown: dict[str, list[Tensor]] = {name: [] for name in (_BASE, *names)}

    def keep(model: str, pictures: Pictures, first: int) -> None:
        shown[model] += list(pictures.pixels[: max(0, GRID_PROMPTS - first), 0])

    tables = measure_all(
        {_BASE: partial(generate, policy, reference=against, run_seed=run_seed)}
        | {name: _at_scale(policy, scale, run_seed) for name, scale in names.items()},
        lambda pictures, part: measure_slice(
            pictures, part, rewards, policy, settings.batch_size, features
        ),
        keep,
        items,
        seeds,
        settings,
        progress,
    )
    found = Sweep(
        prompts=len(items),
        seeds=seeds,
        trained_on=tuple(trained_on or ()),
        points=tuple(
            Point(
                scale,
                results_of(tables[_BASE], tables[name], rewards, trained_on, features is not None),
            )
            for name, scale in names.items()
        ),
        folder=Path(output),
    )
    _write(found, shown, items)
    return found


def _at_scale(policy: Policy, scale: float, run_seed: int) -> Callable[..., Pictures]:
    def draw(*arguments: Any, **options: Any) -> Pictures:
        with policy.adapter_scale(scale):
            return generate(policy, *arguments, run_seed=run_seed, **options)

    return draw


def _write(found: Sweep, shown: Mapping[str, Sequence[Tensor]], prompts: Sequence[Prompt]) -> None:
    """`sweep.png`, then `sweep.json`, which says that both are there."""
    save_grid(
        found.folder / SWEEP_GRID,
        list(zip(*shown.values(), strict=True)),
        row_labels=[redact(prompt.text) for prompt in prompts[:GRID_PROMPTS]],
        column_labels=[_BASE, *(f"scale {name}" for name in shown if name != _BASE)],
        gap_before=[1],
    )
    summary = redact_value(found.summary())
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(found.folder / SWEEP_FILE, text + "\n")
