"""Noise schedules: the timesteps a denoiser is called at, and the levels a sample passes through.

A `Schedule` is built from the config mapping of a diffusers scheduler (`scheduler.config`), reads
nothing else, and holds plain tensors on the CPU. `Schedule.step` is the reverse step; everything
that samples or re-evaluates a trajectory calls it.

What follows from the training table (`train_alpha_bar`) is computed in float64. Options that would
change the numbers and are not understood are refused, never skipped.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion_align.diffusion.noising import train_alpha_bar
from diffusion_align.diffusion.prediction import PredictionKind, coefficient
from diffusion_align.diffusion.transitions import (
    FlowKind,
    StepWeights,
    Transition,
    ddim_weights,
    ddim_with,
    flow_weights,
    flow_with,
)

_PREDICTION_KINDS: dict[str, PredictionKind] = {
    "epsilon": "eps",
    "v_prediction": "v",
    "sample": "x0",
}


@dataclass(frozen=True, eq=False)
class Schedule:
    """S reverse steps of one family, from noise to data.

    Attributes:
        family: which reverse step this is, `ddim` or `flow`.
        prediction: what the denoiser predicts.
        timesteps: [S] float32, what the denoiser is told, as diffusers states it.
        levels: [S+1] float32, alpha_bar (ddim) or sigma (flow) at each step, then the final one.
        landings: [S] float32, the level that step i ends on; None where it is `levels[i + 1]`.
            diffusers' DDIM lands at timestep `t - N // S`, which is not the next one visited
            where S does not divide N, and pictures must equal those of the pipeline.
        clip_sample_range: where set, x_0 estimates are clamped to it (ddim only).
    """

    family: Literal["ddim", "flow"]
    prediction: PredictionKind
    timesteps: Tensor
    levels: Tensor
    clip_sample_range: float | None = None
    landings: Tensor | None = None
    _tables: dict[tuple[object, ...], Tensor] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        steps = len(self.timesteps)
        landed = steps if self.landings is None else len(self.landings)
        if steps < 1 or len(self.levels) != steps + 1 or landed != steps:
            raise ValueError(f"{steps} timesteps need {steps + 1} levels, got {len(self.levels)}")
        if not bool(((self.levels >= 0) & (self.levels <= 1)).all()):
            raise ValueError(f"noise levels must lie in [0, 1]: {self.levels.tolist()}")

    def __len__(self) -> int:
        return len(self.timesteps)

    def alpha_sigma(self, i: int | Tensor) -> tuple[Tensor, Tensor]:
        """Scale of data and of noise in x_t at step i: float32, 0-d for an int, [B] for long [B].

        Raises:
            IndexError: i is not a step of this schedule.
        """
        self._check_step(i)
        levels = self.levels[:-1].to(i.device) if isinstance(i, Tensor) else self.levels
        level = coefficient(levels[i])
        if self.family == "flow":
            return (1 - level).float(), level.float()
        return level.sqrt().float(), (1 - level).sqrt().float()

    def step(
        self,
        prediction: Tensor,
        x_t: Tensor,
        i: int | Tensor,
        *,
        eta: float = 1.0,
        flow_kind: FlowKind = "sde",
        noise_level: float = 0.7,
    ) -> Transition:
        """The reverse step from level i.

        Args:
            prediction: [B, ...], what the denoiser said at `timesteps[i]`, of kind `prediction`.
            x_t: [B, ...].
            i: the step's index, an int, or a long [B] with one per item.
            eta: how stochastic a ddim step is, 0 to 1; not used by flow.
            flow_kind: which flow step; not used by ddim, nor is `noise_level`.
            noise_level: see `flow_coefficients`.

        Raises:
            IndexError: i is not a step of this schedule.
            ValueError: shapes or options that do not fit (`ddim`, `flow`).
        """
        self._check_step(i)
        device = i.device if isinstance(i, Tensor) else self.levels.device
        table = self._table(eta, flow_kind, noise_level, device)
        weights = StepWeights(*table[:, i].unbind())
        if self.family == "flow":
            return flow_with(weights, prediction, x_t)
        clip = self.clip_sample_range
        return ddim_with(weights, prediction, x_t, kind=self.prediction, clip_sample_range=clip)

    def std(
        self, *, eta: float = 1.0, flow_kind: FlowKind = "sde", noise_level: float = 0.7
    ) -> Tensor:
        """The std of every step, [S] float32, without a network; arguments as `step`."""
        return self._weights(eta, flow_kind, noise_level).std.float()

    def leverage(
        self, *, eta: float = 1.0, flow_kind: FlowKind = "sde", noise_level: float = 0.7
    ) -> Tensor:
        """|d mean / d prediction| / std of every step, [S] float64; arguments as `step`.

        By how many stds of the step an equal change of the prediction moves its mean, and so how
        strongly it moves the step's log-probability. Infinite where the step has no noise.
        """
        index = torch.arange(len(self))
        one = torch.ones(len(self), 1, dtype=torch.float64)
        unclipped = replace(self, clip_sample_range=None)
        step = unclipped.step(
            one, 0 * one, index, eta=eta, flow_kind=flow_kind, noise_level=noise_level
        )
        return (step.mean / step.std).abs().flatten()

    def stochastic_steps(
        self, *, eta: float = 1.0, flow_kind: FlowKind = "sde", noise_level: float = 0.7
    ) -> Tensor:
        """Indices of the steps with noise, long, ascending: the only ones with a likelihood."""
        return self.std(eta=eta, flow_kind=flow_kind, noise_level=noise_level).nonzero().flatten()

    def _landings(self) -> Tensor:
        return self.levels[1:] if self.landings is None else self.landings

    def _table(
        self, eta: float, flow_kind: FlowKind, noise_level: float, device: torch.device
    ) -> Tensor:
        """The `StepWeights` of all steps, float64 [5, S]: no batch changes them."""
        key = (eta, device) if self.family == "ddim" else (flow_kind, noise_level, device)
        if key not in self._tables:
            # What is kept may take part in a gradient later on.
            with torch.inference_mode(False):
                weights = self._weights(eta, flow_kind, noise_level)
                rows = torch.stack([getattr(weights, row.name) for row in fields(weights)])
                # MPS has no float64.
                self._tables[key] = (rows.float() if device.type == "mps" else rows).to(device)
        return self._tables[key]

    def _weights(self, eta: float, flow_kind: FlowKind, noise_level: float) -> StepWeights:
        levels, landings = self.levels[:-1], self._landings()
        if self.family == "ddim":
            return ddim_weights(levels, landings, eta)
        return flow_weights(
            levels,
            landings,
            kind=flow_kind,
            noise_level=noise_level,
            sigma_max=float(self.levels[1]),
        )

    def _check_step(self, i: int | Tensor) -> None:
        """Negative indices do not wrap around."""
        if isinstance(i, Tensor):
            # Only looked at on the CPU: elsewhere it would stall the device, which checks anyway.
            if i.device.type == "cpu" and i.numel():
                low, high = i.aminmax()
                if int(low) < 0 or int(high) >= len(self):
                    raise IndexError(f"steps {i.tolist()} of a schedule of {len(self)}")
        elif not 0 <= i < len(self):
            raise IndexError(f"step {i} of a schedule of {len(self)}")


def _check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"the number of steps is a whole number from 1, got {steps!r}")


# --- variance preserving ---------------------------------------------------------------------


def ddim_schedule(config: Mapping[str, Any], steps: int) -> Schedule:
    """The DDIM schedule of a variance-preserving diffusers scheduler.

    Args:
        config: `scheduler.config` of DDIM, or of another scheduler of the same family (PNDM, Euler,
            DPM-Solver, DDPM, CogVideoX-DDIM ...) that DDIM takes the place of: its own config, as
            `DDIMScheduler.from_config` of it switches clipping on, which ruins latents. Missing
            keys have `DDIMScheduler`'s defaults, but for `clip_sample`, here False: every loaded
            scheduler that clips states it.
        steps: number of reverse steps, at most the training timesteps.

    Raises:
        ValueError: an option without an exact Gaussian DDIM step here (dynamic thresholding, an
            unknown beta schedule, spacing or prediction type), more steps than the table has, or
            an eps prediction that would be used at zero terminal SNR, where it says nothing of x_0.

    Source: diffusers `DDIMScheduler` (equal to it at every step). Its `trailing` spacing returns
    one timestep too many, -1, for some counts (61, 103, ...), by rounding; that one is left out.
    """
    _check_steps(steps)
    alpha_bar = train_alpha_bar(config)
    kind_name = config.get("prediction_type", "epsilon")
    if kind_name not in _PREDICTION_KINDS:
        raise ValueError(f"prediction_type {kind_name!r}; one of {list(_PREDICTION_KINDS)}")
    if config.get("thresholding", False):
        raise ValueError("thresholding: dynamic thresholding is not supported")

    timesteps = _spaced_timesteps(config, len(alpha_bar), steps)
    stride = len(alpha_bar) // steps
    final = torch.ones(()) if config.get("set_alpha_to_one", True) else alpha_bar[0]
    previous = timesteps - stride
    landings = torch.where(previous >= 0, alpha_bar[previous.clamp(min=0)], final)
    levels = torch.cat([alpha_bar[timesteps], final.view(1)])
    kind = _PREDICTION_KINDS[kind_name]
    if kind == "eps" and bool((levels[:-1] == 0).any()):
        raise ValueError(
            "prediction_type 'epsilon' at zero terminal SNR: at alpha_bar = 0 the noise says "
            "nothing of the picture; use v_prediction, or leave rescale_betas_zero_snr off"
        )
    return Schedule(
        family="ddim",
        prediction=kind,
        timesteps=timesteps.float(),
        levels=levels,
        clip_sample_range=_clip_range(config),
        landings=landings,
    )


def _spaced_timesteps(config: Mapping[str, Any], count: int, steps: int) -> Tensor:
    """[S] long, descending: table 2 of arXiv 2305.08891, rounded as NumPy does in diffusers."""
    if steps > count:
        raise ValueError(f"{steps} steps, but the model was trained on {count} timesteps")
    spacing = config.get("timestep_spacing", "leading")
    index = torch.arange(steps, dtype=torch.float64)
    if spacing == "leading":
        timesteps = index.flip(0) * (count // steps) + int(config.get("steps_offset", 0))
    elif spacing == "trailing":
        timesteps = (count + index * ((count - count / steps) - count)).round() - 1
    elif spacing == "linspace":
        timesteps = (index * ((count - 1) / max(steps - 1, 1))).round().flip(0)
    else:
        raise ValueError(f"timestep_spacing {spacing!r}; one of leading, trailing, linspace")
    if int(timesteps.max()) >= count:
        raise ValueError(
            f"{steps} steps with steps_offset {config.get('steps_offset', 0)} begin at timestep "
            f"{int(timesteps.max())}, beyond the {count} of training; use fewer steps"
        )
    return timesteps.long()


def _clip_range(config: Mapping[str, Any]) -> float | None:
    if "snr_shift_scale" in config:  # CogVideoX carries clip_sample, and never reads it
        return None
    if not config.get("clip_sample", False):
        return None
    return float(config.get("clip_sample_range", 1.0))


# --- rectified flow --------------------------------------------------------------------------


def flow_schedule(
    config: Mapping[str, Any],
    steps: int,
    *,
    mu: float | None = None,
    sigmas: Sequence[float] | Tensor | None = None,
) -> Schedule:
    """The rectified-flow schedule of a diffusers `FlowMatchEulerDiscreteScheduler`.

    Args:
        config: `scheduler.config`: shift, use_dynamic_shifting, time_shift_type, shift_terminal.
            A flow scheduler of another class (UniPC, DPM-Solver) states its shift as `flow_shift`.
        steps: number of reverse steps.
        mu: the resolution's shift, needed with dynamic shifting and unused without it.
        sigmas: [S] in (0, 1], descending, the times before shifting, where the pipeline has its
            own (FLUX: 1, 1 - 1/S, ...); None for the scheduler's.

    Raises:
        ValueError: inverted, Karras, exponential or beta sigmas; a config that is no flow's; no mu
            where it is needed; sigmas of another length or order; a terminal shift of a schedule
            whose last sigma is 1 (that of a single step), which has no solution.

    Source: diffusers `FlowMatchEulerDiscreteScheduler.set_timesteps`. Its `stochastic_sampling` is
    a way to step, not a schedule: here `flow_kind="cps"` at noise level 1.
    """
    _check_steps(steps)
    _refuse_flow_options(config)
    count = int(config.get("num_train_timesteps", 1000))
    times = _flow_times(config, count, steps) if sigmas is None else _own_times(sigmas, steps)

    if config.get("use_dynamic_shifting", False):
        if mu is None:
            raise ValueError("use_dynamic_shifting needs mu, the shift of this resolution")
        exponential = config.get("time_shift_type", "exponential") == "exponential"
        factor = torch.full_like(times, math.exp(mu) if exponential else mu)
        times = factor / (factor + (1 / times - 1))
    else:
        times = _shifted(times, _static_shift(config))

    terminal = config.get("shift_terminal")
    if terminal:
        remaining = 1 - times
        if not float(remaining[-1]) > 0:
            raise ValueError("shift_terminal needs a last sigma below 1: take at least two steps")
        times = 1 - remaining / (remaining[-1] / (1 - terminal))

    times = times.float()
    return Schedule(
        family="flow",
        prediction="flow",
        timesteps=times * count,
        levels=torch.cat([times, torch.zeros(1)]),
    )


def _refuse_flow_options(config: Mapping[str, Any]) -> None:
    for option in (
        "invert_sigmas",
        "use_karras_sigmas",
        "use_exponential_sigmas",
        "use_beta_sigmas",
    ):
        if config.get(option, False):
            raise ValueError(f"{option} is not supported by the flow schedule")
    kind = config.get("prediction_type", "flow_prediction")
    if kind != "flow_prediction":
        raise ValueError(f"prediction_type {kind!r} is not a flow's: use ddim_schedule")
    shift_type = config.get("time_shift_type", "exponential")
    if shift_type not in ("exponential", "linear"):
        raise ValueError(f"time_shift_type {shift_type!r}; one of exponential, linear")


def _static_shift(config: Mapping[str, Any]) -> float:
    shift = config["shift"] if "shift" in config else config.get("flow_shift", 1.0)
    return 1.0 if shift is None else float(shift)


def _shifted(times: Tensor, shift: float) -> Tensor:
    return shift * times / (1 + (shift - 1) * times)


def _flow_times(config: Mapping[str, Any], count: int, steps: int) -> Tensor:
    """[S] float64: even from the first to the last of the N training times.

    diffusers shifts those ends when the scheduler is made and everything again when timesteps are
    set, so that under a static shift the last time is shifted twice. Models are used that way.
    """
    ends = torch.tensor([count, 1], dtype=torch.float32) / count
    if not config.get("use_dynamic_shifting", False):
        ends = _shifted(ends, _static_shift(config))
    first, last = (float(end) * count for end in ends)
    if steps == 1:
        return torch.tensor([first / count], dtype=torch.float64)
    times = torch.arange(steps, dtype=torch.float64) * ((last - first) / (steps - 1)) + first
    times[-1] = last
    return times / count


def _own_times(sigmas: Sequence[float] | Tensor, steps: int) -> Tensor:
    """[S] float32, the precision in which diffusers goes on with them."""
    times = torch.as_tensor(sigmas, dtype=torch.float32).cpu()
    if times.shape != (steps,):
        raise ValueError(f"sigmas of shape {tuple(times.shape)} for {steps} steps")
    if not bool(((times > 0) & (times <= 1)).all()) or bool((times.diff() >= 0).any()):
        raise ValueError(f"sigmas must descend within (0, 1], got {times.tolist()}")
    return times
