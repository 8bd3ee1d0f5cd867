"""Ctrl-C once: the iteration's updates are finished and saved. Twice: it quits at once."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
from leftovers import differing, leftovers, sound_checkpoints
from small_runs import RUNS

from diffusion_align.algorithms import catalogue

STOPPED = 130
NAMES = catalogue.names()


@pytest.mark.parametrize("name", NAMES)
def test_ctrl_c_once_and_twice_and_the_run_goes_on_as_if_never_stopped(
    name: str, bench: Any, tmp_path: Path
) -> None:
    whole, _, _ = bench.uninterrupted(name)
    folder = tmp_path / "run"
    # Where iterations are of 2 updates the third falls into the second, which is finished.
    updates = RUNS[name].updates
    stopped = -(-3 // updates) * updates
    once = {"deed": "interrupt", "name": "update", "nth": 3}
    ended = bench.run(name, folder, fault=once)
    assert ended.status == STOPPED, ended.said
    assert "finishing this iteration's updates, then saving" in ended.said
    assert f"stopped at step {stopped}" in ended.said
    assert list(sound_checkpoints(folder).values())[-1] == stopped
    # Where nothing can be lost it stops at once: a collection is made again.
    collecting = "loading" if name == "reward" else "scoring"
    once = {"deed": "interrupt", "name": collecting, "nth": 3}
    ended = bench.run(name, folder, fault=once)
    assert ended.status == STOPPED and "finishing" not in ended.said, ended.said
    kept = sound_checkpoints(folder)
    # Twice: nothing is saved any more, and what was saved before is whole.
    twice = {"deed": "interrupt", "name": "backward", "nth": 2, "again": 2}
    ended = bench.run(name, folder, fault=twice)
    assert ended.status == STOPPED, ended.said
    assert "stopped at step" not in ended.said
    assert sound_checkpoints(folder) == kept
    ended = bench.run(name, folder)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


@pytest.mark.parametrize("name", NAMES)
def test_the_second_ctrl_c_may_fall_into_the_save(name: str, bench: Any, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = {"deed": "kill", "name": "rename step", "nth": 2}
    assert bench.run(name, folder, fault=first).status == -signal.SIGKILL
    kept = sound_checkpoints(folder)
    # From the first file written on every event is one of the save, but for progress on the way.
    twice = {"deed": "interrupt", "name": "write parameters.safetensors", "nth": 1, "again": 3}
    ended = bench.run(name, folder, fault=twice)
    assert ended.status == STOPPED, ended.said
    assert sound_checkpoints(folder) == kept


@pytest.mark.parametrize("name", NAMES[:1])
def test_weights_of_an_earlier_stop_are_never_taken_for_the_last_ones(
    name: str, bench: Any, tmp_path: Path
) -> None:
    """final/ is that of a Ctrl-C; then the run ends, but is killed before it renews final/."""
    whole, _, _ = bench.uninterrupted(name)
    folder = tmp_path / "run"
    once = {"deed": "interrupt", "name": "update", "nth": 3}
    assert bench.run(name, folder, fault=once).status == STOPPED
    late = {"deed": "kill", "name": "rename final", "nth": 1}
    assert bench.run(name, folder, fault=late).status == -signal.SIGKILL
    assert max(sound_checkpoints(folder).values()) == whole["step"]
    assert bench.run(name, folder).status == 0
    assert differing(whole, leftovers(folder)) == []
