"""The probe: pictures and held-out scores during training, always on the same noise."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.evaluation.probe import Probe
from diffusion_align.sampling.options import SamplingOptions

OPTIONS = EvaluationOptions(seeds=2, sample_prompts=3)
PROMPTS = ["a", "bb", "ccc", "never drawn"]


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


def test_step_zero_is_the_base_and_later_steps_share_its_noise(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    policy = fake_policy(shift=0.0)
    probe = Probe(policy, PROMPTS, rewards={"light": brightness()}, options=OPTIONS)
    probe.samples(0, tmp_path / "0")
    policy.shift = 0.5
    probe.samples(10, tmp_path / "10")
    policy.shift = 0.0
    probe.samples(20, tmp_path / "20")

    name = "p0001_s01.png"
    assert np.array_equal(pixels(tmp_path / "0" / name), pixels(tmp_path / "20" / name))
    assert not np.array_equal(pixels(tmp_path / "0" / name), pixels(tmp_path / "10" / name))
    assert all(torch.equal(noise, policy.start_noise[0]) for noise in policy.start_noise)
    assert policy.references == ["start"]  # the base is drawn once
    written = sorted(path.name for path in (tmp_path / "10").iterdir())
    pictures = [f"p{p:04d}_s{s:02d}.png" for p in range(3) for s in range(2)]
    assert written == ["grid.png", *pictures, "prompts.jsonl"]


@pytest.mark.parametrize(
    ("options", "steps", "guidance"),
    [(OPTIONS, 5, 3.0), (EvaluationOptions(seeds=1, steps=7, guidance_scale=4.0), 7, 4.0)],
)
def test_looks_are_drawn_as_in_training_unless_the_options_say_otherwise(
    fake_policy: Any, brightness: Any, options: EvaluationOptions, steps: int, guidance: float
) -> None:
    policy = fake_policy()
    seen: list[float] = []
    schedule, predict = policy.schedule, policy.predict

    def counted(count: int, **size: Any) -> Any:
        seen.append(count)
        return schedule(count, **size)

    def watched(*args: Any, guidance_scale: float) -> Any:
        seen.append(guidance_scale)
        return predict(*args, guidance_scale=guidance_scale)

    policy.schedule, policy.predict = counted, watched
    training = SamplingOptions(steps=5, guidance_scale=3.0)
    rewards = {"light": brightness()}
    Probe(policy, PROMPTS, rewards=rewards, options=options, sampling=training).scores(0)
    assert seen == [steps] + [guidance] * steps


def test_the_grid_shows_the_base_beside_every_step(fake_policy: Any, tmp_path: Path) -> None:
    policy = fake_policy(shift=0.0)
    probe = Probe(policy, PROMPTS[:1], rewards={}, options=EvaluationOptions(seeds=1))
    probe.samples(0, tmp_path / "0")
    at_start = pixels(tmp_path / "0" / "grid.png")
    policy.shift = 3.0
    probe.samples(5, tmp_path / "5")
    later = pixels(tmp_path / "5" / "grid.png")
    # Below the labels the left picture (base) is the same and the right one is not.
    height, middle = at_start.shape[0], at_start.shape[1] // 2
    changed = np.argwhere((at_start != later).any(axis=2))
    changed = changed[changed[:, 0] > height // 2]
    assert len(changed)
    assert changed[:, 1].min() > middle


def test_held_out_scores_are_means_of_the_drawn_pictures(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    policy = fake_policy(shift=0.3)
    probe = Probe(policy, PROMPTS, rewards={"light": brightness()}, options=OPTIONS)
    probe.samples(0, tmp_path)
    drawn = len(policy.start_noise)
    scores = probe.heldout(0)
    assert len(policy.start_noise) == drawn  # the pictures of the step are not drawn again
    files = [pixels(path) / 255 for path in tmp_path.glob("p*.png")]
    assert scores == {"light": pytest.approx(np.mean(files), abs=1e-6)}
    assert set(probe.heldout(1)) == {"light"}


def test_every_picture_has_its_score_and_is_scored_once_a_step(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    reward = brightness()
    probe = Probe(fake_policy(shift=0.3), PROMPTS, rewards={"light": reward}, options=OPTIONS)
    probe.samples(4, tmp_path)
    scores = probe.scores(4)["light"]
    assert scores.shape == (3, 2) and scores.dtype == np.float64
    for p, s in np.ndindex(3, 2):
        drawn = pixels(tmp_path / f"p{p:04d}_s{s:02d}.png") / 255
        assert scores[p, s] == pytest.approx(drawn.mean(), abs=1e-6)
    calls = len(reward.calls)
    assert probe.heldout(4) == {"light": pytest.approx(scores.mean())}
    assert len(reward.calls) == calls
    probe.heldout(5)
    assert len(reward.calls) > calls


def test_looks_at_an_unchanged_model_differ_by_nothing(fake_policy: Any, brightness: Any) -> None:
    """What makes the held-out guard's differences paired ones."""
    policy = fake_policy(shift=0.1)
    probe = Probe(policy, PROMPTS, rewards={"light": brightness()}, options=OPTIONS)
    first = probe.scores(0)["light"]
    policy.shift = 0.2
    assert (probe.scores(5)["light"] != first).all()
    policy.shift = 0.1
    assert np.array_equal(probe.scores(10)["light"], first)


def test_without_rewards_or_scores_there_is_nothing_to_log(
    fake_policy: Any, brightness: Any
) -> None:
    policy = fake_policy()
    assert Probe(policy, PROMPTS, rewards={}, options=OPTIONS).heldout(0) == {}
    policy.decode = lambda x: torch.full((len(x), 3, 16, 16), torch.nan)
    silent = Probe(policy, PROMPTS, rewards={"light": brightness()}, options=OPTIONS)
    assert silent.heldout(0) == {}
