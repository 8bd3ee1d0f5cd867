"""Gradient plans: ranges, one draw per batch, indices that never leave the schedule."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.gradient_plan import GradientPlan
from diffusion_align.algorithms.gradient_presets import PRESETS
from diffusion_align.errors import OptionError


class Counting:
    """A generator that counts its draws."""

    def __init__(self, seed: int) -> None:
        self._inner, self.draws = np.random.default_rng(seed), 0

    def __getattr__(self, name: str) -> Any:
        self.draws += 1
        return getattr(self._inner, name)


def draws(plan: GradientPlan, steps: int, count: int = 300) -> list[Any]:
    plan.check(steps)
    return [plan.draw(np.random.default_rng(seed), steps) for seed in range(count)]


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(1, 60), data=st.data())
def test_no_draw_drops_a_step_or_leaves_the_schedule(steps: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, steps))
    active: Any = data.draw(st.sampled_from(["last", "uniform", "interval"]))
    for drawn in draws(GradientPlan(active=active, active_steps=count), steps, 20):
        assert len(set(drawn.active)) == count and drawn.last == steps - 1
        assert drawn.active[0] >= 0 and drawn.active[-1] <= drawn.last
        assert list(drawn.active) == sorted(drawn.active)


def test_a_spaced_choice_reaches_every_step_and_keeps_its_distance() -> None:
    seen = draws(GradientPlan(active="uniform", active_steps=3), 10)
    assert {step for drawn in seen for step in drawn.active} == set(range(10))
    assert {b - a for drawn in seen for a, b in zip(drawn.active, drawn.active[1:])} == {3}
    # The start is drawn from 0 to 3 inclusive: 3, 6, 9 still fit, and 10 is never among them.
    assert {drawn.active[0] for drawn in seen} == {0, 1, 2, 3}


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_one_spaced_step_is_never_none(steps: int) -> None:
    seen = draws(GradientPlan(active="uniform", active_steps=1), steps)
    assert {drawn.active for drawn in seen} <= {(step,) for step in range(steps)}
    assert len({drawn.active for drawn in seen}) == steps


def test_a_truncation_is_drawn_once_and_leaves_no_holes() -> None:
    seen = draws(PRESETS["alignprop"], 50, 400)
    for drawn in seen:
        assert drawn.active == tuple(range(drawn.active[0], 50))
    firsts = np.array([drawn.active[0] for drawn in seen])
    assert abs(firsts.mean() - 42) < 1 and 4 < firsts.std() < 5.5
    generator = Counting(0)
    PRESETS["alignprop"].draw(generator, 50)  # type: ignore[arg-type]
    assert generator.draws == 2  # the last step run, and the truncation, whatever the steps


def test_a_uniform_truncation_lies_in_its_window() -> None:
    plan = GradientPlan(active="cut", cut="uniform", interval_start=0.2, interval_end=0.5)
    firsts = {drawn.active[0] for drawn in draws(plan, 10)}
    assert firsts == {2, 3, 4}


def test_refl_is_one_step_of_the_last_quarter_and_its_estimate() -> None:
    seen = draws(PRESETS["refl"], 40)
    assert {drawn.last for drawn in seen} == set(range(30, 40))
    assert all(drawn.active == (drawn.last,) for drawn in seen)
    assert PRESETS["refl"].reward_input == "estimate"


def test_drtune_is_three_spaced_steps_before_an_early_stop() -> None:
    seen = draws(PRESETS["drtune"], 25)
    assert {drawn.last for drawn in seen} == set(range(15, 25))
    assert all(len(drawn.active) == 3 and drawn.active[-1] <= drawn.last for drawn in seen)
    assert PRESETS["drtune"].coupling == 0


SHAPES = st.builds(
    lambda active, count, window, cut, chosen, stops: GradientPlan(
        reward_input="estimate",
        active=active,
        active_steps=count,
        chosen_steps=tuple(sorted(chosen)) if active == "chosen" else (),
        interval_start=window[0],
        interval_end=window[1],
        cut=cut,
        stop_start=stops[0],
        stop_end=stops[1],
    ),
    active=st.sampled_from(["last", "uniform", "interval", "cut", "all", "chosen"]),
    count=st.integers(1, 4),
    window=st.sampled_from([(0.0, 1.0), (0.4, 1.0), (0.3, 0.8)]),
    cut=st.sampled_from(["normal", "uniform"]),
    chosen=st.sets(st.integers(0, 4), min_size=1),
    stops=st.sampled_from([(1.0, 1.0), (0.5, 1.0), (0.6, 0.8)]),
)


@settings(max_examples=80, deadline=None)
@given(plan=SHAPES, steps=st.integers(1, 6))
def test_what_any_draw_may_be_is_known_beforehand(plan: GradientPlan, steps: int) -> None:
    try:
        plan.check(steps)
    except OptionError:
        return
    seen = draws(plan, steps, 200)
    gaps = any(len(drawn.active) < drawn.last + 1 - drawn.first for drawn in seen)
    assert plan.leaves_gaps(steps) == gaps
    union = {step for drawn in seen for step in drawn.active}
    # A normal cut reaches every step, some of them once in a lifetime.
    rare = plan.active == "cut" and plan.cut == "normal"
    assert union <= plan.reachable(steps) if rare else union == plan.reachable(steps)


def test_vader_shows_an_image_reward_one_random_frame() -> None:
    assert DraftOptions(preset="vader").frames_scored == "random:1"
    assert DraftOptions(preset="vader", reward_frames="uniform:4").frames_scored == "uniform:4"
    assert {DraftOptions(preset=p).frames_scored for p in PRESETS if p != "vader"} == {"all"}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_options_say(name: Any) -> None:
    assert DraftOptions(preset=name).plan == PRESETS[name]
    assert {option.name for option in fields(GradientPlan)} <= {
        option.name for option in fields(DraftOptions)
    }


def test_an_option_changes_its_part_of_the_preset_only() -> None:
    plan = DraftOptions(preset="draft-k", active_steps=7, coupling=0.5).plan
    assert plan == GradientPlan(active="last", active_steps=7, coupling=0.5)


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"active_steps": 0}, "active_steps"),
        ({"coupling": 1.5}, "coupling"),
        ({"stop_start": 0.5, "reward_input": "x_0", "lv_copies": 0}, "reward_input"),
        ({"reward_input": "estimate"}, "lv_copies"),
        ({"active": "chosen"}, "chosen_steps"),
        ({"chosen_steps": (1,)}, "chosen_steps"),
        ({"active": "chosen", "chosen_steps": (3, 1)}, "chosen_steps"),
        ({"guidance_gradient": "both", "norm_compensation": True}, "norm_compensation"),
        ({"step_weights": (1.0, 2.0)}, "step_weights"),
        ({"interval_start": 0.5, "interval_end": 0.5}, "interval_end"),
        ({"stop_start": 0.5, "stop_end": 0.4}, "stop_end"),
        ({"loss": "relu"}, "loss_target"),
        ({"loss_target": 1.0}, "loss_target"),
        ({"train_batch_size": 3}, "train_batch_size"),
        ({"preset": "draft-kk"}, "preset"),
        ({"kl_weight": -1.0}, "kl_weight"),
        ({"decode_frames": "random:2"}, "decode_frames"),
        ({"reward_frames": "uniform"}, "reward_frames"),
    ],
    ids=str,
)
def test_options_that_do_not_fit_are_named(options: dict[str, Any], name: str) -> None:
    with pytest.raises(OptionError) as caught:
        DraftOptions(**options)
    assert caught.value.where == name


@pytest.mark.parametrize(
    ("plan", "steps", "name"),
    [
        (GradientPlan(active="last", active_steps=11), 10, "active_steps"),
        (PRESETS["drtune"], 2, "active_steps"),
        (GradientPlan(active="chosen", chosen_steps=(2, 10)), 10, "chosen_steps"),
        (
            GradientPlan(active="interval", active_steps=3, interval_start=0.8),
            10,
            "interval_start",
        ),
    ],
)
def test_more_active_steps_than_there_are_is_refused(
    plan: GradientPlan, steps: int, name: str
) -> None:
    with pytest.raises(OptionError) as caught:
        plan.check(steps)
    assert caught.value.where == name and str(steps) in caught.value.what
