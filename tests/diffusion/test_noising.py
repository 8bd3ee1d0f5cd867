"""The forward process against its written definition, and the training tables' properties."""

from __future__ import annotations

import math

import pytest
import torch

from diffusion_align.diffusion import add_noise, target, train_alpha_bar


def _pair(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(11)
    return torch.randn(*shape, generator=generator), torch.randn(*shape, generator=generator)


@pytest.mark.parametrize("shape", [(3, 6, 4), (3, 4, 5, 6), (3, 2, 4, 3, 5)])
def test_noising_and_targets_equal_their_definitions_item_by_item(shape: tuple[int, ...]) -> None:
    x_0, eps = _pair(*shape)
    alpha, sigma = torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.2, 0.5, 0.95])
    noised = add_noise(x_0, eps, alpha, sigma)
    targets = {kind: target(x_0, eps, alpha, sigma, kind) for kind in ("eps", "v", "flow", "x0")}
    for b in range(3):
        a, s = float(alpha[b]), float(sigma[b])
        torch.testing.assert_close(noised[b], a * x_0[b] + s * eps[b])
        torch.testing.assert_close(targets["v"][b], a * eps[b] - s * x_0[b])
    torch.testing.assert_close(targets["flow"], eps - x_0)
    assert torch.equal(targets["eps"], eps)
    assert torch.equal(targets["x0"], x_0)


def test_half_precision_data_is_noised_in_float32() -> None:
    x_0, eps = _pair(2, 4)
    noised = add_noise(x_0.bfloat16(), eps.bfloat16(), 0.8, 0.6)
    assert noised.dtype == torch.float32
    torch.testing.assert_close(noised, 0.8 * x_0.bfloat16().float() + 0.6 * eps.bfloat16().float())
    assert target(x_0.half(), eps.half(), 0.8, 0.6, "v").dtype == torch.float32
    assert add_noise(x_0.double(), eps.double(), 0.8, 0.6).dtype == torch.float64


def test_noise_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="eps has shape"):
        add_noise(torch.zeros(2, 3), torch.zeros(1, 3), 0.8, 0.6)
    with pytest.raises(ValueError, match="eps has shape"):
        target(torch.zeros(2, 3), torch.zeros(3), 0.8, 0.6, "v")


@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_training_tables_fall_from_data_to_noise(name: str, zero_snr: bool) -> None:
    table = train_alpha_bar({"beta_schedule": name, "rescale_betas_zero_snr": zero_snr})
    assert table.shape == (1000,)
    assert table.dtype == torch.float32
    assert bool((table.diff() < 0).all())
    assert 0.99 < float(table[0]) < 1
    assert (float(table[-1]) == 0) is zero_snr


def test_a_linear_table_equals_its_product_in_float64() -> None:
    table = train_alpha_bar({"beta_start": 1e-4, "beta_end": 0.02})
    product = 1.0
    for i in range(1000):
        product *= 1 - (1e-4 + (0.02 - 1e-4) * i / 999)
        assert math.isclose(float(table[i]), product, rel_tol=1e-4)


def test_tables_that_are_not_understood_are_refused() -> None:
    with pytest.raises(ValueError, match="beta_schedule 'sigmoid'"):
        train_alpha_bar({"beta_schedule": "sigmoid"})
    with pytest.raises(ValueError, match="3 trained_betas"):
        train_alpha_bar({"trained_betas": [0.1, 0.2, 0.3]})
    own = train_alpha_bar({"trained_betas": [0.1, 0.2, 0.3], "num_train_timesteps": 3})
    torch.testing.assert_close(own, torch.tensor([0.9, 0.72, 0.504]))
