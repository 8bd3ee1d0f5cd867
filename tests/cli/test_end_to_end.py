"""From a config to a report, through every command, on a small random model."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Call = Callable[..., Any]


@pytest.fixture(scope="module")
def config(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "mine.yaml"
    path.write_text(
        f"""\
model:
  id: {model}
  device: cpu
lora:
  rank: 2
prompts:
  source: [a cat, a dog, a cow, a fox]
sampling:
  steps: 4
  batch_size: 4
reward: compressibility
algorithm:
  name: ddpo
  prompts_per_iteration: 2
  samples_per_prompt: 2
  train_batch_size: 2
  advantages: group
train:
  steps: 4
  learning_rate: 1e-2
  checkpoint_every: 1
  sample_every: 2
evaluation:
  prompts: [a bird, a fish]
  seeds: 2
  sample_prompts: 2
  rewards: [incompressibility]
""",
        encoding="utf-8",
    )
    return path


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    from typer.testing import CliRunner

    from diffusion_align.cli import app

    folder = tmp_path_factory.mktemp("runs") / "mine"
    done = CliRunner().invoke(app, ["train", str(config), "--output", str(folder)])
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert str(folder / "final") in done.stdout
    assert f"report: {folder / 'final' / 'report.html'}" in done.stdout
    return folder


def test_a_run_folder_holds_what_was_promised(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "reward/mean" in rows[1]
    assert "heldout/incompressibility" in rows[0]
    for name in ("config.yaml", "env.json", "samples/step_000000/grid.png", "final/report.html"):
        assert (run / name).exists(), name
    summary = json.loads((run / "final" / "summary.json").read_text())
    assert (summary["trained_on"], summary["pairs"]) == (["compressibility"], 4)


def test_the_recorded_config_is_the_resolved_one(run: Path, config: Path) -> None:
    from diffusion_align.config import differences, load_config

    recorded = load_config(run / "config.yaml")
    assert differences(recorded, load_config(config, [f"output={run}"])) == []


def test_resuming_a_finished_run_adds_nothing(run: Path, call: Call) -> None:
    files = [run / "metrics.jsonl", run / "final" / "report.html", run / "final" / "grid.png"]
    before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files[:2]]
    done = call("train", run / "config.yaml", "--resume")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert f"report: {files[1]}" in done.stdout
    assert [path.read_bytes() for path in files[:2]] == [content for content, _ in before]
    assert files[1].stat().st_mtime_ns == before[1][1]


def test_a_tuned_model_is_drawn_as_its_run_was_evaluated_and_options_win(
    run: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_align.assemble.pictures import Drawing, run_of
    from diffusion_align.config import load_config
    from diffusion_align.policy.tuned import find_tuned

    changes = ["sampling.guidance_scale=3.5", "evaluation.eta=0.5", "model.dtype=bfloat16"]
    changed = load_config(run / "config.yaml", [*changes, "model.revision=abc"])
    drawn = Drawing().sampling(changed)
    assert (drawn.steps, drawn.guidance_scale, drawn.eta) == (4, 3.5, 0.5)
    given = Drawing(steps=9, guidance_scale=1.0, eta=0.0, dtype="float32")
    won = given.sampling(changed)
    assert (won.steps, won.guidance_scale, won.eta) == (9, 1.0, 0.0)
    assert Drawing().loading(str(model), changed)["dtype"] == "bfloat16"
    assert Drawing().loading(str(model), changed)["revision"] == "abc"
    assert Drawing().loading("another", changed)["revision"] is None
    assert given.loading(str(model), changed)["dtype"] == "float32"
    bare = Drawing().sampling(None)
    assert (bare.steps, bare.guidance_scale, bare.eta) == (None, None, 0.0)
    assert run_of(find_tuned(run)) == load_config(run / "config.yaml")


def test_sampling_gives_the_pictures_of_the_runs_own_report(
    run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a bird\na fish\n", encoding="utf-8")
    words = ("sample", model, "--lora", run, "--prompts", prompts, "--seeds", 2, "--out")
    done = call(*words, tmp_path / "o", "--batch-size", 32)
    assert done.exit_code == 0, (done.stderr, done.exception)
    for path in (run / "final" / "pictures" / "tuned").iterdir():
        assert (tmp_path / "o" / path.name).read_bytes() == path.read_bytes()
    # Pictures are replaced only when asked, and then none of the earlier ones stays.
    prompts.write_text("a bird\n", encoding="utf-8")
    refused = call(*words, tmp_path / "o")
    assert refused.exit_code == 2
    assert "not empty" in refused.stderr
    assert len(list((tmp_path / "o").glob("*.png"))) == 4
    (tmp_path / "o" / "mine.txt").touch()
    assert call(*words, tmp_path / "o", "--overwrite").exit_code == 0
    left = sorted(path.name for path in (tmp_path / "o").iterdir())
    assert left == ["mine.txt", "p0000_s00.png", "p0000_s01.png", "prompts.jsonl"]


def test_a_run_that_was_asked_not_to_compare_has_no_report(
    config: Path, call: Call, tmp_path: Path
) -> None:
    short = ("train.steps=1", "train.sample_every=0", "--output", tmp_path / "r")
    done = call("train", config, "--no-compare", *short)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "the tuned model: " in done.stdout
    assert "report" not in done.stdout
    assert not (tmp_path / "r" / "final" / "report.html").exists()


def test_a_lora_without_a_run_has_no_reward_that_is_called_held_out(
    run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((run / "final" / "pytorch_lora_weights.safetensors").read_bytes())
    done = call(
        *("compare", model, "--tuned", alone, "--prompts", "small-world:heldout:1", "--steps", 1),
        *("--seeds", 1, "--reward", "compressibility", "--out", tmp_path / "c"),
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "not known which rewards" in done.stdout
    assert "held-out" not in done.stdout
    assert "held out" not in (tmp_path / "c" / "report.html").read_text(encoding="utf-8")


def test_the_tuned_model_draws_other_pictures_than_its_base(
    run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a bird\na fish\n", encoding="utf-8")
    common = ("--prompts", prompts, "--seeds", 2, "--steps", 4)
    plain = call("sample", model, *common, "--out", tmp_path / "base")
    assert plain.exit_code == 0, (plain.stderr, plain.exception)
    tuned = call("sample", model, *common, "--out", tmp_path / "tuned", "--lora", run)
    assert tuned.exit_code == 0, (tuned.stderr, tuned.exception)
    names = sorted(path.name for path in (tmp_path / "base").glob("*.png"))
    assert len(names) == 4
    for name in names:
        base = (tmp_path / "base" / name).read_bytes()
        assert base != (tmp_path / "tuned" / name).read_bytes()
    rows = [json.loads(line) for line in (tmp_path / "base" / "prompts.jsonl").open()]
    assert {row["path"] for row in rows} == set(names)
    # what `sample` writes, `score` reads
    scored = call(
        *("score", tmp_path / "base", "--prompts", tmp_path / "base" / "prompts.jsonl"),
        *("--reward", "compressibility", "--out", tmp_path / "s.jsonl"),
    )
    assert scored.exit_code == 0, (scored.stderr, scored.exception)
    first = json.loads((tmp_path / "s.jsonl").read_text().splitlines()[0])
    assert first["prompt"] == "a bird"


def test_compare_reports_base_against_tuned_and_knows_what_was_trained_on(
    run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    words = ("compare", model, "--tuned", run, "--prompts", "animals", "--seeds", 2)
    rewards = ("--reward", "compressibility,incompressibility")
    done = call(*words, *rewards, "--out", tmp_path / "c", "--steps", 2)
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert f"report: {tmp_path / 'c' / 'report.html'}" in done.stdout
    summary = json.loads((tmp_path / "c" / "summary.json").read_text())
    assert summary["trained_on"] == ["compressibility"]
    assert summary["pairs"] == 2 * summary["prompts"]
    # base and tuned are really two models
    assert summary["rewards"]["compressibility"]["difference"] != 0
    again = call(*words, *rewards, "--out", tmp_path / "c", "--steps", 2)
    assert again.exit_code == 2
    assert "already holds a comparison" in again.stderr


def test_compare_asks_what_was_trained_on_where_the_run_cannot_tell(
    run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    moved = tmp_path / "moved"
    (moved / "final").mkdir(parents=True)
    for file in (run / "final").glob("*.safetensors"):
        (moved / "final" / file.name).write_bytes(file.read_bytes())
    text = (run / "config.yaml").read_text(encoding="utf-8")
    text = text.replace("[a cat, a dog, a cow, a fox]", "gone.txt")
    (moved / "config.yaml").write_text(text, encoding="utf-8")
    words = ("compare", model, "--tuned", moved, "--prompts", "animals", "--seeds", 1)
    rest = ("--reward", "compressibility", "--steps", 1, "--out", tmp_path / "c")
    done = call(*words, *rest)
    assert done.exit_code == 2
    assert "gone.txt: no such prompt file" in done.stderr
    assert "--trained-on" in done.stderr
    done = call(*words, *rest, "--trained-on", "compressibility")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "drawn with the model's own settings" in done.stderr


@pytest.fixture(scope="module")
def full(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that trained every weight of the denoiser."""
    from typer.testing import CliRunner

    from diffusion_align.cli import app

    folder = tmp_path_factory.mktemp("runs") / "full"
    short = ("lora=null", "train.steps=1", "train.sample_every=0", "sampling.steps=2")
    done = CliRunner().invoke(app, ["train", str(config), *short, "--output", str(folder)])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return folder


def test_a_fully_tuned_model_is_compared_with_the_base_on_the_same_noise(
    full: Path, run: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    words = ("--prompts", "animals", "--seeds", 1, "--steps", 2, "--reward", "compressibility")
    for name, tuned in (("full", full), ("lora", run)):
        done = call("compare", model, "--tuned", tuned, *words, "--out", tmp_path / name)
        assert done.exit_code == 0, (done.stderr, done.exception)
    summary = json.loads((tmp_path / "full" / "summary.json").read_text())
    assert summary["trained_on"] == ["compressibility"]
    assert summary["rewards"]["compressibility"]["difference"] != 0
    # The base is the same model on the same noise, whatever it is compared with, to the pixel.
    for name in ("p0000_s00.png", "p0044_s00.png"):
        pictures = [
            (tmp_path / kind / "pictures" / "base" / name).read_bytes() for kind in ("full", "lora")
        ]
        assert pictures[0] == pictures[1]


def test_a_fully_tuned_model_is_sampled_as_its_base_is(
    full: Path, model: Path, call: Call, tmp_path: Path
) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a bird\na fish\n", encoding="utf-8")
    common = ("--prompts", prompts, "--steps", 2)
    for name, words in (
        ("base", ()),
        ("run", ("--lora", full)),
        ("final", ("--lora", full / "final")),
    ):
        done = call("sample", model, *common, *words, "--out", tmp_path / name)
        assert done.exit_code == 0, (done.stderr, done.exception)
    files = {
        name: (tmp_path / name / "p0001_s00.png").read_bytes() for name in ("base", "run", "final")
    }
    assert files["run"] == files["final"]
    assert files["run"] != files["base"]


def test_a_whole_model_is_sampled_with_the_settings_of_the_model_it_comes_from(
    full: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_align.assemble import load_tuned
    from diffusion_align.errors import UserError
    from diffusion_align.policy import catalogue
    from diffusion_align.policy.tuned import find_tuned

    info = dataclasses.replace(catalogue.MODELS["tiny-sd"], steps=7, guidance_scale=2.5)
    monkeypatch.setitem(catalogue.MODELS, "tiny-sd", info)
    loaded = load_tuned("tiny-sd", find_tuned(full), "cpu").info
    assert (loaded.steps, loaded.guidance_scale, loaded.height) == (7, 2.5, 32)
    with pytest.raises(UserError, match="a whole stable-diffusion model, but sdxl is"):
        load_tuned("sdxl", find_tuned(full), "cpu")


def test_the_demo_trains_compares_and_ends_with_its_report(
    model: Path, call: Call, tmp_path: Path
) -> None:
    # The demo's own config on the random model: two updates, so that only the path is tested.
    done = call(
        *("demo", "--out", tmp_path / "demo", f"model.id={model}", "model.device=cpu"),
        *(
            "reward=compressibility",
            "evaluation.rewards=incompressibility",
            "prompts.source=animals",
        ),
        *("evaluation.prompts=[a, b]", "evaluation.seeds=2", "sampling.steps=3", "train.steps=1"),
        *("algorithm.prompts_per_iteration=2", "algorithm.samples_per_prompt=2"),
        *("algorithm.train_batch_size=4", "evaluation.sample_prompts=1"),
    )
    assert done.exit_code == 0, (done.stderr, done.exception)
    final = tmp_path / "demo" / "final"
    report = Path(done.stdout.split("report: ")[1].strip())
    assert report == final / "report.html"
    assert "compressibility" in report.read_text(encoding="utf-8")
    assert json.loads((final / "summary.json").read_text())["trained_on"] == ["compressibility"]
    # The report lies beside the model it is about, and what reads the one is not led astray by it.
    for number, tuned in enumerate((tmp_path / "demo", final)):
        sampled = call(
            *("sample", model, "--lora", tuned, "--prompts", "small-world:heldout:1"),
            *("--steps", 2, "--out", tmp_path / f"pictures-{number}"),
        )
        assert sampled.exit_code == 0, (sampled.stderr, sampled.exception)
    compared = call(
        *("compare", model, "--tuned", tmp_path / "demo", "--prompts", "small-world:heldout:1"),
        *("--seeds", 1, "--steps", 2, "--reward", "compressibility", "--out", tmp_path / "c"),
    )
    assert compared.exit_code == 0, (compared.stderr, compared.exception)
    assert json.loads((tmp_path / "c" / "summary.json").read_text())["trained_on"] == [
        "compressibility"
    ]
    # Going on leaves no report of the model as it was before.
    words = ("train", tmp_path / "demo" / "config.yaml", "--resume", "train.steps=2")
    longer = call(*words, "--no-compare")
    assert longer.exit_code == 0, (longer.stderr, longer.exception)
    assert (final / "pytorch_lora_weights.safetensors").is_file()
    assert not report.exists()
    # What a comparison lacks is made up for when it is asked for, without any training.
    again = call(*words, "evaluation.report=true", "evaluation.seeds=1")
    assert again.exit_code == 0, (again.stderr, again.exception)
    assert json.loads((final / "summary.json").read_text())["pairs"] == 2
