"""The held-out rule: paired with step 0, not stopped by noise, stopped by a real fall."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import Guards

Scores = dict[str, np.ndarray]


def guards(**options: Any) -> tuple[Guards, list[str]]:
    said: list[str] = []
    chosen = {"stop_when_heldout_falls": "stop", **options}
    made = GuardOptions(**chosen)
    return Guards(made, say=said.append, trained_on=["trained", "term of it"]), said


def looks(
    seed: int,
    fall: float,
    rise: float,
    *,
    prompts: int = 8,
    count: int = 6,
    noise: float = 0.5,
) -> list[Scores]:
    """Prompts that differ much, the same noise at every look, and noise of what was learnt."""
    rng = np.random.default_rng(seed)
    base = rng.normal(size=(prompts, 1)) * 3 + rng.normal(size=(prompts, 4))
    told = []
    for look in range(count):
        learnt = rng.normal(size=(prompts, 4)) * noise * (look > 0)
        told.append({"trained": base + rise * look, "other": base - fall * look + learnt})
    return told


def test_a_fall_beside_a_rise_ends_the_run_at_the_second_look() -> None:
    watch, said = guards()
    for number, scores in enumerate(looks(0, fall=1.0, rise=1.0)[:3]):
        assert watch.ending is None
        watch.looked(10 * number, scores)
    assert watch.ending is not None and "held-out other fell" in watch.ending
    assert "2 looks in a row" in watch.ending and "no look had better" in watch.ending
    assert len(said) == 1 and "step 20" in said[0] and "kl_weight" in said[0]


def test_its_numbers_are_those_of_a_paired_t_test_on_prompt_means() -> None:
    told = looks(3, fall=1.0, rise=1.0)
    watch, _ = guards()
    for number in range(3):
        watch.looked(number, told[number])
    differences = (told[2]["other"] - told[0]["other"]).mean(axis=1)
    low, high = stats.t.interval(
        0.95, len(differences) - 1, differences.mean(), stats.sem(differences)
    )
    effect = differences.mean() / told[0]["other"].std(ddof=1)
    assert watch.ending is not None
    assert f"({differences.mean():+.3g} [{low:+.3g}, {high:+.3g}], {effect:+.2g} " in watch.ending


@pytest.mark.parametrize(
    ("fall", "rise", "noise", "why"),
    [
        (1.0, -1.0, 0.5, "the trained reward fell as well: that is no hacking"),
        (-1.0, 1.0, 0.5, "held-out rewards rose too"),
        (0.05, 1.0, 0.01, "a fall beyond doubt, but a small one"),
    ],
)
def test_other_ways_do_not_end_it(fall: float, rise: float, noise: float, why: str) -> None:
    watch, said = guards()
    for number, scores in enumerate(looks(1, fall, rise, noise=noise)):
        watch.looked(number, scores)
    assert watch.ending is None and said == [], why


def test_one_look_is_not_enough_and_rewards_are_counted_apart() -> None:
    """Held-out `a` falls at odd looks and `b` at even ones: neither does twice in a row."""
    watch, _ = guards()
    rng = np.random.default_rng(0)
    base = rng.normal(size=(8, 4))
    for look in range(12):
        noise = 0.1 * rng.normal(size=(8, 4))
        odd = 2.0 * (look % 2)
        a, b = base - odd + noise, base - (2.0 - odd) * (look > 0) + noise
        watch.looked(look, {"trained": base + look, "a": a, "b": b})
    assert watch.ending is None


def test_terms_of_the_trained_reward_are_no_witnesses() -> None:
    watch, _ = guards()
    for number, scores in enumerate(looks(0, fall=1.0, rise=1.0)):
        watch.looked(number, {"trained": scores["trained"], "term of it": scores["other"]})
    assert watch.ending is None and watch.best.step == 0


def test_noise_alone_rarely_ends_a_run() -> None:
    """800 looks at a model whose held-out score did not change, under paired noise of one sd.

    A single look is beyond its one-sided 2.5 % bound about 20 times; two in a row, which end a run,
    are expected half a time in all.
    """
    ended = single = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        base = rng.normal(size=(8, 4))
        noise = rng.normal(size=(21, 8, 4))
        means = noise[1:].mean(axis=2)
        single += int((stats.ttest_1samp(means, 0, axis=1, alternative="less")[1] < 0.025).sum())
        watch, _ = guards()
        for look in range(21):
            other = base + noise[look] * (look > 0)
            watch.looked(look, {"trained": base + (look > 0), "other": other})
        ended += watch.ending is not None
    assert single >= 10  # the noise is no trivial one
    assert ended <= 2


def test_one_prompt_or_failed_scores_never_end_it() -> None:
    watch, _ = guards()
    for number, scores in enumerate(looks(0, fall=1.0, rise=1.0, prompts=1)):
        watch.looked(number, scores)
    assert watch.ending is None
    watch, _ = guards()
    for number, scores in enumerate(looks(0, fall=1.0, rise=1.0)):
        watch.looked(number, {**scores, "other": np.full_like(scores["other"], np.nan)})
    assert watch.ending is None and watch.best.step == 0


def test_without_scores_of_the_trained_reward_its_running_value_counts() -> None:
    for rises, ends in ((True, True), (False, False)):
        watch, _ = guards(reward_collapse="off")
        for number, scores in enumerate(looks(0, fall=1.0, rise=1.0)):
            mean = 1.0 + 0.1 * number * (1 if rises else -1)
            watch.collected({"reward/mean": mean, "reward/std": 1.0}, number)
            watch.looked(number, {"other": scores["other"]})
        assert (watch.ending is not None) == ends


def test_the_best_look_is_the_best_mean_in_deviations_of_step_0() -> None:
    rng = np.random.default_rng(0)
    base = {"a": rng.normal(size=(6, 3)), "b": 100 * rng.normal(size=(6, 3))}
    moves = [(0.0, 0.0), (0.5, 10.0), (-0.2, 90.0), (0.6, 30.0), (0.7, -100.0)]
    watch, _ = guards()
    kept = []
    for step, (a, b) in enumerate(moves):
        scores = {"trained": base["a"], "a": base["a"] + a, "b": base["b"] + b}
        kept += [step] if watch.looked(step, scores) else []
    sd = {name: values.std(ddof=1) for name, values in base.items()}
    score = [(a / sd["a"] + b / sd["b"]) / 2 for a, b in moves]
    best = [step for step in range(1, 5) if score[step] > max(0.0, *score[:step])]
    assert kept == best and watch.best.step == int(np.argmax(score))
    assert watch.best.score == pytest.approx(max(score))
    watch, _ = guards(keep_best=False)
    assert not any(watch.looked(s, {"a": base["a"] + m[0]}) for s, m in enumerate(moves))


def test_a_warning_says_it_and_goes_on() -> None:
    watch, said = guards(stop_when_heldout_falls="warn")
    for number, scores in enumerate(looks(0, fall=1.0, rise=1.0)):
        watch.looked(number, scores)
    assert watch.ending is None and len(said) == 1
    assert watch.readings() == {"guard/stop_when_heldout_falls/other": 5.0}


def test_pictures_that_are_not_those_of_step_0_are_not_compared() -> None:
    watch, _ = guards()
    watch.looked(0, looks(0, 1.0, 1.0)[0])
    for number, scores in enumerate(looks(0, 1.0, 1.0, prompts=5)[1:], start=1):
        watch.looked(number, scores)
    assert watch.ending is None
