"""The rule about held-out rewards that rose and turned, on synthetic curves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import Guards

Curve = Callable[[int], float]


def guards(**options: Any) -> tuple[Guards, list[str]]:
    said: list[str] = []
    chosen = {"stop_when_heldout_falls": "stop", "stop_when_heldout_turns": "stop", **options}
    return Guards(GuardOptions(**chosen), say=said.append, trained_on=["trained"]), said


def told(
    seed: int,
    heldout: Curve,
    trained: Curve = lambda look: 0.2 * look,
    *,
    noise: float = 0.3,
    prompts: int = 8,
    count: int = 20,
) -> list[dict[str, np.ndarray]]:
    """Scores [P, 4] at each look: the same prompts and noise, and what learning adds to them.

    Single scores of step 0 have a standard deviation of 1; look 0 is step 0.
    """
    rng = np.random.default_rng(seed)
    base, judged = rng.normal(size=(2, prompts, 4))
    made = []
    for look in range(count):
        learnt = noise * rng.normal(size=(2, prompts, 4)) * (look > 0)
        made.append(
            {
                "trained": judged + trained(look) + learnt[0],
                "other": base + heldout(look) + learnt[1],
            }
        )
    return made


def ended(watch: Guards, scores: list[dict[str, np.ndarray]]) -> int | None:
    """The look at which the run ends."""
    for number, seen in enumerate(scores):
        watch.looked(10 * number, seen)
        if watch.ending is not None:
            return number
    return None


def hill(look: int) -> float:
    """Rises to 0.8 at look 8, and is back at 0 at look 16: the base is never undercut before."""
    return 0.1 * (look if look <= 8 else 16 - look)


@pytest.mark.parametrize("seed", range(10))
def test_a_reward_that_turned_ends_the_run_before_it_is_back_at_step_0(seed: int) -> None:
    watch, said = guards()
    at = ended(watch, told(seed, hill))
    assert at is not None and 10 <= at <= 15
    assert watch.ending is not None and "held-out other turned" in watch.ending
    assert f"held-out rewards were best at step {watch.best.step}" in watch.ending
    assert 60 <= watch.best.step <= 100
    assert len(said) == 1 and said[0].startswith(f"guard stop_when_heldout_turns: step {10 * at}:")


def test_the_older_rule_would_have_waited_until_it_undercut_step_0() -> None:
    for seed in range(10):
        watch, _ = guards(stop_when_heldout_turns="off")
        at = ended(watch, told(seed, hill))
        assert at is None or at > 16


def test_its_numbers_are_a_paired_t_test_against_the_best_look() -> None:
    scores = told(4, hill)
    watch, _ = guards()
    at = ended(watch, scores)
    assert at is not None and watch.ending is not None
    gains = [float((seen["other"] - scores[0]["other"]).mean()) for seen in scores[: at + 1]]
    peak = int(np.argmax(gains))
    change = (scores[at]["other"] - scores[peak]["other"]).mean(axis=1)
    low, high = stats.t.interval(1 - 0.05 / 20, len(change) - 1, change.mean(), stats.sem(change))
    deviation = change.mean() / scores[0]["other"].std(ddof=1)
    assert (
        f"after {scores[peak]['other'].mean():.4g} at step {10 * peak} ({change.mean():+.3g} "
        f"[{low:+.3g}, {high:+.3g}], {deviation:+.2g} standard" in watch.ending
    )


@pytest.mark.parametrize(
    ("heldout", "trained", "why"),
    [
        (hill, lambda look: 0.2 * min(look, 6), "the trained reward stands still since"),
        (hill, lambda look: 0.2 * (8 - abs(look - 8)), "the trained reward fell as well"),
        (lambda look: 0.1 * look, lambda look: 0.2 * look, "held-out rewards rise too"),
        (lambda look: 0.1 * min(look, 8), lambda look: 0.2 * look, "they rose and stay"),
        (
            lambda look: 0.8 - 0.15 * (look > 8) if look > 4 else 0.2 * look,
            lambda look: 0.2 * look,
            "a fall beyond doubt, but a small one",
        ),
    ],
)
def test_other_curves_do_not_end_it(heldout: Curve, trained: Curve, why: str) -> None:
    for seed in range(5):
        watch, said = guards(stop_when_heldout_falls="off")
        assert ended(watch, told(seed, heldout, trained, noise=0.02)) is None, why
        assert said == []


def test_one_low_look_is_not_enough() -> None:
    watch, _ = guards()
    assert ended(watch, told(0, lambda look: 0.1 * look - 2.0 * (look in (7, 12)))) is None


@pytest.mark.parametrize(("noise", "prompts"), [(1.0, 8), (0.3, 16)])
def test_noise_around_a_plateau_rarely_ends_a_run(noise: float, prompts: int) -> None:
    """100 runs of 20 looks in which the held-out reward rose at first and then only scatters.

    Against the best of all looks a plain 95 % interval would ring in very many of them.
    """
    ends = naive = 0
    for seed in range(100):
        scores = told(seed, lambda look: 0.5 * (look > 0), noise=noise, prompts=prompts)
        watch, _ = guards()
        ends += ended(watch, scores) is not None
        gains = [seen["other"].mean() for seen in scores]
        peak = scores[int(np.argmax(gains))]["other"]
        naive += any(
            stats.ttest_1samp((seen["other"] - peak).mean(1), 0, alternative="less")[1] < 0.025
            for seen in scores[int(np.argmax(gains)) + 1 :]
        )
    assert naive >= 20  # the noise is no trivial one
    assert ends <= 5


def test_a_restart_in_the_middle_changes_nothing() -> None:
    scores = told(2, hill)
    whole, said = guards()
    at = ended(whole, scores)
    assert at is not None
    for cut in (1, 5, at - 1, at):
        first, _ = guards()
        for number in range(cut):
            first.looked(10 * number, scores[number])
        second, again = guards()
        second.load_state_dict(first.state_dict())
        for number in range(cut, at + 1):
            second.looked(10 * number, scores[number])
        assert second.ending == whole.ending and again == said


def test_a_checkpoint_without_peaks_is_taken() -> None:
    scores = told(2, hill)
    first, _ = guards()
    for number in range(3):
        first.looked(10 * number, scores[number])
    state = first.state_dict()
    del state["heldout"]["peaks"], state["heldout"]["turns"]
    second, _ = guards()
    second.load_state_dict(state)
    assert second.best == first.best
    for number in range(3, 20):
        second.looked(10 * number, scores[number])
    assert second.ending is not None and "turned" in second.ending


def test_failed_scores_are_left_out_and_none_at_all_never_ends_it() -> None:
    scores = told(1, hill, noise=0.1)
    for seen in scores[9:]:
        seen["other"][0] = np.nan
    watch, _ = guards()
    assert ended(watch, scores) is not None
    for seen in scores[1:]:
        seen["other"][:] = np.nan
    watch, said = guards()
    assert ended(watch, scores) is None and said == []


def test_a_warning_says_it_and_goes_on() -> None:
    watch, said = guards(stop_when_heldout_turns="warn", stop_when_heldout_falls="off")
    assert ended(watch, told(0, hill, noise=0.05)) is None
    assert said and all("stop_when_heldout_turns" in line for line in said)
    assert any(name.startswith("guard/stop_when_heldout_turns/other") for name in watch.readings())
