"""What a person sees of a run."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from diffusion_align.reporting.console import Console, duration

ROW = {
    "step": 1.0,
    "iteration": 0.0,
    "reward/mean": 0.5,
    "reward/std": 0.1,
    "policy/clip_fraction": 0.25,
    "train/gradient_norm": 1.5,
}


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def begin(live: bool | None = None) -> tuple[Console, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    console = Console(stream, live=live, clock=clock)
    console.start(
        total=10, done=0, folder=Path("runs/x"), lines=["clip range 1e-4 [mean]"], baseline=None
    )
    return console, stream, clock


def test_without_a_terminal_every_step_is_one_plain_line() -> None:
    console, stream, clock = begin()
    for step in (1, 2):
        clock.now = 3.0 * step
        console.progress("sampling", 4, 8)
        console.step({**ROW, "step": step, "reward/mean": 0.4 + 0.1 * step})
    console.close()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["run folder runs/x", "clip range 1e-4 [mean]"]
    assert len(lines) == 4 and "\x1b" not in stream.getvalue()
    assert lines[3].startswith("step 2/10")
    assert "reward 0.6 ± 0.1 (+0.1 against step 0)" in lines[3]
    assert "clipped 0.25" in lines[3] and "gradient 1.5" in lines[3]
    assert "rate 3 s/step" in lines[3] and "ETA 0:24" in lines[3]


def test_a_resumed_run_keeps_its_baseline_and_held_out_scores_stay_in_sight() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.start(total=10, done=4, folder=Path("r"), lines=[], baseline=0.2)
    console.step({**ROW, "step": 5, "heldout/taste": 0.31})
    console.step({**ROW, "step": 6, "reward/invalid": 2.0})
    last = stream.getvalue().splitlines()[-1]
    assert "+0.3 against step 0" in last and "held-out taste 0.31" in last
    assert "failed rewards 2" in last


def test_held_out_scores_stand_against_their_own_step_0_also_after_a_restart() -> None:
    stream = io.StringIO()
    console = Console(stream)
    console.start(total=10, done=0, folder=Path("r"), lines=[], baseline=None)
    console.step({"step": 0, "iteration": 0, "heldout/taste": 0.5})
    console.step({**ROW, "step": 5, "heldout/taste": 0.45})
    resumed = Console(stream)
    resumed.start(
        total=10, done=5, folder=Path("r"), lines=[], baseline=0.2, heldout={"taste": 0.5}
    )
    resumed.step({**ROW, "step": 6, "heldout/taste": 0.6})
    first, fifth, _, sixth = stream.getvalue().splitlines()[1:]
    assert first.endswith("held-out taste 0.5")
    assert "held-out taste 0.45 (-0.05 against step 0)" in fifth
    assert "held-out taste 0.6 (+0.1 against step 0)" in sixth


def test_what_guards_see_stands_in_every_line_while_it_lasts() -> None:
    console, stream, _ = begin()
    console.step(ROW)
    ringing = {"guard/picture_change/edge_density": 3.0, "guard/ratio_drift/mean": 2.0}
    console.step({**ROW, "step": 2, **ringing})
    console.step({**ROW, "step": 3})
    before, during, after = stream.getvalue().splitlines()[-3:]
    assert "guards picture_change/edge_density, ratio_drift/mean" in during
    assert "guards" not in before and "guards" not in after


def test_the_live_screen_shows_the_phase_and_leaves_one_line() -> None:
    console, stream, _ = begin(live=True)
    console.progress("scoring", 3, 8)
    console.step(ROW)
    grid = console._screen()
    cells = [str(cell) for column in grid.columns for cell in column.cells]
    assert any("scoring 3/8" in cell for cell in cells)
    console.close()
    assert "step 1/10" in stream.getvalue()
    console.close()  # twice is harmless


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (75, "1:15"), (3700, "1:01:40"), (59.6, "1:00")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
