"""Schedules on their own: finite everywhere, consistent with the bare steps, honest refusals."""

from __future__ import annotations

import math
import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.diffusion import Schedule, ddim, ddim_schedule, flow, flow_schedule

SD15 = {
    "_class_name": "PNDMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}
ZERO_SNR = {
    "beta_schedule": "scaled_linear",
    "prediction_type": "v_prediction",
    "timestep_spacing": "trailing",
    "rescale_betas_zero_snr": True,
    "clip_sample": False,
}
SD3 = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
FLUX = {"use_dynamic_shifting": True}


def _normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _schedules() -> dict[str, Schedule]:
    found = {}
    for steps in (1, 2, 7, 20, 50):
        for spacing in ("leading", "trailing", "linspace"):
            for one in (False, True):
                config = {**SD15, "timestep_spacing": spacing, "set_alpha_to_one": one}
                found[f"sd15 {spacing} {one} {steps}"] = ddim_schedule(config, steps)
        found[f"zero-snr {steps}"] = ddim_schedule(ZERO_SNR, steps)
        found[f"cosine {steps}"] = ddim_schedule({"beta_schedule": "squaredcos_cap_v2"}, steps)
        for shift in (1.0, 3.0, 12.0):
            found[f"flow {shift} {steps}"] = flow_schedule({"shift": shift}, steps)
        own = torch.linspace(1, 1 / steps, steps)
        found[f"flux {steps}"] = flow_schedule(FLUX, steps, mu=1.15, sigmas=own)
        near = [1 - 1e-6, *(own[1:].tolist())]
        found[f"unipc-like {steps}"] = flow_schedule({}, steps, sigmas=near)
    found["flow 12 in 1000"] = flow_schedule({"shift": 12.0}, 1000)
    return found


@pytest.mark.parametrize(
    "schedule", [pytest.param(value, id=name) for name, value in _schedules().items()]
)
def test_every_step_of_every_schedule_is_finite(schedule: Schedule) -> None:
    p, x, noise = (_normal(2, 4, 3, 3, seed=i) for i in range(3))
    assert schedule.levels.shape == (len(schedule) + 1,)
    assert schedule.timesteps.dtype == schedule.levels.dtype == torch.float32
    for kind in ("ode", "sde", "dance", "cps") if schedule.family == "flow" else ("sde",):
        options: dict[str, Any] = {"eta": 1.0, "flow_kind": kind, "noise_level": 0.7}
        std = schedule.std(**options)
        assert torch.isfinite(std).all() and bool((std >= 0).all())
        stochastic = schedule.stochastic_steps(**options).tolist()
        assert stochastic == [i for i in range(len(schedule)) if float(std[i]) > 0]
        for i in {0, 1, len(schedule) // 2, len(schedule) - 1} & set(range(len(schedule))):
            step = schedule.step(p, x, i, **options)
            assert torch.isfinite(step.sample(noise)).all() and torch.isfinite(step.x0).all()
            assert float(step.std) == float(std[i])
            if i in stochastic:
                assert torch.isfinite(step.log_prob(step.sample(noise))).all()


def test_the_last_step_is_deterministic_where_theory_says_so() -> None:
    last_is_noisy: dict[str, tuple[Schedule, dict[str, Any], bool]] = {
        "alpha to one": (ddim_schedule({**SD15, "set_alpha_to_one": True}, 20), {}, False),
        "alpha of step 0": (ddim_schedule(SD15, 20), {}, True),
        "no offset": (ddim_schedule({**SD15, "steps_offset": 0}, 20), {}, False),
        "sde": (flow_schedule(SD3, 10), {"flow_kind": "sde"}, True),
        "dance": (flow_schedule(SD3, 10), {"flow_kind": "dance"}, True),
        "cps": (flow_schedule(SD3, 10), {"flow_kind": "cps"}, False),
    }
    for name, (schedule, options, noisy) in last_is_noisy.items():
        expected = list(range(len(schedule) - (not noisy)))
        assert schedule.stochastic_steps(**options).tolist() == expected, name
    assert ddim_schedule(SD15, 20).stochastic_steps(eta=0.0).tolist() == []
    assert flow_schedule(SD3, 10).stochastic_steps(flow_kind="ode").tolist() == []


def test_stable_diffusions_stds_run_from_045_to_0021() -> None:
    # Measured on the published sampler: 50 steps, eta 1, offset 1.
    std = ddim_schedule(SD15, 50).std()
    assert math.isclose(float(std[0]), 0.45, abs_tol=0.01)
    assert math.isclose(float(std[-1]), 0.021, abs_tol=0.001)


@pytest.mark.parametrize("name", ["ddim", "flow"])
def test_a_step_per_item_equals_looping_over_its_indices(name: str) -> None:
    schedule = ddim_schedule(SD15, 7) if name == "ddim" else flow_schedule(SD3, 7)
    p, x = _normal(7, 4, 3, 3, seed=1), _normal(7, 4, 3, 3, seed=2)
    index = torch.tensor([6, 0, 5, 1, 4, 2, 3])
    together = schedule.step(p, x, index)
    alpha, sigma = schedule.alpha_sigma(index)
    assert alpha.shape == sigma.shape == (7,)
    for b, i in enumerate(index.tolist()):
        single = schedule.step(p[b : b + 1], x[b : b + 1], i)
        torch.testing.assert_close(together.mean[b : b + 1], single.mean, rtol=1e-6, atol=1e-6)
        assert float(together.std[b]) == float(single.std)
        assert [float(alpha[b]), float(sigma[b])] == [float(v) for v in schedule.alpha_sigma(i)]


def test_a_step_is_the_bare_reverse_step_at_its_levels() -> None:
    p, x = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    vp, rf = ddim_schedule({**SD15, "clip_sample": True}, 20), flow_schedule(SD3, 20)
    for i in range(20):
        a, b = float(vp.levels[i]), float(vp.levels[i + 1])
        bare = ddim(p, x, a, b, eta=0.3, kind="eps", clip_sample_range=1.0)
        assert torch.equal(vp.step(p, x, i, eta=0.3).mean, bare.mean)
        a, b = float(rf.levels[i]), float(rf.levels[i + 1])
        for kind in ("ode", "sde", "dance", "cps"):
            bare = flow(p, x, a, b, kind=kind, noise_level=0.4, sigma_max=float(rf.levels[1]))
            ours = rf.step(p, x, i, flow_kind=kind, noise_level=0.4)
            assert torch.equal(ours.mean, bare.mean) and torch.equal(ours.std, bare.std)


@pytest.mark.parametrize("index", [3, torch.tensor([3, 0])], ids=["one", "per item"])
def test_a_step_forgets_the_options_of_the_step_before(index: int | Tensor) -> None:
    p, x = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    used = ddim_schedule(SD15, 10), flow_schedule(SD3, 10)
    for eta, kind, level in [(0.3, "cps", 0.4), (1.0, "cps", 0.8), (0.3, "sde", 0.4)]:
        options: dict[str, Any] = {"eta": eta, "flow_kind": kind, "noise_level": level}
        for schedule, fresh in zip(used, (ddim_schedule(SD15, 10), flow_schedule(SD3, 10))):
            again, first = (s.step(p, x, index, **options) for s in (schedule, fresh))
            assert torch.equal(again.mean, first.mean) and torch.equal(again.std, first.std)


def test_a_schedule_first_used_in_inference_mode_still_carries_a_gradient() -> None:
    schedule, x = ddim_schedule(SD15, 10), _normal(2, 3, seed=1)
    with torch.inference_mode():
        schedule.step(x, x, torch.tensor([3, 0]))
    p = _normal(2, 3, seed=2).requires_grad_()
    schedule.step(p, x, torch.tensor([3, 0])).log_prob(x).sum().backward()
    assert p.grad is not None and bool(p.grad.isfinite().all())


def test_alpha_and_sigma_keep_each_familys_sum_rule() -> None:
    for i in range(20):
        alpha, sigma = ddim_schedule(SD15, 20).alpha_sigma(i)
        assert math.isclose(float(alpha) ** 2 + float(sigma) ** 2, 1, rel_tol=1e-6)
        alpha, sigma = flow_schedule(SD3, 20).alpha_sigma(i)
        assert math.isclose(float(alpha) + float(sigma), 1, rel_tol=1e-6)


def test_a_perfect_denoiser_arrives_at_the_data() -> None:
    x_0, eps = _normal(2, 3, seed=1).double(), _normal(2, 3, seed=2).double()
    rf, vp = flow_schedule(SD3, 9), ddim_schedule({**ZERO_SNR, "set_alpha_to_one": True}, 10)
    for schedule, options in (
        (vp, {"eta": 0.0}),
        (vp, {"eta": 1.0}),
        (rf, {"flow_kind": "ode"}),
        (rf, {"flow_kind": "cps"}),
    ):
        x = eps
        for i in range(len(schedule)):
            alpha, sigma = schedule.alpha_sigma(i)
            noise = (x - alpha.double() * x_0) / sigma.double()
            v = alpha.double() * noise - sigma.double() * x_0
            prediction = noise - x_0 if schedule.family == "flow" else v
            x = schedule.step(prediction, x, i, **options).sample(
                _normal(2, 3, seed=9 + i).double()
            )
        torch.testing.assert_close(x, x_0, rtol=0, atol=1e-5)


def test_estimates_are_clipped_only_where_the_config_says_so() -> None:
    for config, expected in (
        ({}, None),
        ({"clip_sample": False}, None),
        ({"clip_sample": True}, 1.0),
        ({"clip_sample": True, "clip_sample_range": 2.0}, 2.0),
        ({"clip_sample_range": 2.0}, None),
        ({"clip_sample": True, "snr_shift_scale": 3.0}, None),
    ):
        assert ddim_schedule(config, 5).clip_sample_range == expected


@pytest.mark.parametrize(
    ("config", "steps", "message"),
    [
        ({"thresholding": True}, 5, "thresholding"),
        ({"prediction_type": "flow_prediction"}, 5, "prediction_type"),
        ({"timestep_spacing": "karras"}, 5, "timestep_spacing"),
        ({}, 1001, "1001 steps"),
        ({}, 0, "number of steps"),
        ({}, 2.0, "number of steps"),
        ({}, True, "number of steps"),
        ({"steps_offset": 1}, 1000, "beyond"),
        ({**ZERO_SNR, "prediction_type": "epsilon"}, 5, "zero terminal SNR"),
    ],
)
def test_a_ddim_config_without_an_exact_schedule_is_refused(
    config: dict, steps: int, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ddim_schedule(config, steps)


@pytest.mark.parametrize(
    ("config", "steps", "mu", "sigmas", "message"),
    [
        ({"invert_sigmas": True}, 4, None, None, "invert_sigmas"),
        ({"use_karras_sigmas": True}, 4, None, None, "use_karras_sigmas"),
        ({"use_exponential_sigmas": True}, 4, None, None, "use_exponential_sigmas"),
        ({"use_beta_sigmas": True}, 4, None, None, "use_beta_sigmas"),
        ({"prediction_type": "epsilon"}, 4, None, None, "ddim_schedule"),
        ({"time_shift_type": "cubic"}, 4, None, None, "time_shift_type"),
        ({"use_dynamic_shifting": True}, 4, None, None, "needs mu"),
        ({}, 4, None, [1.0, 0.5], "sigmas of shape"),
        ({}, 2, None, [0.5, 1.0], "descend"),
        ({}, 2, None, [1.0, 0.0], "descend"),
        ({}, 2, None, [1.0, math.nan], "descend"),
        ({"shift_terminal": 0.1}, 1, None, None, "at least two steps"),
        ({}, -1, None, None, "number of steps"),
    ],
)
def test_a_flow_config_without_an_exact_schedule_is_refused(
    config: dict, steps: int, mu: float | None, sigmas: list | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        flow_schedule(config, steps, mu=mu, sigmas=sigmas)


def test_steps_outside_the_schedule_are_refused() -> None:
    schedule, x = flow_schedule(SD3, 4), torch.zeros(2, 3)
    for i in (-1, 4, torch.tensor([0, 4]), torch.tensor([-1, 0])):
        with pytest.raises(IndexError, match="of a schedule of 4"):
            schedule.step(x, x, i)
        with pytest.raises(IndexError, match="of a schedule of 4"):
            schedule.alpha_sigma(i)
    with pytest.raises(ValueError, match="coefficients"):
        schedule.step(x, x, torch.tensor([0, 1, 2]))


def test_a_schedule_that_does_not_fit_together_is_refused() -> None:
    times = torch.tensor([900.0, 500.0])
    with pytest.raises(ValueError, match="3 levels"):
        Schedule("flow", "flow", times, torch.tensor([0.9, 0.5]))
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        Schedule("flow", "flow", times, torch.tensor([0.9, math.nan, 0.0]))


def test_the_room_imports_torch_lazily_and_never_diffusers() -> None:
    code = (
        "import sys, diffusion_align.diffusion as room\n"
        "assert 'torch' not in sys.modules\n"
        "[getattr(room, name) for name in room.__all__]\n"
        "assert 'torch' in sys.modules and 'diffusers' not in sys.modules\n"
        "assert dir(room) == sorted(room.__all__)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_leverage_is_how_many_stds_the_mean_moves_with_the_prediction(kind: str) -> None:
    schedule = ddim_schedule({"prediction_type": kind, "beta_schedule": "scaled_linear"}, 7)
    flow_steps = flow_schedule({"shift": 3.0}, 7)
    for chosen in (schedule, flow_steps):
        leverage = chosen.leverage(eta=0.8, noise_level=0.6)
        assert leverage.shape == (7,)
        for i in range(7):
            prediction = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
            x_t = torch.full((1, 3), 0.1, dtype=torch.float64)
            step = chosen.step(prediction, x_t, i, eta=0.8, noise_level=0.6)
            (slope,) = torch.autograd.grad(step.mean[0, 0], prediction)
            if float(step.std) > 0:
                expected = float(slope[0, 0].abs() / step.std)
                assert float(leverage[i]) == pytest.approx(expected, rel=1e-6)
            else:
                assert bool(leverage[i].isinf())
