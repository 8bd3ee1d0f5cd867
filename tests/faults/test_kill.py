"""A run that was killed and goes on is, bit for bit, the run that was never killed."""

from __future__ import annotations

import importlib.util
import random
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from leftovers import differing, leftovers, sound_checkpoints
from small_runs import RUNS

from diffusion_align.algorithms import catalogue

KILLED = -signal.SIGKILL
NAMES = catalogue.names()
KILLS = 20
CHECKPOINT_FILES = ("parameters.safetensors", "state.pt", "meta.json", "manifest.json")


def test_every_algorithm_has_a_small_run() -> None:
    """Whoever registers an algorithm adds a row, and all these tests are the new method's too."""
    assert sorted(RUNS) == NAMES


def anywhere(draw: random.Random, events: int) -> dict[str, Any]:
    """A moment drawn from the coming events; half of the kills come up to 30 ms after it."""
    delay = draw.choice([0.0, draw.uniform(0.0, 0.03)])
    return {"deed": "kill", "nth": draw.randint(1, max(1, events)), "delay": delay}


def in_a_save(draw: random.Random) -> dict[str, Any]:
    """In the middle of the second checkpoint that is written, at a file or at its rename."""
    name = draw.choice([*CHECKPOINT_FILES, ""])
    if name:
        return {"deed": "tear", "name": f"written {name}", "nth": 2}
    return {"deed": "kill", "name": "rename step", "nth": 2}


@pytest.mark.parametrize("name", NAMES)
def test_two_kills_leave_no_trace(name: str, bench: Any, tmp_path: Path) -> None:
    """One in the middle of writing a checkpoint, one at a moment drawn from all there are."""
    whole, events, _ = bench.uninterrupted(name)
    draw = random.Random(f"two kills of {name}")
    folder = tmp_path / "run"
    torn = {"deed": "tear", "name": f"written {draw.choice(CHECKPOINT_FILES)}", "nth": 2}
    assert bench.run(name, folder, fault=torn).status == KILLED
    assert list(sound_checkpoints(folder).values()) == [2 * RUNS[name].updates]
    fault = anywhere(draw, len(events) // 2)
    assert bench.run(name, folder, fault=fault).status == KILLED
    ended = bench.run(name, folder)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


@pytest.mark.parametrize("name", [name for name in NAMES if RUNS[name].looks])
def test_kills_around_the_best_weights_leave_no_trace(
    name: str, bench: Any, tmp_path: Path
) -> None:
    """In the middle of the second ones, at their rename, and with the checkpoint after it torn."""
    whole, _, _ = bench.uninterrupted(name)
    assert {key.split("/")[1] for key in whole if key.startswith("best/")} == {"step_000012"}
    folder = tmp_path / "run"
    for fault in (
        {"deed": "tear", "name": "written weights.pt", "nth": 2},
        {"deed": "kill", "name": "rename step", "nth": 1},
        {"deed": "tear", "name": "written manifest.json", "nth": 2},
    ):
        assert bench.run(name, folder, fault=fault).status == KILLED
    newest = max((folder / "checkpoints").glob("step_*"))
    (newest / "state.pt").write_bytes(b"damaged")  # the one before it counts, with its best weights
    ended = bench.run(name, folder)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


def test_a_run_with_other_noise_is_told_apart(bench: Any, tmp_path: Path) -> None:
    """The comparison of these tests sees one update with another learning rate."""
    whole, _, _ = bench.uninterrupted("ddpo")
    torn = {"deed": "kill", "name": "update", "nth": 15}
    assert bench.run("ddpo", tmp_path / "run", fault=torn).status == KILLED
    assert bench.run("ddpo", tmp_path / "run", learning_rate=1.0001e-2).status == 0
    found = differing(whole, leftovers(tmp_path / "run"))
    assert any(name.startswith("final/") for name in found)
    assert any(name.startswith("state/optimizer") for name in found)
    assert any(name.startswith("metrics/") for name in found)


@pytest.fixture(scope="module")
def pipeline(bench: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Stable Diffusion of random weights, saved; the server has loaded it once."""
    path = Path(__file__).parent.parent / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines_of_faults", path)
    assert spec is not None and spec.loader is not None
    tiny = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    folder = tmp_path_factory.mktemp("pipeline") / "sd"
    tiny.stable_diffusion(tiny.ddim()).save_pretrained(folder)
    bench.server.do("warm", str(folder))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_twenty_kills_leave_no_trace(
    name: str, bench: Any, pipeline: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain on a real network with LoRA: while it samples, learns, saves, and resumes."""
    about: dict[str, Any] = {"pipeline": pipeline if RUNS[name].asks_reward else None, "steps": 32}
    whole, events, seconds = bench.uninterrupted(name, **about)
    draw = random.Random(f"twenty kills of {name}")
    folder = tmp_path / "run"
    taken = 0.0
    for number in range(KILLS):
        kind = draw.choice(["anywhere", "anywhere", "anywhere", "save", "resume"])
        fault = anywhere(draw, 2 * len(events) // KILLS)
        if kind == "save":
            fault = in_a_save(draw)
        elif kind == "resume" and sound_checkpoints(folder):
            fault = {"deed": "kill", "name": "cut", "nth": 1, "delay": draw.uniform(0.0, 0.02)}
        ended = bench.run(name, folder, fault=fault, **about)
        assert ended.status == KILLED, f"kill {number} ({fault}): {ended}"
        sound_checkpoints(folder)  # what is visible is whole
        taken += ended.seconds
    ended = bench.run(name, folder, **about)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []
    with capsys.disabled():
        fell = Counter((tmp_path / "kills.txt").read_text(encoding="utf-8").splitlines())
        print(
            f"\n{name}: {KILLS} kills, {len(whole)} values the same bits; "
            f"{seconds:.1f} s without a stop, {taken + ended.seconds:.1f} s with: {dict(fell)}"
        )
