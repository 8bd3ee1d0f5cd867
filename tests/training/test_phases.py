"""Phase times, averages of metrics, and the borrowed random state."""

from __future__ import annotations

import random

import numpy as np
import torch

from diffusion_align.algorithms.base import Silence
from diffusion_align.training import random_state
from diffusion_align.training.means import Means
from diffusion_align.training.phases import PhaseClock


def test_a_phase_lasts_until_the_next_and_is_counted_once() -> None:
    now = [0.0]
    clock = PhaseClock(Silence(), clock=lambda: now[0])
    for moment, phase in ((0, "sampling"), (2, "scoring"), (3, "sampling"), (5, "updating")):
        now[0] = float(moment)
        clock.progress(phase, 0, 1)
    now[0] = 9.0
    assert clock.take() == {"time/sampling": 4.0, "time/scoring": 1.0, "time/updating": 4.0}
    now[0] = 10.0
    assert clock.take() == {"time/updating": 1.0}


def test_means_and_maxima() -> None:
    means = Means()
    for value in (1.0, 5.0, 3.0):
        means.add({"loss": torch.tensor(value), "ratio_max": torch.tensor(value)})
    means.add({"rare": torch.tensor(2.0)})
    assert means.take() == {"loss": 3.0, "ratio_max": 5.0, "rare": 2.0}
    assert Means().take() == {}


def test_borrowed_generators_are_seeded_inside_and_restored_outside() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    before = random_state.capture()
    expected = draw()
    random_state.restore(before)
    with random_state.borrowed(3):
        first = draw()
        kept = random_state.capture()
        second = draw()
        random_state.restore(kept)
        assert draw() == second
    assert draw() == expected
    with random_state.borrowed(3):
        assert draw() == first
