"""The comparison: what is scored, what it is called, and when it warns."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion_align.data.prompts import Prompt
from diffusion_align.errors import UserError
from diffusion_align.evaluation.compare import compare, sampler_name
from diffusion_align.evaluation.comparison import Comparison
from diffusion_align.policy.families import FAMILIES
from diffusion_align.sampling.options import SamplingOptions

WORDS = [f"prompt {'x' * (p % 7)} {p}" for p in range(24)]


@pytest.fixture
def done(fake_policy: Any, brightness: Any, tmp_path: Path) -> Comparison:
    """24 prompts, 2 seeds; the tuned policy is brighter, the held-out reward likes it dark."""
    return compare(
        fake_policy(shift=0.5),
        WORDS,
        rewards={"light": brightness(), "dark": brightness(-1.0)},
        trained_on=["light"],
        seeds=2,
        output=tmp_path / "out",
        run_seed=3,
    )


def test_the_trained_reward_leads_and_is_marked_with_its_parts(done: Comparison) -> None:
    roles = {result.name: result.role for result in done.results}
    assert list(roles) == ["light", "light/red", "dark", "dark/red", "diversity"]
    assert roles["light"] == roles["light/red"] == "trained"
    assert roles["dark"] == roles["dark/red"] == "held-out"
    assert done.primary.name == "light"


def test_a_part_equal_to_its_whole_is_not_shown_twice(done: Comparison) -> None:
    assert "light/whole" not in [result.name for result in done.results]


def test_scores_are_those_of_the_written_pictures(done: Comparison) -> None:
    light = done.result("light")
    for side, table in (("base", light.base), ("tuned", light.tuned)):
        for p, s in ((0, 0), (5, 1), (23, 1)):
            with Image.open(done.picture(side, p, s)) as image:  # type: ignore[arg-type]
                pixels = np.asarray(image, dtype=np.float64) / 255
            assert table[p, s] == pytest.approx(pixels.mean(), abs=1e-6)


def test_a_trained_rise_beside_a_held_out_fall_raises_the_alarm(done: Comparison) -> None:
    assert done.result("light").paired.rose
    assert done.result("dark").paired.fell
    assert any("dark fell" in alarm for alarm in done.alarms)


def test_the_summary_has_the_agreed_shape(done: Comparison) -> None:
    summary = json.loads((done.folder / "summary.json").read_text(encoding="utf-8"))
    assert list(summary) == ["pairs", "prompts", "trained_on", "rewards"]
    assert (summary["pairs"], summary["prompts"], summary["trained_on"]) == (48, 24, ["light"])
    for entry in summary["rewards"].values():
        assert list(entry) == [
            "base",
            "tuned",
            "difference",
            "ci95",
            "win_rate",
            "win_rate_ci95",
        ]
    light = summary["rewards"]["light"]
    assert light["ci95"][0] < light["difference"] < light["ci95"][1]
    assert light["win_rate"] == 1.0


def test_the_csv_gives_back_every_score(done: Comparison) -> None:
    with (done.folder / "scores.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    light = [row for row in rows if row["reward"] == "light"]
    assert len(light) == 48
    row = light[2 * 5 + 1]
    assert (row["prompt"], row["prompt_index"], row["seed"]) == (WORDS[5], "5", "1")
    assert float(row["tuned"]) == done.result("light").tuned[5, 1]
    assert (done.folder / row["base_picture"]).is_file()
    diversity = [row for row in rows if row["reward"] == "diversity"]
    assert len(diversity) == 24
    assert {row["seed"] for row in diversity} == {""}


def test_batch_size_changes_nothing(fake_policy: Any, brightness: Any, tmp_path: Path) -> None:
    results = []
    for size in (1, 5, 64):
        found = compare(
            fake_policy(shift=0.2),
            WORDS[:4],
            rewards={"light": brightness()},
            seeds=3,
            sampling=SamplingOptions(eta=1.0, batch_size=size),
            output=tmp_path / str(size),
        )
        results.append(found.summary())
    assert results[0] == results[1] == results[2]


def test_an_untouched_policy_is_unchanged(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    found = compare(
        fake_policy(0.0), WORDS, rewards={"light": brightness()}, seeds=2, output=tmp_path
    )
    paired = found.result("light").paired
    assert (paired.difference, paired.ci95, paired.ties) == (0.0, (0.0, 0.0), 48)
    assert found.verdict == "Unchanged: every pair scores the same."


def test_a_base_of_its_own_gives_what_the_reference_gives(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    how: dict[str, Any] = {"rewards": {"light": brightness()}, "seeds": 2}
    tuned = fake_policy(shift=0.5)
    one = compare(fake_policy(shift=0.5), WORDS, output=tmp_path / "one", **how)
    two = compare(tuned, WORDS, base=fake_policy(0.0), output=tmp_path / "two", **how)
    assert two.summary() == one.summary()
    assert tuned.references == []


def test_both_models_are_sampled_as_the_base_is_meant_to_be(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    base, tuned = fake_policy(), fake_policy(shift=0.5)
    base.info = replace(base.info, name="the base", steps=2, guidance_scale=1.5)
    rewards = {"light": brightness()}
    found = compare(tuned, WORDS[:2], base=base, rewards=rewards, seeds=1, output=tmp_path)
    setup = found.setup
    assert (setup.model, setup.steps, setup.guidance_scale) == ("the base", 2, 1.5)


def test_models_that_cannot_share_noise_are_not_compared(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    other_family, other_shape = fake_policy(), fake_policy()
    other_family.family = FAMILIES[1]
    other_shape.latent_shape = lambda height, width: (16, 2, 2)
    for base, message in ((other_family, "is stable-diffusion-xl and"), (other_shape, "16, 2, 2")):
        tuned, rewards = fake_policy(), {"light": brightness()}
        with pytest.raises(UserError, match=message):
            compare(tuned, WORDS[:2], base=base, rewards=rewards, output=tmp_path / "out")
        assert not tuned.start_noise
        assert not (tmp_path / "out").exists()


def test_rewards_get_prompts_metadata_and_whole_groups(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    judge, plain = brightness(scope="group"), brightness()
    prompts = [Prompt("a", metadata={"id": 1}), Prompt("b"), Prompt("c")]
    compare(
        fake_policy(), prompts, rewards={"judge": judge, "plain": plain}, seeds=2, output=tmp_path
    )
    assert [words for _, words, _ in judge.calls[:3]] == [["a", "a"], ["b", "b"], ["c", "c"]]
    count, words, metadata = plain.calls[0]
    assert (count, words) == (6, ["a", "a", "b", "b", "c", "c"])
    assert metadata[:3] == [{"id": 1}, {"id": 1}, {}]


def test_a_picture_with_nan_is_left_out_of_every_score_and_counted(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    policy = fake_policy(shift=0.1)
    decode = policy.decode

    def broken(x_0: torch.Tensor) -> torch.Tensor:
        pixels: torch.Tensor = decode(x_0)
        pixels[0] = torch.nan
        return pixels

    policy.decode = broken
    found = compare(policy, WORDS[:3], rewards={"light": brightness()}, seeds=2, output=tmp_path)
    assert np.isnan(found.result("light").base[0, 0])
    assert found.result("light").paired.invalid == 1
    assert any("1 of 6 pairs could not be scored" in note for note in found.notes)
    # Prompt 0 has one picture left, which has no distance to any other.
    assert np.isnan(found.result("diversity").base[0, 0])


def test_the_notes_say_what_limits_the_evidence(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    found = compare(
        fake_policy(),
        WORDS[:3],
        rewards={"light": brightness()},
        trained_on=["light", "other"],
        training_prompts=WORDS[2:9],
        seeds=1,
        output=tmp_path,
    )
    text = "\n".join(found.notes)
    assert "Only 3 prompts" in text
    assert "1 of the 3 prompts were trained on" in text
    assert "No held-out reward" in text
    assert "diversity cannot be measured" in text
    assert "Trained on, but not scored here: other." in text
    assert "diversity" not in [result.name for result in found.results]


def test_progress_counts_every_picture_of_both_models(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    compare(
        fake_policy(),
        WORDS[:5],
        rewards={"light": brightness()},
        seeds=2,
        sampling=SamplingOptions(eta=0.0, batch_size=4),
        output=tmp_path,
        progress=lambda done, total: seen.append((done, total)),
    )
    assert [done for done, _ in seen] == [4, 8, 12, 16, 18, 20]
    assert {total for _, total in seen} == {20}


def test_an_earlier_comparison_is_replaced_only_when_asked(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    def run(prompts: list[str], **how: Any) -> Comparison:
        rewards = {"light": brightness()}
        return compare(fake_policy(), prompts, rewards=rewards, seeds=1, output=tmp_path, **how)

    run(WORDS[:5])
    (tmp_path / "pictures" / "base" / "mine.png").write_bytes(b"kept")
    with pytest.raises(UserError, match="already holds a comparison"):
        run(WORDS[:2])
    assert (tmp_path / "pictures" / "base" / "p0004_s00.png").exists()
    run(WORDS[:2], overwrite=True)
    left = sorted(path.name for path in (tmp_path / "pictures" / "base").iterdir())
    assert left == ["mine.png", "p0000_s00.png", "p0001_s00.png"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rewards": {}}, "at least one reward"),
        ({"prompts": []}, "there is no prompt"),
        ({"prompts": ["a", "a"]}, "duplicate prompts"),
        ({"seeds": 0}, "0 pictures per prompt"),
        ({"rewards": {"diversity": None}}, "cannot be called 'diversity'"),
        ({"rewards": {"a": None, "a/b": None}}, "'a/b' reads as a part"),
    ],
)
def test_bad_input_is_refused_before_anything_is_drawn(
    fake_policy: Any, brightness: Any, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    policy = fake_policy()
    how: dict[str, Any] = {
        "prompts": ["a"],
        "rewards": {"light": brightness()},
        "seeds": 1,
        "output": tmp_path / "out",
    }
    how |= change
    with pytest.raises(UserError, match=message):
        compare(policy, how.pop("prompts"), **how)
    assert not policy.start_noise
    assert not (tmp_path / "out").exists()


def test_a_fall_of_diversity_raises_the_alarm_and_parts_do_not(
    make_comparison: Callable[..., Comparison],
) -> None:
    rng = np.random.default_rng(0)
    base = rng.normal(size=(24, 2))
    up, down = base + 0.5 + 0.1 * rng.normal(size=base.shape), base - 0.5
    spread = (np.full((24, 1), 0.3), 0.2 + 0.01 * rng.normal(size=(24, 1)))
    found = make_comparison(
        {"won": (base, up), "other": (base, base), "other/part": (base, down)},
        trained_on=["won"],
        parts=["other/part"],
        diversity=spread,
    )
    assert len(found.alarms) == 1
    assert "more alike" in found.alarms[0]
    assert "of 24 prompts" in found.result("diversity").headline


def test_no_alarm_without_a_trained_rise(make_comparison: Callable[..., Comparison]) -> None:
    base = np.random.default_rng(0).normal(size=(24, 2))
    noise = np.random.default_rng(1).normal(size=base.shape)
    found = make_comparison(
        {"won": (base, base + noise), "other": (base, base - 1)}, trained_on=["won"]
    )
    assert found.alarms == ()


def test_samplers_are_named_with_what_matters() -> None:
    assert sampler_name("ddim", SamplingOptions(eta=0.0)) == "DDIM (eta 0)"
    assert sampler_name("flow", SamplingOptions(flow_kind="ode")) == "flow ODE"
    noisy = SamplingOptions(flow_kind="sde", noise_level=0.7)
    assert sampler_name("flow", noisy) == "flow SDE (noise level 0.7)"


def test_without_word_of_the_training_no_reward_is_called_held_out(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    rewards = {"light": brightness()}
    # the folder as text, as a person types it
    found = compare(fake_policy(0.5), WORDS, rewards=rewards, seeds=2, output=str(tmp_path / "a"))
    assert found.folder == tmp_path / "a"
    assert {result.role for result in found.results} == {"unknown", "diversity"}
    assert any("not known which rewards" in note for note in found.notes)
    assert not any("No held-out reward" in note for note in found.notes)
    assert found.alarms == ()
    assert found.summary()["trained_on"] == []
    told = compare(
        fake_policy(0.5), WORDS, rewards=rewards, trained_on=[], seeds=2, output=tmp_path / "b"
    )
    assert told.result("light").role == "held-out"
    assert not any("not known" in note for note in told.notes)


def test_no_prompt_is_a_formula_in_a_spreadsheet(
    fake_policy: Any, brightness: Any, tmp_path: Path
) -> None:
    nasty = ['=HYPERLINK("http://x","y")', "+1", "-1", "@SUM(A1)", "a = b"]
    compare(fake_policy(), nasty, rewards={"light": brightness()}, seeds=1, output=tmp_path)
    with (tmp_path / "scores.csv").open(encoding="utf-8", newline="") as file:
        written = {row["prompt"] for row in csv.DictReader(file)}
    assert written == {*(f"'{text}" for text in nasty[:4]), "a = b"}
