"""Guards across a restart, after a stop, and on several processes."""

from __future__ import annotations

import io
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.guards import Guards, GuardStop
from diffusion_align.training.guards.drift import Clip

FINE = {"reward/mean": 1.0, "reward/std": 0.5}


def parameter(gradient: float) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(2))
    made.grad = torch.full((2,), gradient)
    return made


def story(seed: int) -> list[dict[str, float]]:
    """Thirty iterations of a run in which much goes wrong."""
    draw = random.Random(seed)
    return [
        {
            "reward/mean": 1.0 - 0.05 * i * draw.random(),
            "reward/std": draw.choice([0.0, 0.1, 0.2]),
            "picture/edge_density": 0.3 / (1 + i * draw.random()),
            "picture/diversity": 0.2,
            "policy/ratio": 1 + 1e-3 * draw.random(),
            "policy/ratio_deviation_max": 1e-2 * draw.random(),
            "policy/kl_reference": 1e-6 * 2.2**i,
            "norm": draw.choice([1.0, 1.1, 0.9, 1e3]),
        }
        for i in range(30)
    ]


def live(watch: Guards, chapters: list[dict[str, float]], first: int) -> list[Any]:
    seen = []
    for i, numbers in enumerate(chapters, start=first):
        watch.collected(numbers, i)
        named = {"used": parameter(1.0), "unused": parameter(0.0)}
        watch.gradient(numbers["norm"], numbers, FINE, named, i + 1)
        watch.updated(named, i + 1)
        if i % 3 == 0:
            scores = np.arange(8.0).reshape(4, 2) * (1 - 0.03 * i) + (i % 2)
            watch.looked(i, {"trained": -scores, "other": scores})
        seen.append((watch.readings(), watch.best))
    return seen


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("cut", [1, 9, 10, 22])
def test_a_restart_changes_nothing(seed: int, cut: int) -> None:
    """Counts, baselines, what was said and what is best: through a file, as a checkpoint has it."""
    chapters = story(seed)
    options = {"equal_rewards": "warn", "reward_collapse": "warn", "unreached_updates": 12}
    clip = Clip(1e-4, "mean")

    def fresh(said: list[str]) -> Guards:
        made = GuardOptions(**options)  # type: ignore[arg-type]
        return Guards(made, say=said.append, clip=clip, trained_on=["trained"])

    expected: list[str] = []
    whole = fresh(expected)
    seen = live(whole, chapters, 0)
    said: list[str] = []
    early, late = fresh(said), fresh(said)
    before = live(early, chapters[:cut], 0)
    file = io.BytesIO()
    torch.save(early.state_dict(), file)
    file.seek(0)
    late.load_state_dict(torch.load(file, weights_only=True))
    assert before + live(late, chapters[cut:], cut) == seen
    assert said == expected and len(said) >= 4
    assert late.state_dict() == whole.state_dict()


def test_a_state_is_a_copy() -> None:
    watch = Guards()
    live(watch, story(0)[:2], 0)
    before = watch.state_dict()
    text = str(before)
    live(watch, story(0)[2:3], 2)
    assert str(before) == text


def test_after_a_stop_the_guard_counts_from_the_beginning() -> None:
    watch = Guards()
    equal = {"reward/std": 0.0}
    watch.collected(equal, 0)
    watch.collected(equal, 1)
    before = watch.state_dict()
    with pytest.raises(GuardStop) as caught:
        watch.collected(equal, 2)
    watch.load_state_dict(before)  # the iteration is rewound
    watch.forgive(caught.value)
    watch.collected(equal, 2)
    watch.collected(equal, 3)
    with pytest.raises(GuardStop):
        watch.collected(equal, 4)


@pytest.mark.slow
def test_sharded_parameters_are_judged_alike_on_all_processes(tmp_path: Path) -> None:
    """A gradient, or a NaN, that lies in one process's shard is known to both."""
    script = Path(__file__).with_name("guard_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    told = [process.communicate(timeout=300)[0] for process in ranks]
    for rank, text in enumerate(told):
        said, stopped = text.splitlines()
        assert "1 of 3 trained tensors" in said and ": 2.weight." in said
        assert stopped == f"{rank} stopped not_finite"
