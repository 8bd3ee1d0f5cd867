"""Reverse steps against float64 closed forms and torch.distributions; exact zeros; gradients."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Independent, Normal, kl_divergence

from diffusion_align.diffusion import FlowKind, PredictionKind, Transition, ddim, flow
from diffusion_align.diffusion.transitions import ddim_coefficients, flow_coefficients

F64 = torch.float64
SHAPES = [(3, 6, 4), (3, 4, 5, 6), (3, 2, 4, 3, 5)]
FLOW_KINDS: tuple[FlowKind, ...] = ("ode", "sde", "dance", "cps")


def _normal(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


# --- closed forms, written straight from the papers, numbers only -----------------------------


def _score_sde(x: float, v: float, t: float, t_next: float, g: float) -> tuple[float, float]:
    """Euler-Maruyama on dx = [v - g^2/2 score] dt + g dw, score = -(x + (1 - t) v) / t."""
    dt = t_next - t
    score = -(x + (1 - t) * v) / t
    return x + (v - 0.5 * g * g * score) * dt, g * math.sqrt(-dt)


def _closed_flow(
    x: float, v: float, t: float, t_next: float, kind: str, a: float, sigma_max: float = 0.9
) -> tuple[float, float]:
    if kind == "ode":
        return x + (t_next - t) * v, 0.0
    if kind == "sde":
        g = a * math.sqrt(t / (1 - (sigma_max if t > 0.9999 else t)))
        return _score_sde(x, v, t, t_next, g)
    if kind == "dance":
        return _score_sde(x, v, t, t_next, a)
    x0, eps = x - t * v, x + (1 - t) * v
    s = t_next * math.sin(a * math.pi / 2)
    return (1 - t_next) * x0 + math.sqrt(t_next**2 - s**2) * eps, s


def _closed_ddim(
    x: float, eps: float, a_t: float, a_p: float, eta: float
) -> tuple[float, float, float]:
    s = eta * math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
    x0 = (x - math.sqrt(1 - a_t) * eps) / math.sqrt(a_t)
    return math.sqrt(a_p) * x0 + math.sqrt(1 - a_p - s * s) * eps, s, x0


@settings(max_examples=150, deadline=None)
@given(
    kind=st.sampled_from(FLOW_KINDS),
    t=st.floats(0.02, 1.0),
    share=st.floats(0.0, 0.98),
    a=st.floats(0.0, 0.95),
    x=st.floats(-3, 3),
    v=st.floats(-3, 3),
)
def test_a_flow_step_equals_its_closed_form(
    kind: FlowKind, t: float, share: float, a: float, x: float, v: float
) -> None:
    t_next = t * share
    step = flow(
        torch.tensor([[v]], dtype=F64),
        torch.tensor([[x]], dtype=F64),
        t,
        t_next,
        kind=kind,
        noise_level=a,
        sigma_max=0.9,
    )
    mean, std = _closed_flow(x, v, t, t_next, kind, a)
    scale = 1 + abs(mean)
    assert abs(float(step.mean) - mean) < 1e-9 * scale
    assert abs(float(step.std) - std) < 1e-9 * (1 + std)
    assert abs(float(step.x0) - (x - t * v)) < 1e-12


@settings(max_examples=100, deadline=None)
@given(
    a_t=st.floats(0.003, 0.95),
    share=st.floats(0.02, 1.0),
    eta=st.floats(0.0, 0.999),
    x=st.floats(-3, 3),
    eps=st.floats(-3, 3),
)
def test_a_ddim_step_equals_its_closed_form(
    a_t: float, share: float, eta: float, x: float, eps: float
) -> None:
    a_p = a_t + (0.999 - a_t) * share
    step = ddim(
        torch.tensor([[eps]], dtype=F64),
        torch.tensor([[x]], dtype=F64),
        a_t,
        a_p,
        eta=eta,
        kind="eps",
    )
    mean, std, x0 = _closed_ddim(x, eps, a_t, a_p, eta)
    assert abs(float(step.mean) - mean) < 1e-8 * (1 + abs(mean))
    assert abs(float(step.std) - std) < 1e-10
    assert abs(float(step.x0) - x0) < 1e-10 * (1 + abs(x0))


@pytest.mark.parametrize("kind", ["eps", "v", "x0", "flow"])
def test_a_ddim_step_is_the_same_whatever_kind_states_the_prediction(kind: PredictionKind) -> None:
    x_0, eps = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    a_t, a_p = 0.3, 0.5
    alpha, sigma = math.sqrt(a_t), math.sqrt(1 - a_t)
    prediction = {"eps": eps, "x0": x_0, "v": alpha * eps - sigma * x_0, "flow": eps - x_0}[kind]
    step = ddim(prediction, alpha * x_0 + sigma * eps, a_t, a_p, eta=0.5, kind=kind)
    s = 0.5 * math.sqrt((1 - a_p) / (1 - a_t) * (1 - a_t / a_p))
    torch.testing.assert_close(step.mean, math.sqrt(a_p) * x_0 + math.sqrt(1 - a_p - s * s) * eps)
    torch.testing.assert_close(step.x0, x_0)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["v", "x0"])
def test_a_ddim_step_from_zero_terminal_snr_is_finite(eta: float, kind: PredictionKind) -> None:
    for a_p in torch.linspace(1e-6, 0.9, 41).tolist():
        out, x = _normal(2, 3, dtype=torch.float32), _normal(2, 3, seed=1, dtype=torch.float32)
        step = ddim(out, x, 0.0, a_p, eta=eta, kind=kind)
        assert torch.isfinite(step.mean).all()
        x0 = out if kind == "x0" else -out
        weight = math.sqrt((1 - a_p) * (1 - eta**2))
        torch.testing.assert_close(step.mean, math.sqrt(a_p) * x0 + weight * x)
        assert math.isclose(float(step.std), eta * math.sqrt(1 - a_p), rel_tol=1e-6, abs_tol=0)


def test_neighbouring_ddim_levels_keep_every_digit_of_a_tiny_variance() -> None:
    # 1 - a_t / a_p in float32 would keep none of them.
    a_t = torch.tensor(0.5, dtype=torch.float32)
    a_p = torch.nextafter(a_t, torch.tensor(1.0))
    gap = float(a_p) - 0.5
    _, eps_weight, std = ddim_coefficients(a_t, a_p, 1.0)
    expected = math.sqrt((1 - float(a_p)) / 0.5 * gap / float(a_p))
    assert math.isclose(float(std), expected, rel_tol=1e-12)
    assert math.isclose(float(eps_weight) ** 2 + float(std) ** 2, 1 - float(a_p), rel_tol=1e-12)


def test_clipping_moves_the_data_estimate_and_leaves_the_noise() -> None:
    eps, x = _normal(2, 30, seed=1), 3 * _normal(2, 30, seed=2)
    free = ddim(eps, x, 0.4, 0.6, eta=0.0, kind="eps")
    clipped = ddim(eps, x, 0.4, 0.6, eta=0.0, kind="eps", clip_sample_range=0.5)
    assert float(free.x0.abs().max()) > 0.5
    torch.testing.assert_close(clipped.x0, free.x0.clamp(-0.5, 0.5))
    torch.testing.assert_close(
        free.mean - clipped.mean, math.sqrt(0.6) * (free.x0 - clipped.x0), atol=1e-12, rtol=1e-9
    )


# --- where the noise must vanish ---------------------------------------------------------------


@pytest.mark.parametrize("kind", FLOW_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_noise_level_zero_is_the_ode_for_every_flow_kind(
    kind: FlowKind, dtype: torch.dtype
) -> None:
    v, x = _normal(4, 5, 6, dtype=dtype), _normal(4, 5, 6, seed=1, dtype=dtype)
    for t, t_next in [(1.0, 0.93), (1 - 1e-6, 0.9), (0.7, 0.3), (0.2, 0.01), (0.02, 0.0)]:
        step = flow(v, x, t, t_next, kind=kind, noise_level=0.0, sigma_max=0.93)
        tolerance = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(step.mean, x + (t_next - t) * v, rtol=tolerance, atol=tolerance)
        assert float(step.std) == 0


def _deterministic_steps() -> list[tuple[str, Callable[[Tensor, Tensor], Transition]]]:
    per_item = torch.tensor([0.2, 0.5, 0.7])
    return [
        ("ddim, eta 0", lambda p, x: ddim(p, x, 0.3, 0.5, eta=0.0, kind="eps")),
        ("ddim onto data", lambda p, x: ddim(p, x, 0.3, 1.0, eta=1.0, kind="eps")),
        ("ddim in place", lambda p, x: ddim(p, x, 0.9991, 0.9991, eta=1.0, kind="v")),
        ("ddim inverted", lambda p, x: ddim(p, x, 0.6, 0.5, eta=1.0, kind="v")),
        ("ddim per item", lambda p, x: ddim(p, x, per_item, 1.0, eta=1.0, kind="eps")),
        ("ode", lambda p, x: flow(p, x, 0.5, 0.3, kind="ode")),
        ("cps onto data", lambda p, x: flow(p, x, 0.5, 0.0, kind="cps", noise_level=0.8)),
        ("sde in place", lambda p, x: flow(p, x, 0.5, 0.5, kind="sde")),
        ("dance upwards", lambda p, x: flow(p, x, per_item, 0.8, kind="dance")),
        ("dance at rest", lambda p, x: flow(p, x, 0.0, 0.0, kind="dance")),
    ]


@pytest.mark.parametrize(
    ("name", "make"), [pytest.param(*case, id=case[0]) for case in _deterministic_steps()]
)
def test_a_deterministic_step_has_std_exactly_zero_and_no_likelihood(
    name: str, make: Callable[[Tensor, Tensor], Transition]
) -> None:
    p, x, noise = (_normal(3, 4, 5, seed=i, dtype=torch.float32) for i in range(3))
    step = make(p, x)
    assert bool((step.std == 0).all()), name
    assert torch.isfinite(step.mean).all()
    assert torch.equal(step.sample(noise), step.mean)
    with pytest.raises(ValueError, match="without noise"):
        step.log_prob(x)
    noisy = ddim(p, x, 0.3, 0.5, eta=1.0, kind="eps")
    with pytest.raises(ValueError, match="without noise"):
        step.kl(noisy)
    with pytest.raises(ValueError, match="without noise"):
        noisy.kl(step)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_a_ddim_step_towards_noise_is_the_deterministic_inversion(eta: float) -> None:
    x_0, eps = _normal(2, 3, seed=1), _normal(2, 3, seed=2)
    for a_t, a_p in ((0.6, 0.5), (1.0, 0.7), (1.0, 1.0)):
        alpha, sigma = math.sqrt(a_t), math.sqrt(1 - a_t)
        x_t, v = alpha * x_0 + sigma * eps, alpha * eps - sigma * x_0
        step = ddim(v, x_t, a_t, a_p, eta=eta, kind="v")
        expected = math.sqrt(a_p) * x_0 + math.sqrt(1 - a_p) * eps
        torch.testing.assert_close(step.mean, expected, rtol=1e-12, atol=1e-12)
        assert float(step.std) == 0


def test_one_deterministic_item_among_noisy_ones_is_enough_to_refuse() -> None:
    p, x = _normal(3, 4), _normal(3, 4, seed=1)
    step = ddim(p, x, 0.3, torch.tensor([0.5, 1.0, 0.6]), eta=1.0, kind="eps")
    assert (step.std.flatten() == 0).tolist() == [False, True, False]
    with pytest.raises(ValueError, match="without noise"):
        step.log_prob(x)


# --- pure noise in Flow-SDE --------------------------------------------------------------------


@pytest.mark.parametrize("first", [1.0, 1 - 1e-7, 1 - 1e-6, 1 - 1e-5])
def test_a_first_sigma_of_one_up_to_rounding_uses_sigma_max(first: float) -> None:
    second = 0.94
    _, _, std = flow_coefficients(first, second, kind="sde", noise_level=0.7, sigma_max=second)
    # g^2 (-dt) = a^2 t / (1 - sigmas[1]) (t - sigmas[1]) = a^2 at t = 1
    assert math.isclose(float(std), 0.7, rel_tol=2e-4)
    with pytest.raises(ValueError, match=r"sigmas\[1\]"):
        flow_coefficients(first, second, kind="sde", noise_level=0.7)


def test_sigma_max_matters_at_pure_noise_only() -> None:
    sigmas = torch.tensor([1.0, 0.97, 0.5], dtype=F64)
    low = flow_coefficients(sigmas, sigmas - 0.1, kind="sde", noise_level=0.7, sigma_max=0.8)
    high = flow_coefficients(sigmas, sigmas - 0.1, kind="sde", noise_level=0.7, sigma_max=0.9)
    assert (low[2] == high[2]).tolist() == [False, True, True]
    # A fine, strongly shifted schedule has further sigmas up there: they stand for themselves.
    t, t_next = 1 - 4e-5, 1 - 5e-5
    _, _, std = flow_coefficients(t, t_next, kind="sde", noise_level=0.7, sigma_max=1 - 2e-5)
    assert math.isclose(float(std), 0.7 * math.sqrt(t / 4e-5 * 1e-5), rel_tol=1e-6)


# --- likelihood --------------------------------------------------------------------------------


def _transition(shape: tuple[int, ...], *, per_item: bool, seed: int, low: float) -> Transition:
    mean = _normal(*shape, seed=seed)
    std = low * (1 + torch.rand(shape[0], generator=torch.Generator().manual_seed(seed), dtype=F64))
    spread = std.view(-1, *[1] * (len(shape) - 1)) if per_item else std[0]
    return Transition(mean=mean, std=spread, x0=mean)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_item", [False, True])
@pytest.mark.parametrize("low", [1e-3, 0.3])
def test_log_prob_equals_torch_distributions(
    shape: tuple[int, ...], per_item: bool, low: float
) -> None:
    step = _transition(shape, per_item=per_item, seed=3, low=low)
    x = step.sample(_normal(*shape, seed=4))
    dense = Independent(Normal(step.mean, step.std.expand_as(step.mean)), len(shape) - 1)
    expected = dense.log_prob(x)
    count = math.prod(shape[1:])
    torch.testing.assert_close(step.log_prob(x, "sum"), expected, rtol=1e-12, atol=1e-9)
    torch.testing.assert_close(step.log_prob(x), expected / count, rtol=1e-12, atol=1e-12)
    single = Transition(step.mean.float(), step.std.float(), step.x0.float())
    small = single.log_prob(single.sample(_normal(*shape, seed=4, dtype=torch.float32)))
    assert small.dtype == torch.float32
    assert small.shape == (shape[0],)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_item", [False, True])
def test_kl_equals_torch_distributions(shape: tuple[int, ...], per_item: bool) -> None:
    p = _transition(shape, per_item=per_item, seed=5, low=0.3)
    q = _transition(shape, per_item=not per_item, seed=6, low=0.2)
    axes = len(shape) - 1
    expected = kl_divergence(
        Independent(Normal(p.mean, p.std.expand_as(p.mean)), axes),
        Independent(Normal(q.mean, q.std.expand_as(q.mean)), axes),
    )
    torch.testing.assert_close(p.kl(q, "sum"), expected, rtol=1e-12, atol=1e-10)
    torch.testing.assert_close(p.kl(q), expected / math.prod(shape[1:]), rtol=1e-12, atol=1e-12)


def test_kl_is_zero_to_itself_and_keeps_small_differences_in_float32() -> None:
    mean = _normal(2, 64, dtype=torch.float32)
    step = Transition(mean, torch.tensor(0.021), mean)
    assert torch.equal(step.kl(step), torch.zeros(2))
    moved = Transition(mean, torch.tensor(0.021 * (1 + 1e-3)), mean)
    q = float(step.std) / float(moved.std)
    expected = 0.5 * (q * q - 1) - math.log(q)  # about 1e-6; float64
    torch.testing.assert_close(step.kl(moved), torch.full((2,), expected), rtol=1e-5, atol=0)


def test_float32_likelihoods_follow_float64_ones() -> None:
    p, x, noise = _normal(4, 4, 8, 8), _normal(4, 4, 8, 8, seed=1), _normal(4, 4, 8, 8, seed=2)
    exact = ddim(p, x, 0.99, 0.9991, eta=1.0, kind="eps")
    low = ddim(p.float(), x.float(), 0.99, 0.9991, eta=1.0, kind="eps")
    reference = exact.log_prob(exact.sample(noise))
    # Each of 256 squares (x - mean)^2 / s^2 carries the rounding of x over s, at random.
    torch.testing.assert_close(
        low.log_prob(low.sample(noise.float())).double(), reference, rtol=0, atol=2e-5
    )


def test_the_ratio_of_an_untouched_policy_is_exactly_one() -> None:
    p, x, noise = (_normal(3, 4, 8, 8, seed=i, dtype=torch.float32) for i in range(3))
    for make in (
        lambda: ddim(p, x, 0.3, 0.5, eta=1.0, kind="eps"),
        lambda: flow(p, x, 0.5, 0.3, kind="sde"),
        lambda: flow(p, x, 0.5, 0.3, kind="cps", noise_level=0.8),
    ):
        x_next = make().sample(noise)
        assert torch.equal(make().log_prob(x_next), make().log_prob(x_next))
        assert torch.equal(make().kl(make()), torch.zeros(3))


def test_the_log_ratio_of_two_policies_has_the_closed_form_eps_times_shift() -> None:
    # log r = mean(eps' d) - mean(d^2) / 2, with d the shift of the mean in units of std.
    p, x, noise = (_normal(2, 3, 4, seed=i) for i in range(3))
    old = flow(p, x, 0.6, 0.5, kind="sde")
    new = flow(p + 0.01, x, 0.6, 0.5, kind="sde")
    x_next = old.sample(noise)
    shift = (new.mean - old.mean) / old.std
    expected = (noise * shift - 0.5 * shift**2).flatten(1).mean(1)
    torch.testing.assert_close(
        new.log_prob(x_next) - old.log_prob(x_next), expected, rtol=1e-8, atol=1e-12
    )


# --- gradients, batches, precision, refusals ---------------------------------------------------


def _every_step(
    p: Tensor, x: Tensor, one: Tensor | float, two: Tensor | float
) -> dict[str, Transition]:
    """Each reverse step from level `one` to a less noisy `two` (given as sigmas)."""
    steps: dict[str, Transition] = {
        kind: flow(p, x, one, two, kind=kind, sigma_max=0.9) for kind in FLOW_KINDS
    }
    vp_kinds: tuple[PredictionKind, ...] = ("eps", "v", "x0")
    for kind in vp_kinds:
        steps[kind] = ddim(p, x, 1 - one, 1 - two, eta=0.8, kind=kind, clip_sample_range=2.0)
    return steps


@pytest.mark.parametrize("shape", SHAPES)
def test_levels_per_item_equal_looping(shape: tuple[int, ...]) -> None:
    p, x, noise = (_normal(*shape, seed=i) for i in range(3))
    one = torch.tensor([0.95, 0.5, 0.2], dtype=F64)
    two = torch.tensor([0.9, 0.3, 0.1], dtype=F64)
    together = _every_step(p, x, one, two)
    for b in range(3):
        cut = slice(b, b + 1)
        for name, single in _every_step(p[cut], x[cut], float(one[b]), float(two[b])).items():
            batch = together[name]
            assert batch.std.shape == (3, *[1] * (len(shape) - 1))
            for ours, expected in (
                (batch.mean[cut], single.mean),
                (batch.x0[cut], single.x0),
                (batch.sample(noise)[cut], single.sample(noise[cut])),
            ):
                torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-12)
            if name != "ode":
                torch.testing.assert_close(
                    batch.log_prob(noise)[cut], single.log_prob(noise[cut]), rtol=1e-12, atol=1e-12
                )


@pytest.mark.parametrize("name", ["ode", "sde", "dance", "cps", "eps", "v", "x0"])
def test_gradients_flow_through_the_mean_and_the_likelihood(name: str) -> None:
    p = (0.3 * _normal(2, 3, seed=1)).requires_grad_()
    x = (0.3 * _normal(2, 3, seed=2)).requires_grad_()
    goal = _normal(2, 3, seed=3)
    levels = torch.tensor([0.9, 0.4], dtype=F64), torch.tensor([0.8, 0.3], dtype=F64)

    def of_mean(p: Tensor, x: Tensor) -> Tensor:
        step = _every_step(p, x, *levels)[name]
        return step.mean + step.x0 + step.sample(goal)

    assert torch.autograd.gradcheck(of_mean, (p, x))
    if name == "ode":
        return
    for method in ("log_prob", "kl"):

        def of_method(p: Tensor, x: Tensor, method: str = method) -> Tensor:
            step = _every_step(p, x, *levels)[name]
            other = Transition(goal, step.std * 1.1, goal)
            return step.log_prob(goal) if method == "log_prob" else step.kl(other, "sum")

        assert torch.autograd.gradcheck(of_method, (p, x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_predictions_are_stepped_in_float32(dtype: torch.dtype) -> None:
    p = _normal(2, 3, 4, seed=1, dtype=dtype)
    x = _normal(2, 3, 4, seed=2, dtype=torch.float32)
    exact = _every_step(p.double(), x.double(), 0.6, 0.4)
    for name, step in _every_step(p, x, torch.tensor(0.6), torch.tensor([0.4, 0.4])).items():
        assert step.mean.dtype == step.std.dtype == step.x0.dtype == torch.float32, name
        torch.testing.assert_close(step.mean.double(), exact[name].mean, rtol=1e-6, atol=1e-6)


def test_misfits_are_refused() -> None:
    x = _normal(2, 3)
    step = ddim(x, x, 0.3, 0.5, eta=1.0, kind="eps")
    with pytest.raises(ValueError, match="noise has shape"):
        step.sample(x[:1])
    with pytest.raises(ValueError, match="x_next has shape"):
        step.log_prob(x[0])
    with pytest.raises(ValueError, match=r"other\.mean has shape"):
        step.kl(ddim(x[:1], x[:1], 0.3, 0.5, eta=1.0, kind="eps"))
    with pytest.raises(ValueError, match="unknown reduction"):
        step.log_prob(x, "total")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="unknown reduction"):
        step.kl(step, "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"eta is 1\.5"):
        ddim(x, x, 0.3, 0.5, eta=1.5, kind="eps")
    with pytest.raises(ValueError, match="eta is nan"):
        ddim(x, x, 0.3, 0.5, eta=math.nan, kind="eps")
    with pytest.raises(ValueError, match="unknown flow kind 'euler'"):
        flow(x, x, 0.5, 0.3, kind="euler")  # type: ignore[arg-type]
    for kind, level in (("sde", -0.1), ("cps", 1.1), ("dance", math.inf), ("cps", math.nan)):
        with pytest.raises(ValueError, match="noise_level"):
            flow(x, x, 0.5, 0.3, kind=kind, noise_level=level)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="coefficients"):
        flow(x, x, torch.tensor([0.5, 0.4, 0.3]), 0.3, kind="ode")


def test_a_not_a_number_std_is_refused_rather_than_spread() -> None:
    x = _normal(2, 3)
    with pytest.raises(ValueError, match="not a number"):
        Transition(x, torch.tensor(math.nan), x).log_prob(x)
