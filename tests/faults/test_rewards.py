"""Rewards that raise, hang or cannot score: named, and nothing that was learnt is lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from leftovers import differing, leftovers, sound_checkpoints
from small_runs import RUNS

SAID = 2
ASKING = sorted(name for name, run in RUNS.items() if run.asks_reward)


@pytest.mark.parametrize("mood", ["raises", "hangs"])
@pytest.mark.parametrize("name", ASKING)
def test_a_reward_that_fails_is_named_and_the_run_goes_on_later(
    name: str, mood: str, bench: Any, tmp_path: Path
) -> None:
    whole, _, _ = bench.uninterrupted(name)
    folder = tmp_path / "run"
    updates = RUNS[name].updates
    # Three calls an iteration: the second of the fourth, when a checkpoint of the second is there.
    ended = bench.run(name, folder, mood=mood, at=10)
    assert ended.status == SAID, ended.said
    assert "error: reward brightness, iteration 3: " in ended.said
    told = "ValueError: the scorer lost its mind" if mood == "raises" else "no answer within 0.4 s"
    assert told in ended.said
    # What the third iteration learnt was saved before the error ended the run.
    assert f"step {3 * updates} is saved" in ended.said and "go on with --resume" in ended.said
    assert list(sound_checkpoints(folder).values()) == [2 * updates, 3 * updates]
    ended = bench.run(name, folder)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


@pytest.mark.parametrize("name", ASKING)
def test_items_without_a_score_take_no_part_and_change_nothing_about_a_resume(
    name: str, bench: Any, tmp_path: Path
) -> None:
    whole, events, _ = bench.uninterrupted(name, mood="nan")
    invalid = [value for key, value in whole.items() if key.endswith("reward/invalid")]
    assert max(invalid) > 0
    finite = [value for key, value in whole.items() if key.startswith(("final/", "parameters/"))]
    assert all(value.isfinite().all() for value in finite)
    folder = tmp_path / "run"
    kill = {"deed": "kill", "name": "backward", "nth": events.count("backward") // 2 + 1}
    assert bench.run(name, folder, mood="nan", fault=kill).status == -signal.SIGKILL
    assert bench.run(name, folder, mood="nan").status == 0
    assert differing(whole, leftovers(folder)) == []
