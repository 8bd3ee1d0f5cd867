"""Each guard on numbers of known meaning: when it acts, what it says, and across a restart."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_align.errors import OptionError, UserError
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import Guards, GuardStop
from diffusion_align.training.guards.drift import Clip

FINE = {"reward/mean": 1.0, "reward/std": 0.5}


def guards(clip: Clip | None = None, **options: Any) -> tuple[Guards, list[str]]:
    said: list[str] = []
    return Guards(GuardOptions(**options), say=said.append, clip=clip), said


def parameter(gradient: float | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(2))
    made.grad = None if gradient is None else torch.full((2,), gradient)
    return made


def update(watch: Guards, step: int, norm: float = 1.0, **numbers: float) -> None:
    """One update with these metrics of the losses, and the end of its iteration."""
    named = {f"policy/{name}": value for name, value in numbers.items()}
    watch.gradient(norm, named, FINE, {"w": parameter(1.0)}, step)
    watch.updated({"w": parameter(1.0)}, step)


# --- options -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"equal_rewards": "halt"}, "must be one of stop, warn, off"),
        ({"not_finite": "warn"}, "must be one of stop, skip"),
        ({"equal_rewards_iterations": 0}, "must be at least 1"),
        ({"ratio_mean_limit": 0.0}, "must be above 0"),
        ({"kl_reference_limit": -1.0}, "must be above 0"),
        ({"kl_growth": 1.0}, "must be above 1"),
        ({"picture_change_share": 1.0}, "must lie in (0, 1)"),
        ({"heldout_looks": 0}, "must be at least 1"),
    ],
)
def test_values_out_of_range_are_named(change: dict[str, Any], said: str) -> None:
    with pytest.raises(OptionError) as caught:
        GuardOptions(**change)
    assert str(caught.value).startswith(f"{next(iter(change))}: must") and said in str(caught.value)


# --- rewards -----------------------------------------------------------------------------------


def test_equal_rewards_and_equal_advantages_have_their_own_advice() -> None:
    equal = {"reward/mean": 1.0, "reward/std": 0.0, "advantage/std": 0.0}
    zero = {"reward/mean": 0.5, "reward/std": 0.5, "advantage/std": 0.0}
    for metrics, where, advice in (
        (equal, "reward", "saturated"),
        (zero, "algorithm.advantages", "algorithm.advantages=global"),
    ):
        watch, _ = guards()
        watch.collected(metrics, 0)
        watch.collected(metrics, 1)
        with pytest.raises(UserError, match="3 iterations in a row") as caught:
            watch.collected(metrics, 2)
        assert caught.value.where == where and advice in caught.value.fix
        assert "guards.equal_rewards=warn" in caught.value.fix


def test_a_spread_in_between_starts_the_count_again() -> None:
    watch, _ = guards()
    for iteration, spread in enumerate((0.0, 0.0, 1.0, 0.0, 0.0)):
        watch.collected({"reward/std": 1.0, "advantage/std": spread}, iteration)
    with pytest.raises(GuardStop, match="3 iterations in a row"):
        watch.collected({"reward/std": 1.0, "advantage/std": 0.0}, 5)


@pytest.mark.parametrize("deviation", [0.0, 3e-9])
@pytest.mark.parametrize("advantage", [1.0, 1e-9, 0.0])
def test_equal_rewards_are_seen_behind_advantages_from_memory(
    deviation: float, advantage: float
) -> None:
    """A remembered mean makes advantages of equal rewards, if only by rounding."""
    metrics = {"reward/mean": 0.1, "reward/std": deviation, "advantage/std": advantage}
    watch, _ = guards(equal_rewards_iterations=2)
    watch.collected(metrics, 0)
    with pytest.raises(UserError, match=r"all rewards were equal \(0.1\) in 2 iterations"):
        watch.collected(metrics, 1)


def test_equal_weights_are_no_fault_and_none_at_all_is() -> None:
    rewards = {"reward/mean": 0.5, "reward/max": 0.9, "reward/std": 0.2}
    watch, _ = guards(equal_rewards_iterations=2)
    for iteration in range(5):
        watch.collected({**rewards, "weight/std": 0.0, "weight/positive": 1.0}, iteration)
    none = {**rewards, "weight/std": 0.0, "weight/positive": 0.0}
    watch.collected(none, 5)
    with pytest.raises(UserError, match="no sample had a weight in 2 iterations") as caught:
        watch.collected(none, 6)
    assert caught.value.where == "algorithm.threshold" and "0.9 at most" in caught.value.fix
    same = {"reward/mean": 0.5, "reward/std": 0.0, "weight/std": 0.0, "weight/positive": 1.0}
    watch.collected(same, 7)
    with pytest.raises(UserError, match="all rewards were equal"):
        watch.collected(same, 8)


def test_a_warning_comes_once_and_then_rarely() -> None:
    watch, said = guards(equal_rewards="warn")
    for iteration in range(2 + 120):
        watch.collected({"reward/mean": 0.0, "reward/std": 0.0}, iteration)
        assert bool(watch.readings()) == (iteration >= 2)
    assert len(said) == 3  # the 1st, the 10th, the 100th
    assert said[0].startswith("guard equal_rewards: reward: all rewards were equal (0.0) in 3 ")
    assert "told 10 times now" in said[1] and "\n" not in said[1]
    assert watch.readings() == {"guard/equal_rewards": 122.0}


def test_what_is_off_is_off() -> None:
    names = "equal_rewards no_gradient unreached ratio_drift kl_explosion gradient_spike"
    off = dict.fromkeys([*names.split(), "reward_collapse", "picture_change"], "off")
    watch, said = guards(Clip(1e-4, "mean"), kl_old_limit=1e-9, unreached_updates=1, **off)
    for step in range(1, 30):
        reward = {"reward/mean": -10.0 * step, "reward/std": float(step == 1)}
        watch.collected({**reward, "picture/saturation": 1 / step}, step)
        norm = 0.0 if step == 1 else 10.0**step
        numbers = {"policy/ratio": 2.0, "policy/ratio_deviation_max": 9.0, "policy/kl_old": norm}
        watch.gradient(norm, numbers, FINE, {"w": parameter(0.0)}, step)
        watch.updated({"w": parameter(0.0)}, step)
    assert said == [] and watch.readings() == {}


@pytest.mark.parametrize("start", [0.0, -20.0])
def test_a_collapse_is_found_in_the_iteration_in_which_the_running_median_says_so(
    start: float,
) -> None:
    rewards = start + np.concatenate([np.zeros(4), np.linspace(0, -3, 30)])
    below, expected = 0, None
    for iteration in range(len(rewards)):
        running = np.median(rewards[max(0, iteration - 4) : iteration + 1])
        below = below + 1 if running < start - 1.5 * 0.4 else 0
        if below == 4 and expected is None:
            expected = iteration
    assert expected is not None
    watch, _ = guards(reward_collapse_deviations=1.5, reward_collapse_iterations=4)
    with pytest.raises(GuardStop, match="running reward fell") as caught:
        for iteration, reward in enumerate(rewards):
            watch.collected({"reward/mean": reward, "reward/std": 0.4}, iteration)
    assert caught.value.where == f"iteration {expected}"
    assert "learning_rate" in caught.value.fix


def test_a_lucky_first_draw_of_prompts_is_no_collapse_and_a_collapse_still_is_one() -> None:
    """Iterations of four prompts scatter by 0.4 about a reward that stays, or falls by 3."""
    for seed in range(200):
        generator = np.random.default_rng(seed)
        rewards = 6.8 + 0.4 * generator.standard_normal(130)
        rewards[0] = 7.6  # two standard deviations above, and its own spread is small
        watch, said = guards()
        for iteration, reward in enumerate(rewards):
            watch.collected({"reward/mean": reward, "reward/std": 0.6}, iteration)
        assert said == []
        with pytest.raises(GuardStop, match="running reward fell") as caught:
            for iteration, reward in enumerate(rewards - 3.0, start=130):
                watch.collected({"reward/mean": reward, "reward/std": 0.6}, iteration)
        assert caught.value.where in {f"iteration {130 + late}" for late in range(12)}


def test_one_bad_iteration_is_no_collapse() -> None:
    watch, said = guards()
    for iteration in range(60):
        reward = -50.0 if iteration == 20 else 0.1 * math.sin(iteration)
        watch.collected({"reward/mean": reward, "reward/std": 3.0}, iteration)
    assert said == []


def test_pictures_that_lose_edges_and_colours_while_the_reward_rises_are_flagged() -> None:
    """The published case: edge density -60 %, entropy -54 %, reward up."""
    watch, said = guards()
    for iteration in range(40):
        share = min(1.0, iteration / 20)
        watch.collected(
            {
                "reward/mean": 0.5 + 0.3 * share,
                "reward/std": 0.1,
                "picture/edge_density": 0.20 * (1 - 0.60 * share),
                "picture/colour_entropy": 5.0 * (1 - 0.54 * share),
                "picture/saturation": 0.4,
                "picture/diversity": 0.25,
            },
            iteration,
        )
    first = [line for line in said if "told" not in line]
    assert len(first) == 2
    assert any("edge density" in line and "held-out rewards" in line for line in first)
    assert all("running reward went from 0.5 to 0." in line for line in first)
    assert set(watch.readings()) == {
        "guard/picture_change/edge_density",
        "guard/picture_change/colour_entropy",
    }
    strict, _ = guards(picture_change="stop")
    with pytest.raises(GuardStop, match=r"saturation of the samples went from 0.2 to 0.4\d* \(\+"):
        for iteration in range(40):
            strict.collected({**FINE, "picture/saturation": 0.2 + 0.01 * iteration}, iteration)


def test_a_statistic_near_zero_may_wander() -> None:
    watch, said = guards()
    for iteration in range(30):
        watch.collected({**FINE, "picture/edge_density": 0.001 + 0.0005 * iteration}, iteration)
    assert said == []


# --- gradients ---------------------------------------------------------------------------------


def test_zero_advantages_are_no_severed_gradient() -> None:
    zero = {"reward/std": 0.5, "advantage/std": 0.0}
    named = {"w": parameter(0.0)}
    guards()[0].gradient(0.0, {}, zero, named, 1)
    for metrics in ({**zero, "advantage/std": 1.0}, {}):
        with pytest.raises(GuardStop, match="no gradient reached"):
            guards()[0].gradient(0.0, {}, metrics, named, 1)
    with pytest.raises(GuardStop, match="no gradient reached"):
        guards()[0].gradient(0.0, {}, zero, {"w": parameter(None)}, 1)
    # Once something arrived, a zero is honest: everything was clipped.
    watch, _ = guards()
    watch.gradient(1.0, {}, FINE, {"w": parameter(1.0)}, 1)
    watch.gradient(0.0, {}, FINE, {"w": parameter(0.0)}, 2)


class Adapted(nn.Module):
    """Two LoRA branches, B A x, of which the second may be cut off from the output."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.frozen = torch.randn(4, 4, generator=generator)
        self.a1 = nn.Parameter(torch.randn(2, 4, generator=generator))
        self.b1 = nn.Parameter(torch.zeros(4, 2))
        self.a2 = nn.Parameter(torch.randn(2, 4, generator=generator))
        self.b2 = nn.Parameter(torch.zeros(4, 2))

    def loss(self, x: Tensor, cut: str) -> Tensor:
        second = x @ self.a2.T @ self.b2.T
        if cut == "detached":
            second = x @ self.a2.T.detach() @ self.b2.T
        if cut == "unused":
            second = torch.zeros_like(second)
        return (x @ self.frozen.T + x @ self.a1.T @ self.b1.T + second).square().mean()


@pytest.mark.parametrize(
    ("cut", "lost"), [("nowhere", []), ("detached", ["a2"]), ("unused", ["a2", "b2"])]
)
def test_an_adapter_that_never_gets_a_gradient_is_named(cut: str, lost: list[str]) -> None:
    """A has none at the first update of all, where B is zero; that alone is no fault."""
    model = Adapted()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    watch, said = guards(unreached_updates=4)
    for step in range(1, 8):
        optimizer.zero_grad()
        model.loss(torch.randn(8, 4, generator=torch.Generator().manual_seed(step)), cut).backward()
        named = dict(model.named_parameters())
        norm = float(
            nn.utils.get_total_norm([p.grad for p in named.values() if p.grad is not None])
        )
        watch.gradient(norm, {}, FINE, named, step)
        assert bool(said) == (bool(lost) and step >= 4)
        optimizer.step()
    if lost:
        assert len(said) == 1 and f"{len(lost)} of 4 trained tensors" in said[0]
        assert f"in 4 updates: {', '.join(lost)}." in said[0] and "step 4" in said[0]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_stops_with_the_metrics_that_are_not(value: float) -> None:
    watch, _ = guards()
    with pytest.raises(GuardStop, match=r"norm is (nan|inf); also not finite: loss") as caught:
        watch.gradient(value, {"loss": value, "other": 1.0}, FINE, {"w": parameter(1.0)}, 7)
    assert caught.value.where == "step 7" and "guards.not_finite=skip" in caught.value.fix


def test_skipped_updates_have_no_gradient_and_an_end() -> None:
    watch, said = guards(not_finite="skip")
    for step in range(1, 21):
        bad = parameter(math.nan)
        watch.gradient(math.nan, {}, FINE, {"w": bad}, step)
        assert bad.grad is None
    assert len(said) == 1
    with pytest.raises(GuardStop, match="21 updates in a row"):
        watch.gradient(math.nan, {}, FINE, {"w": parameter(math.nan)}, 21)
    # One sound update in between starts the count again.
    watch, _ = guards(not_finite="skip")
    for step in range(1, 60):
        norm = 1.0 if step % 20 == 0 else math.nan
        watch.gradient(norm, {}, FINE, {"w": parameter(1.0)}, step)


def test_an_fp16_scaler_may_look_for_its_scale() -> None:
    watch = Guards(scaled=True)
    for step in range(1, 21):
        held = parameter(math.inf)
        watch.gradient(math.inf, {}, FINE, {"w": held}, step)
        assert held.grad is not None  # the scaler leaves the update out by itself
    with pytest.raises(GuardStop, match="21 updates in a row"):
        watch.gradient(math.inf, {}, FINE, {"w": parameter(math.inf)}, 21)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_parameters_that_are_not_finite_are_named(value: float) -> None:
    lost = nn.Parameter(torch.tensor([1.0, value]))
    large = nn.Parameter(torch.full((4,), 1e30))  # finite, though the sum of its squares is not
    watch, _ = guards()
    watch.updated({"large": large}, 3)
    with pytest.raises(GuardStop, match=r"1 of 2 trained tensors .* \(first: lost\)"):
        watch.updated({"large": large, "lost": lost}, 4)


def test_spikes_are_counted_in_medians() -> None:
    drawn = np.random.default_rng(0).lognormal(sigma=0.8, size=200)
    drawn[[60, 61, 150]] *= 1e4
    expected = [
        step
        for step in range(10, 200)
        if drawn[step] > 30 * np.median(drawn[max(0, step - 50) : step])
    ]
    assert expected == [60, 61, 150]
    watch, said = guards()
    found = []
    for step, norm in enumerate(drawn):
        update(watch, step, norm=float(norm))
        found += [step] if watch.readings() else []
    assert found == expected and len(said) == 1
    assert "times the median of the last 50" in said[0] and "max_grad_norm" in said[0]


# --- drift -------------------------------------------------------------------------------------


@pytest.mark.parametrize("clip", [Clip(1e-4, "mean"), Clip(0.2, "nats")])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_ratio_is_judged_in_clip_ranges_whatever_the_unit(clip: Clip, sign: int) -> None:
    watch, _ = guards(clip, ratio_drift="stop", ratio_iterations=1)
    update(watch, 1, ratio=math.exp(sign * 2.9 * clip.range), ratio_deviation_max=0.0)
    with pytest.raises(GuardStop, match=r"mean ratio .* is 3.1 clip ranges away from 1") as caught:
        update(watch, 2, ratio=math.exp(sign * 3.1 * clip.range), ratio_deviation_max=0.0)
    assert f"clip range {clip.range:g} {clip.unit}" in caught.value.what
    assert "inner epochs" in caught.value.fix
    watch, _ = guards(clip, ratio_drift="stop", ratio_iterations=1)
    update(watch, 1, ratio=1.0, ratio_deviation_max=math.expm1(29 * clip.range))
    with pytest.raises(GuardStop, match=r"one sample and step .* is 31 clip ranges"):
        update(watch, 2, ratio=1.0, ratio_deviation_max=math.expm1(31 * clip.range))


def test_an_iteration_is_judged_by_the_mean_of_its_updates() -> None:
    clip = Clip(0.01, "nats")
    watch, _ = guards(clip, ratio_drift="stop", ratio_iterations=1)
    for step, ratio in enumerate((1.0, 1.0, 1.05), start=1):  # the mean is 1.017: 1.65 ranges
        watch.gradient(1.0, {"policy/ratio": ratio}, FINE, {"w": parameter(1.0)}, step)
    watch.updated({"w": parameter(1.0)}, 3)
    for step, ratio in enumerate((1.0, 1.1, 1.05), start=4):
        watch.gradient(1.0, {"policy/ratio": ratio}, FINE, {"w": parameter(1.0)}, step)
    with pytest.raises(GuardStop, match=r"is 4.88 clip ranges"):
        watch.updated({"w": parameter(1.0)}, 6)


def test_without_a_clip_range_no_ratio_is_judged() -> None:
    watch, said = guards(None)
    for step in range(1, 5):
        update(watch, step, ratio=50.0, ratio_deviation_max=100.0)
    assert said == []


def test_a_kl_that_multiplies_explodes_and_one_that_grows_as_a_square_does_not() -> None:
    watch, said = guards()
    for step in range(1, 40):  # what a policy that moves in a line does
        update(watch, step, kl_reference=1e-6 * step**2, kl_old=1e-7)
    assert said == []
    watch, said = guards(kl_explosion="stop")
    with pytest.raises(
        GuardStop, match="multiplied by 2 or more in each of 5 iterations"
    ) as caught:
        for step in range(1, 40):
            update(watch, step, kl_reference=1e-6 * 2.5 ** max(0, step - 10), kl_old=1e-7)
    assert caught.value.where == "step 15" and "kl_weight" in caught.value.fix


@pytest.mark.parametrize("name", ["kl_old", "kl_reference"])
def test_a_kl_above_its_limit_is_told(name: str) -> None:
    limit: dict[str, Any] = {f"{name}_limit": 0.1}
    watch, said = guards(**limit)
    update(watch, 1, **{name: 0.09})
    assert said == []
    update(watch, 2, **{name: math.nan})
    update(watch, 3, **{name: 0.2})
    assert len(said) == 1 and f"above guards.{name}_limit 0.1" in said[0]
