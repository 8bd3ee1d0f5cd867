"""What a denoiser predicts, and how one kind of prediction becomes another.

With `x_t = alpha x_0 + sigma eps` the four kinds are

    eps       the noise
    x0        the data
    v         alpha eps - sigma x_0        (Salimans & Ho 2022, arXiv 2202.00512, section 4)
    flow      eps - x_0                    (rectified flow's velocity dx_t/dt with t = sigma)

Both families use the same four formulas: variance preserving has `alpha = sqrt(alpha_bar)`,
`sigma = sqrt(1 - alpha_bar)`; flow has `alpha = 1 - t`, `sigma = t`. Nothing below assumes either
sum rule, so that every kind is right under every family.

Coefficients are floats, 0-d or [B] tensors. They are combined in float64 (they are a handful of
numbers) and meet the latents in the latents' own precision: float32, or float64 where given.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

PredictionKind = Literal["eps", "v", "flow", "x0"]
Coefficient = float | Tensor


def widen(x: Tensor) -> Tensor:
    """`x` as float32, or untouched where it is float64: the precision of this room's arithmetic."""
    return x if x.dtype == torch.float64 else x.float()


def coefficient(value: Coefficient) -> Tensor:
    """A float, 0-d or [B] coefficient as a float64 tensor on its own device (float32 on MPS).

    Raises:
        ValueError: it has more than one dimension.
    """
    tensor = value if isinstance(value, Tensor) else torch.tensor(float(value), dtype=torch.float64)
    if tensor.ndim > 1:
        raise ValueError(f"a coefficient is a number or one per item, got {tuple(tensor.shape)}")
    # MPS has no float64.
    return tensor.float() if tensor.device.type == "mps" else tensor.double()


def spread(value: Tensor, like: Tensor) -> Tensor:
    """A coefficient shaped to multiply `like` [B, ...]: 0-d stays 0-d, [B] becomes [B, 1, ...].

    A 0-d tensor on the CPU stays there: torch then passes it to any device as a plain number.

    Raises:
        ValueError: one number per item was given, but not for as many items as `like` has.
    """
    if value.ndim == 0:
        device = value.device if value.device.type == "cpu" else like.device
        return value.to(device=device, dtype=like.dtype)
    if like.ndim == 0 or value.shape[0] != like.shape[0]:
        raise ValueError(
            f"{value.shape[0]} coefficients for latents of shape {tuple(like.shape)}: "
            "give one number, or one per item"
        )
    return value.to(device=like.device, dtype=like.dtype).view(-1, *[1] * (like.ndim - 1))


def check_same_shape(name: str, tensor: Tensor, x: Tensor) -> None:
    """Raises ValueError where `tensor` would only fit `x` by broadcasting."""
    if tensor.shape != x.shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}, expected {tuple(x.shape)}")


def _check_kind(kind: str) -> None:
    if kind not in get_args(PredictionKind):
        raise ValueError(f"unknown prediction kind {kind!r}; one of {get_args(PredictionKind)}")


def to_x0(
    prediction: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient, kind: PredictionKind
) -> Tensor:
    """The data that a prediction implies, `x_0 = (x_t - sigma eps) / alpha`.

    Args:
        prediction: [B, ...], what the denoiser returned.
        x_t: [B, ...], what it was given.
        alpha: scale of the data in x_t; must not be 0 for `eps`, which then says nothing of x_0.
        sigma: scale of the noise in x_t.
        kind: what `prediction` is.

    Returns:
        [B, ...] in float32 (float64 where an input is).

    Raises:
        ValueError: unknown kind, or shapes that differ.
    """
    _check_kind(kind)
    check_same_shape("prediction", prediction, x_t)
    prediction, x_t = widen(prediction), widen(x_t)
    if kind == "x0":
        return prediction
    a, s = coefficient(alpha), coefficient(sigma)
    if kind == "eps":
        return (x_t - spread(s, x_t) * prediction) / spread(a, x_t)
    if kind == "v":
        norm = a * a + s * s  # 1 under variance preservation
        return spread(a / norm, x_t) * x_t - spread(s / norm, x_t) * prediction
    total = a + s  # 1 under flow
    return spread(1 / total, x_t) * x_t - spread(s / total, x_t) * prediction


def to_eps(
    prediction: Tensor, x_t: Tensor, alpha: Coefficient, sigma: Coefficient, kind: PredictionKind
) -> Tensor:
    """The noise that a prediction implies, `eps = (x_t - alpha x_0) / sigma`.

    Arguments, result and errors as `to_x0`; here `sigma` must not be 0 for `x0`.
    """
    _check_kind(kind)
    check_same_shape("prediction", prediction, x_t)
    prediction, x_t = widen(prediction), widen(x_t)
    if kind == "eps":
        return prediction
    a, s = coefficient(alpha), coefficient(sigma)
    if kind == "x0":
        return (x_t - spread(a, x_t) * prediction) / spread(s, x_t)
    if kind == "v":
        norm = a * a + s * s
        return spread(s / norm, x_t) * x_t + spread(a / norm, x_t) * prediction
    total = a + s
    return spread(1 / total, x_t) * x_t + spread(a / total, x_t) * prediction


def from_pair(
    x_0: Tensor, eps: Tensor, alpha: Coefficient, sigma: Coefficient, kind: PredictionKind
) -> Tensor:
    """The prediction of `kind` that states this data and this noise exactly, [B, ...]."""
    _check_kind(kind)
    check_same_shape("eps", eps, x_0)
    x_0, eps = widen(x_0), widen(eps)
    if kind == "x0":
        return x_0
    if kind == "eps":
        return eps
    if kind == "flow":
        return eps - x_0
    return spread(coefficient(alpha), eps) * eps - spread(coefficient(sigma), x_0) * x_0


def convert(
    prediction: Tensor,
    x_t: Tensor,
    alpha: Coefficient,
    sigma: Coefficient,
    source: PredictionKind,
    target: PredictionKind,
) -> Tensor:
    """The same prediction in another kind; other arguments, result and errors as `to_x0`.

    `v` and `flow` are convertible at every noise level; `eps` needs alpha > 0 and `x0` sigma > 0,
    because at pure noise (pure data) they leave the other half of the picture undetermined.
    """
    _check_kind(source)
    _check_kind(target)
    if source == target:
        check_same_shape("prediction", prediction, x_t)
        return widen(prediction)
    if target == "x0":
        return to_x0(prediction, x_t, alpha, sigma, source)
    if target == "eps":
        return to_eps(prediction, x_t, alpha, sigma, source)
    x_0 = to_x0(prediction, x_t, alpha, sigma, source)
    eps = to_eps(prediction, x_t, alpha, sigma, source)
    return from_pair(x_0, eps, alpha, sigma, target)
