"""What DDPO leaves out (small advantages, steps outside a window) and what it does again (inner
epochs): the gradient is that of what is left, and the cost is counted.
"""

from __future__ import annotations

import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch

from diffusion_align.algorithms.advantages import without_small
from diffusion_align.algorithms.checks import in_window
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import OptionError, UserError
from diffusion_align.sampling.options import SamplingOptions


def make(toy: ModuleType, *, policy: Any = None, **options: Any) -> DDPO:
    chosen: dict[str, Any] = {
        "prompts_per_iteration": 4,
        "samples_per_prompt": 3,
        "train_batch_size": 6,
        "advantages": "global",
        "clip_range": 0.1,
        **options,
    }
    return DDPO(
        policy or toy.ToyPolicy(),
        toy.Brightness(),
        ["a", "bb", "ccc", "dddd", "eeeee"],
        options=DDPOOptions(**chosen),
        sampling=SamplingOptions(steps=6, guidance_scale=1.0),
    )


def test_small_advantages_become_untrained_and_never_all_of_them() -> None:
    advantages = torch.tensor([0.1, -0.6, math.nan, 2.0, -0.4])
    kept = without_small(advantages, 0.5)
    assert kept.isnan().tolist() == [True, False, True, False, True]
    assert kept[[1, 3]].tolist() == advantages[[1, 3]].tolist()
    for floor, given in ((0.0, advantages), (3.0, advantages)):
        assert torch.equal(without_small(given, floor).nan_to_num(9), given.nan_to_num(9))


def test_the_gradient_is_that_of_the_large_advantages_alone(toy: ModuleType) -> None:
    """With the small ones set to zero by hand; and only the large ones cost anything."""
    plain = make(toy)
    batch = plain.collect(0)
    small = batch.advantages.abs() < 0.7
    assert 0 < int(small.sum()) < 12
    silenced = replace(batch, advantages=batch.advantages.masked_fill(small, 0.0))
    expected = toy.gradient(plain, silenced)
    floored = make(toy, policy=plain.policy, advantage_floor=0.7)
    filtered = floored.collect(0)
    torch.testing.assert_close(toy.gradient(floored, filtered), expected, rtol=1e-5, atol=1e-7)
    large = 12 - int(small.sum())
    assert sum(len(m.rows) for m in floored.minibatches(filtered)) == large
    assert filtered.metrics["advantage/trained"] == pytest.approx(large / 12)
    assert filtered.metrics["advantage/std"] == batch.metrics["advantage/std"]
    # Sampled; those left are replayed once by the check, then forward and backward.
    assert filtered.metrics["cost/calls"] == 12 * 6 + large * 6 * (1 + 3)
    assert batch.metrics["cost/calls"] == 12 * 6 * (1 + 1 + 3)


def test_only_steps_inside_the_window_are_trained(toy: ModuleType) -> None:
    ddpo = make(toy, window_start=1 / 3, window_end=5 / 6)
    batch = ddpo.collect(0)
    assert sorted(batch.step_orders.unique().tolist()) == [2, 3, 4]
    half = make(toy, window_end=0.5, timestep_fraction=0.67)
    assert half.collect(0).step_orders.shape == (1, 12, 2)
    assert set(half.collect(1).step_orders.unique().tolist()) == {0, 1, 2}


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [(0.0, 1.0, range(100)), (0.29, 0.3, [29]), (0.0, 0.001, [0]), (0.995, 1.0, [])],
)
def test_a_window_is_half_open_and_never_rounded_astray(
    start: float, end: float, expected: Any
) -> None:
    steps = torch.arange(100)
    if not expected:
        with pytest.raises(UserError, match="no step with noise"):
            in_window(steps, 100, start, end)
    else:
        assert in_window(steps, 100, start, end).tolist() == list(expected)


def test_values_that_leave_nothing_are_refused() -> None:
    with pytest.raises(OptionError, match="leaves no step"):
        DDPOOptions(window_start=0.5, window_end=0.5)
    with pytest.raises(OptionError, match="above every advantage"):
        DDPOOptions(advantage_floor=5.0)
    with pytest.raises(OptionError, match="advantage_floor"):
        DDPOOptions(advantage_floor=-1.0)
    with pytest.raises(OptionError, match="reward_timeout"):
        DDPOOptions(reward_timeout=-1.0)


def test_a_second_inner_epoch_goes_on_from_what_the_first_changed(toy: ModuleType) -> None:
    """Each epoch has an order of its own; in the second the ratio is no longer 1."""
    ddpo = make(toy, inner_epochs=2, train_batch_size=12)
    batch = ddpo.collect(0)
    assert not torch.equal(batch.sample_orders[0], batch.sample_orders[1])
    assert not torch.equal(batch.step_orders[0], batch.step_orders[1])
    assert sorted(batch.sample_orders[1].tolist()) == list(range(12))
    parameters = ddpo.policy.trainable_parameters()
    optimiser = torch.optim.SGD(parameters, lr=0.05)
    deviations = []
    for minibatch in ddpo.minibatches(batch):
        seen = []
        for loss, metrics in ddpo.losses(minibatch, 1.0):
            loss.backward()
            seen.append(float(metrics["policy/ratio_deviation_max"]))
        deviations.append(max(seen))
        optimiser.step()
        optimiser.zero_grad()
    assert len(deviations) == 2
    assert deviations[0] < 1e-5 and deviations[1] > 1e-3


def test_the_unit_of_the_kl_is_told_with_its_weight(toy: ModuleType) -> None:
    lines = make(toy, kl_weight=0.04).describe()
    told = "KL to the reference, per step in nats, averaged over 4 dimensions: weight 0.04"
    assert told in lines
    summed = make(toy, kl_weight=0.04, clip_unit="nats").describe()
    assert "KL to the reference, per step in nats: weight 0.04" in summed
    assert not any("KL" in line for line in make(toy).describe())
