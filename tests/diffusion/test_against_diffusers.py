"""Schedules and steps against the schedulers of diffusers, every step from first to last.

Oracles are run in float64 over diffusers' own float32 tables, so that what is compared is the
formula and not two roundings of it; one test each compares the float32 arithmetic as shipped.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    CogVideoXDDIMScheduler,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from diffusion_align.diffusion import add_noise, ddim_schedule, flow_schedule, target
from diffusion_align.diffusion.noising import train_alpha_bar

SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
STEP_COUNTS = (1, 2, 7, 20, 30)


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _ddim_oracle(config: dict[str, Any], steps: int, *, precise: bool = True) -> DDIMScheduler:
    scheduler = DDIMScheduler(**config)
    scheduler.set_timesteps(steps)
    if precise:
        scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
        scheduler.final_alpha_cumprod = scheduler.final_alpha_cumprod.double()
    return scheduler


def _assert_ddim_equal(
    config: dict[str, Any], steps: int, eta: float, *, dtype: torch.dtype, tolerance: float
) -> None:
    oracle = _ddim_oracle(config, steps, precise=dtype == torch.float64)
    schedule = ddim_schedule(oracle.config, steps)
    assert schedule.timesteps.tolist() == oracle.timesteps.tolist()
    for i, t in enumerate(oracle.timesteps):
        out, x, noise = (_normal(2, 4, 3, 3, seed=3 * i + k, dtype=dtype) for k in range(3))
        expected = oracle.step(out, t, x, eta=eta, variance_noise=noise if eta > 0 else None)
        ours = schedule.step(out, x, i, eta=eta)
        case = f"{config} steps={steps} eta={eta} i={i}"
        if float(schedule.levels[i]) == 0 and eta == 1:
            # Its radicand, 0 in theory, is the square root of a rounding here, or NaN where that
            # is negative. test_transitions has the closed form of this step.
            assert torch.isfinite(ours.mean).all(), case
            theirs = expected.prev_sample.nan_to_num(nan=0.0)
            wrong = (ours.sample(noise) - theirs).abs() > 1e-3
            assert not bool((wrong & ~expected.prev_sample.isnan()).any()), case
            continue
        scale = max(1.0, float(expected.prev_sample.abs().max()))
        error = float((ours.sample(noise) - expected.prev_sample).abs().max())
        assert error < tolerance * scale, case
        x0_scale = max(1.0, float(expected.pred_original_sample.abs().max()))
        x0_error = float((ours.x0 - expected.pred_original_sample).abs().max())
        assert x0_error < tolerance * x0_scale, case


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_every_ddim_step_equals_diffusers(spacing: str, zero_snr: bool, prediction: str) -> None:
    for one in (False, True):
        for offset in (0, 1):
            config = {
                **SD_BETAS,
                "timestep_spacing": spacing,
                "rescale_betas_zero_snr": zero_snr,
                "prediction_type": prediction,
                "set_alpha_to_one": one,
                "steps_offset": offset,
                "clip_sample": False,
            }
            for steps in STEP_COUNTS:
                begins_at_noise = spacing == "trailing" or (spacing == "linspace" and steps > 1)
                if zero_snr and prediction == "epsilon" and begins_at_noise:
                    with pytest.raises(ValueError, match="zero terminal SNR"):
                        ddim_schedule(config, steps)
                    continue
                for eta in (0.0, 0.5, 1.0):
                    _assert_ddim_equal(config, steps, eta, dtype=torch.float64, tolerance=1e-9)


@pytest.mark.parametrize("table", ["linear", "scaled_linear", "squaredcos_cap_v2", "trained"])
@pytest.mark.parametrize("clip", [None, 0.7])
def test_ddim_equals_diffusers_for_every_table_and_clip(table: str, clip: float | None) -> None:
    config: dict[str, Any] = {"clip_sample": clip is not None, "clip_sample_range": clip or 1.0}
    if table == "trained":
        config["trained_betas"] = np.linspace(1e-4, 0.03, 1000).tolist()
    else:
        config["beta_schedule"] = table
    for eta in (0.0, 1.0):
        _assert_ddim_equal(config, 13, eta, dtype=torch.float64, tolerance=1e-9)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_ddim_in_float32_equals_diffusers_as_shipped(prediction: str) -> None:
    config = {**SD_BETAS, "prediction_type": prediction, "steps_offset": 1, "clip_sample": False}
    for eta in (0.0, 0.5, 1.0):
        # The scheduler's own float32 variance, 1 - a_t / a_p, is what limits this.
        _assert_ddim_equal(config, 50, eta, dtype=torch.float32, tolerance=2e-6)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("table", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_training_tables_are_diffusers_to_the_bit(table: str, zero_snr: bool) -> None:
    config = {"beta_schedule": table, "rescale_betas_zero_snr": zero_snr}
    assert torch.equal(train_alpha_bar(config), DDIMScheduler(**config).alphas_cumprod)


@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_timesteps_are_diffusers_for_every_number_of_steps(spacing: str) -> None:
    scheduler = DDIMScheduler(timestep_spacing=spacing)
    for steps in range(1, 1001, 1 if spacing == "trailing" else 3):
        scheduler.set_timesteps(steps)
        theirs = scheduler.timesteps.tolist()
        if len(theirs) > steps:
            assert theirs[steps:] == [-1]  # its rounding, see ddim_schedule
        assert ddim_schedule(scheduler.config, steps).timesteps.tolist() == theirs[:steps]


@pytest.mark.parametrize(
    "make", [functools.partial(PNDMScheduler, set_alpha_to_one=False), EulerDiscreteScheduler]
)
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_another_schedulers_config_gives_the_ddim_that_diffusers_converts_it_to(
    make: Any, spacing: str
) -> None:
    other = make(**SD_BETAS, steps_offset=1, timestep_spacing=spacing)
    oracle = DDIMScheduler.from_config(
        other.config, clip_sample=False, timestep_spacing=spacing, steps_offset=1
    )
    oracle.set_timesteps(20)
    schedule = ddim_schedule(other.config, 20)
    assert schedule.clip_sample_range is None
    assert schedule.timesteps.tolist() == oracle.timesteps.tolist()
    assert torch.equal(schedule.levels[:-1], oracle.alphas_cumprod[oracle.timesteps])
    assert float(schedule.levels[-1]) == float(oracle.final_alpha_cumprod)


@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_cogvideox_equals_diffusers_at_eta_zero(zero_snr: bool, shift: float) -> None:
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        rescale_betas_zero_snr=zero_snr,
        snr_shift_scale=shift,
    )
    scheduler.set_timesteps(13)
    schedule = ddim_schedule(scheduler.config, 13)
    torch.testing.assert_close(
        train_alpha_bar(scheduler.config).double(), scheduler.alphas_cumprod, rtol=1e-6, atol=0
    )
    for i, t in enumerate(scheduler.timesteps):
        out, x = _normal(2, 3, 4, 2, 2, seed=2 * i), _normal(2, 3, 4, 2, 2, seed=2 * i + 1)
        expected = scheduler.step(out, t, x).prev_sample
        torch.testing.assert_close(
            schedule.step(out, x, i, eta=0.0).mean, expected, rtol=0, atol=3e-6
        )


def test_noising_and_velocity_equal_diffusers() -> None:
    scheduler = DDIMScheduler(**SD_BETAS)
    x_0, eps = (_normal(6, 4, 3, 3, seed=k, dtype=torch.float32) for k in range(2))
    t = torch.tensor([0, 1, 250, 500, 998, 999])
    alpha_bar = train_alpha_bar(scheduler.config)[t]
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    expected = scheduler.add_noise(x_0, eps, t)
    torch.testing.assert_close(add_noise(x_0, eps, alpha, sigma), expected, rtol=0, atol=1e-6)
    velocity = scheduler.get_velocity(x_0, eps, t)
    torch.testing.assert_close(target(x_0, eps, alpha, sigma, "v"), velocity, rtol=0, atol=1e-6)


# --- rectified flow ----------------------------------------------------------------------------

FLOW_CASES: list[tuple[dict[str, Any], float | None]] = [
    ({}, None),
    ({"shift": 3.0}, None),
    ({"shift": 12.0}, None),
    ({"shift": 5.0, "num_train_timesteps": 500}, None),
    ({"use_dynamic_shifting": True}, 0.6),
    ({"use_dynamic_shifting": True, "shift": 3.0}, 1.15),
    ({"use_dynamic_shifting": True, "time_shift_type": "linear"}, 1.8),
    ({"shift": 3.0, "shift_terminal": 0.1}, None),
    ({"use_dynamic_shifting": True, "shift_terminal": 0.02}, 0.9),
]


@pytest.mark.parametrize(("config", "mu"), FLOW_CASES, ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_flow_times_and_steps_equal_diffusers(
    config: dict[str, Any], mu: float | None, own: bool
) -> None:
    for steps in (2, 7, 28, 50) if "shift_terminal" in config else (1, 2, 7, 28, 50):
        sigmas = np.linspace(1.0, 1 / steps, steps).tolist() if own else None
        scheduler = FlowMatchEulerDiscreteScheduler(**config)
        scheduler.set_timesteps(steps, mu=mu, sigmas=sigmas)
        schedule = flow_schedule(scheduler.config, steps, mu=mu, sigmas=sigmas)
        torch.testing.assert_close(schedule.levels, scheduler.sigmas, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(schedule.timesteps, scheduler.timesteps, rtol=1e-6, atol=1e-4)
        assert float(schedule.levels[-1]) == 0
        for i, t in enumerate(scheduler.timesteps):
            v, x = (_normal(2, 5, 3, seed=2 * i + k, dtype=torch.float32) for k in range(2))
            expected = scheduler.step(v, t, x).prev_sample
            ours = schedule.step(v, x, i, flow_kind="ode")
            torch.testing.assert_close(ours.mean, expected, rtol=1e-6, atol=1e-6)


def test_cps_at_full_noise_is_diffusers_stochastic_sampling() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, stochastic_sampling=True)
    scheduler.set_timesteps(6)
    schedule = flow_schedule(scheduler.config, 6)
    for i, t in enumerate(scheduler.timesteps):
        v, x = (_normal(2, 5, 3, seed=2 * i + k, dtype=torch.float32) for k in range(2))
        expected = scheduler.step(v, t, x, generator=torch.Generator().manual_seed(i)).prev_sample
        noise = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(i))
        ours = schedule.step(v, x, i, flow_kind="cps", noise_level=1.0).sample(noise)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)


def test_a_flow_shift_is_kept_where_diffusers_conversion_drops_it() -> None:
    unipc = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    euler = FlowMatchEulerDiscreteScheduler.from_config(unipc.config, shift=3.0)
    euler.set_timesteps(10)
    torch.testing.assert_close(flow_schedule(unipc.config, 10).levels, euler.sigmas)
