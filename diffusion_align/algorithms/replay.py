"""The replay check: is the ratio of an untouched policy 1?

Before the first update the rollout is computed again exactly as training will compute it. In exact
arithmetic every ratio is 1. What makes it differ is either a fault (latents stored in low
precision, dropout, another schedule), which would clip whole steps one-sidedly and must stop the
run, or rounding: a batch of another size moves predictions by about 1e-6, which a small std
amplifies. Rounding is cured by taking the old log-probabilities from the replay itself, in the
shape of the training batch; a fault is not, and the two differ by orders of magnitude.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from diffusion_align import tf32
from diffusion_align.diffusion.transitions import Reduction
from diffusion_align.errors import UserError
from diffusion_align.policy.adapter import TrainingDropout

Wish = Literal["auto", "sampled", "replayed"]

BARS: dict[Reduction, float] = {"mean": 1e-6, "sum": 1e-4}
"""How far an untouched policy's ratio may be from 1 in float32."""

FAULT = 1e-5
"""A log-ratio per dimension that float32 rounding cannot explain: batch size 1 against 32 gives
1e-6 at 256 dimensions, fewer at more; bf16 storage gives 3e-5 to 3e-3."""

COARSE_FAULT = 0.05
"""The same for lower precision, where replaying a small model in bf16 gives about 1e-3."""


@dataclass(frozen=True)
class ReplayReport:
    """What the replay found. deviation: [S], the largest |ratio - 1| per step, NaN if untrained."""

    timesteps: Tensor
    deviation: Tensor
    bar: float
    reduction: Reduction
    dimensions: int
    decision: Literal["sampled", "replayed"]

    @property
    def worst(self) -> float:
        """The largest |ratio - 1| of any step."""
        return _largest(self.deviation)

    def table(self) -> str:
        """One line per timestep."""
        rows = [
            f"timestep {timestep:7.1f}   |ratio - 1| {deviation:.1e}"
            + ("   <-" if deviation > self.bar else "")
            for timestep, deviation in zip(
                self.timesteps.tolist(), self.deviation.tolist(), strict=True
            )
            if not math.isnan(deviation)
        ]
        return "\n".join(rows)

    def sentence(self) -> str:
        """The outcome in one line."""
        head = (
            f"replay of the untouched policy: |ratio - 1| at most {self.worst:.1e} "
            f"({self.reduction} over {self.dimensions} dimensions, bar {self.bar:.0e})"
        )
        if self.decision == "sampled":
            return head
        return f"{head}; old log-probabilities are computed again in the training batch's shape"


def ratio_deviation(log_prob: Tensor, old_log_prob: Tensor) -> Tensor:
    """Largest |exp(logp - logp_old) - 1| over dimension 0; NaN where nothing was replayed.

    [N, S], [N, S] -> [S]. A pair that is NaN in `log_prob` was not trained and does not count; a
    NaN in `old_log_prob` alone does, as infinity.
    """
    trained = ~log_prob.isnan()
    deviation = torch.expm1(log_prob - old_log_prob).abs().nan_to_num(nan=math.inf)
    largest = deviation.masked_fill(~trained, -1).amax(dim=0)
    return largest.masked_fill(largest < 0, math.nan)


def judge(
    *,
    timesteps: Tensor,
    deviation: Tensor,
    unweighted: Tensor,
    reduction: Reduction,
    dimensions: int,
    wish: Wish,
    is_float32: bool,
    clip_range: float,
) -> ReplayReport:
    """Decide which log-probabilities to train against, or stop.

    In float32 the bars are those of `BARS`. In lower precision (bf16 weights, autocast, TF32) they
    cannot be met by any formulation, so a tenth of the clip range takes their place. What no
    rounding explains (`FAULT`, `COARSE_FAULT`) and what is not finite is refused in any precision.

    Args:
        deviation: [S], of the ratios that are trained with; unweighted: [S], of those without the
            weights of steps, which enlarge rounding as well: it tells rounding from a fault.

    Raises:
        UserError: a deviation that is no rounding, or one above the bar that `wish` leaves uncured.
    """
    bar = BARS[reduction] if is_float32 else max(BARS[reduction], clip_range / 10)
    per_dimension = dimensions if reduction == "sum" else 1
    unexplained = (FAULT if is_float32 else COARSE_FAULT) * per_dimension
    fault = max(bar, math.expm1(min(unexplained, 80.0)))  # finite: an infinite ratio exceeds it
    within = _largest(deviation) <= bar
    sound = _largest(unweighted) <= fault
    keep_sampled = wish == "sampled" or (wish == "auto" and within)
    report = ReplayReport(
        timesteps,
        deviation,
        bar,
        reduction,
        dimensions,
        "sampled" if keep_sampled else "replayed",
    )
    if not sound or (wish == "sampled" and not within):
        if not sound:
            report = replace(report, deviation=unweighted)  # what gives the fault away
        raise UserError(refusal(report, not sound), fix=report.table() + "\n" + _ADVICE)
    return report


def _largest(deviation: Tensor) -> float:
    """Of the steps that are known; NaN where none is, which is within nothing."""
    known = deviation[~deviation.isnan()]
    return float(known.max()) if len(known) else math.nan


def refusal(report: ReplayReport, is_fault: bool) -> str:
    """What to say when the run stops."""
    kind = "more than rounding explains" if is_fault else "above the bar"
    return (
        f"the replayed rollout disagrees with the sampled one before any update: |ratio - 1| is "
        f"{report.worst:.1e} ({report.reduction} over {report.dimensions} dimensions), {kind} "
        f"({report.bar:.0e})"
    )


_ADVICE = (
    "latents must be stored in float32, dropout (lora.dropout) must be 0, and sampling and "
    "training must use one schedule and one size;\n"
    "a difference in batch size alone is cured by algorithm.old_log_probs=replayed"
)


def refuse_dropout(module: nn.Module) -> None:
    """Stop where LoRA dropout is on: it draws another policy for every forward of training.

    A fresh LoRA adds nothing yet, so the replay itself would not show it before the first update.

    Raises:
        UserError: naming the probability.
    """
    for part in module.modules():
        if isinstance(part, TrainingDropout) and part.probability > 0:
            raise UserError(
                f"dropout {part.probability:g} makes the likelihood ratio noise: the policy that "
                "is trained would never be the one that sampled",
                where="lora.dropout",
                fix="set it to 0 for policy-gradient methods",
            )


class FloatProbe:
    """A context that finds out, around a forward, whether `module` really runs in full float32.

    Weights may be bf16, autocast may be on inside the slot (accelerate wraps the forward) and CUDA
    may use TF32: the only place where all of it shows is inside the forward. `result` says.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        parameters = list(module.parameters())
        self.result = all(p.dtype in (torch.float32, torch.float64) for p in parameters)
        on_cuda = any(parameter.is_cuda for parameter in parameters)
        if on_cuda and tf32.in_use():
            self.result = False

    def __enter__(self) -> FloatProbe:
        with_weights = [m for m in self._module.modules() if any(True for _ in m.parameters(False))]
        self._handles = [m.register_forward_pre_hook(self._look) for m in with_weights]
        return self

    def __exit__(self, *error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _look(self, module: nn.Module, inputs: object) -> None:
        if torch.is_autocast_enabled(next(module.parameters()).device.type):
            self.result = False
