"""Conversions between kinds of prediction: round trips, meaning, precision, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.diffusion import PredictionKind, add_noise, convert, target, to_eps, to_x0

KINDS: tuple[PredictionKind, ...] = ("eps", "v", "flow", "x0")
PAIRS = tuple(itertools.product(KINDS, KINDS))


def _normal(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(
        *shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    ).to(dtype)


def _levels(family: str, time: float) -> tuple[float, float]:
    """(alpha, sigma) with the share of noise growing in `time` within (0, 1)."""
    return (math.sqrt(1 - time), math.sqrt(time)) if family == "vp" else (1 - time, time)


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    family=st.sampled_from(["vp", "flow"]),
    time=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**31),
)
def test_converting_there_and_back_gives_the_same_prediction(
    pair: tuple, family: str, time: float, seed: int
) -> None:
    source, other = pair
    alpha, sigma = _levels(family, time)
    prediction, x_t = _normal(2, 3, 4, seed=seed), _normal(2, 3, 4, seed=seed + 1)
    there = convert(prediction, x_t, alpha, sigma, source, other)
    back = convert(there, x_t, alpha, sigma, other, source)
    torch.testing.assert_close(back, prediction, rtol=1e-10, atol=1e-10)


@settings(max_examples=60, deadline=None)
@given(
    pair=st.sampled_from(PAIRS),
    family=st.sampled_from(["vp", "flow"]),
    time=st.floats(0.02, 0.98),
    seed=st.integers(0, 2**31),
)
def test_converting_a_perfect_prediction_gives_the_other_kinds_target(
    pair: tuple, family: str, time: float, seed: int
) -> None:
    source, other = pair
    alpha, sigma = _levels(family, time)
    x_0, eps = _normal(2, 3, 4, seed=seed), _normal(2, 3, 4, seed=seed + 1)
    x_t = add_noise(x_0, eps, alpha, sigma)
    perfect = target(x_0, eps, alpha, sigma, source)
    torch.testing.assert_close(
        convert(perfect, x_t, alpha, sigma, source, other),
        target(x_0, eps, alpha, sigma, other),
        rtol=1e-9,
        atol=1e-9,
    )
    torch.testing.assert_close(to_x0(perfect, x_t, alpha, sigma, source), x_0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(
        to_eps(perfect, x_t, alpha, sigma, source), eps, rtol=1e-9, atol=1e-9
    )


def test_the_textbook_formulas_hold_under_each_familys_sum_rule() -> None:
    out, x = _normal(5, 3, seed=1), _normal(5, 3, seed=2)
    alpha, sigma = 0.6, 0.8
    torch.testing.assert_close(to_x0(out, x, alpha, sigma, "eps"), (x - 0.8 * out) / 0.6)
    torch.testing.assert_close(to_x0(out, x, alpha, sigma, "v"), 0.6 * x - 0.8 * out)
    torch.testing.assert_close(to_eps(out, x, alpha, sigma, "v"), 0.6 * out + 0.8 * x)
    torch.testing.assert_close(to_eps(out, x, alpha, sigma, "x0"), (x - 0.6 * out) / 0.8)
    torch.testing.assert_close(to_x0(out, x, 0.3, 0.7, "flow"), x - 0.7 * out)
    torch.testing.assert_close(to_eps(out, x, 0.3, 0.7, "flow"), x + 0.3 * out)


@pytest.mark.parametrize("kind", ["v", "flow", "x0"])
def test_pure_noise_still_has_a_data_estimate_for_every_kind_but_eps(kind: PredictionKind) -> None:
    out, x = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    assert torch.isfinite(to_x0(out, x, 0.0, 1.0, kind)).all()


@pytest.mark.parametrize("kind", ["eps", "v", "flow"])
def test_pure_data_still_has_a_noise_estimate_for_every_kind_but_x0(kind: PredictionKind) -> None:
    out, x = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    assert torch.isfinite(to_eps(out, x, 1.0, 0.0, kind)).all()


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 5, 6), (3, 2, 4, 3, 5)])
@pytest.mark.parametrize(("source", "other"), PAIRS)
def test_one_coefficient_per_item_equals_looping(
    shape: tuple[int, ...], source: PredictionKind, other: PredictionKind
) -> None:
    prediction, x_t = _normal(*shape, seed=3), _normal(*shape, seed=4)
    sigma = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    alpha = (1 - sigma**2).sqrt()
    together = convert(prediction, x_t, alpha, sigma, source, other)
    for b in range(3):
        one = convert(
            prediction[b : b + 1], x_t[b : b + 1], float(alpha[b]), float(sigma[b]), source, other
        )
        torch.testing.assert_close(together[b : b + 1], one, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("source", "other"), PAIRS)
def test_everything_below_float64_is_computed_in_float32(
    dtype: torch.dtype, source: PredictionKind, other: PredictionKind
) -> None:
    prediction, x_t = _normal(2, 3, 4, seed=5, dtype=dtype), _normal(2, 3, 4, seed=6, dtype=dtype)
    result = convert(prediction, x_t, 0.8, torch.tensor(0.6), source, other)
    assert result.dtype == torch.float32
    exact = convert(prediction.double(), x_t.double(), 0.8, 0.6, source, other)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(result.double(), exact, rtol=1e-6, atol=1e-6)


def test_gradients_flow_through_a_conversion() -> None:
    prediction = _normal(2, 3, seed=7).requires_grad_()
    x_t = _normal(2, 3, seed=8).requires_grad_()
    for source, other in PAIRS:
        assert torch.autograd.gradcheck(
            lambda p, x, a=source, b=other: convert(p, x, 0.8, 0.6, a, b), (prediction, x_t)
        )


def test_misfits_are_refused() -> None:
    x = torch.zeros(4, 3, 2)
    with pytest.raises(ValueError, match="shape"):
        to_x0(torch.zeros(1, 3, 2), x, 0.8, 0.6, "eps")
    with pytest.raises(ValueError, match="shape"):
        convert(torch.zeros(3, 2), x, 0.8, 0.6, "v", "v")
    with pytest.raises(ValueError, match="coefficients"):
        to_x0(x, x, torch.full((3,), 0.8), 0.6, "eps")
    with pytest.raises(ValueError, match="one per item"):
        to_x0(x, x, torch.full((4, 1), 0.8), 0.6, "eps")
    with pytest.raises(ValueError, match="unknown prediction kind 'epsilon'"):
        to_x0(x, x, 0.8, 0.6, "epsilon")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown prediction kind"):
        convert(x, x, 0.8, 0.6, "eps", "velocity")  # type: ignore[arg-type]
