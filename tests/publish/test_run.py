"""From a config to the hub, through the command line: LoRA, merged model, whole model, reward."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import reward_models
from diffusion_align.publish.signature import is_untouched

Call = Callable[..., Any]
TOKEN = "hf_canaryCanaryCanaryCanary0123456789"


@pytest.fixture(scope="module")
def config(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "mine.yaml"
    path.write_text(
        f"""\
model:
  id: {folders["sd"]}
  device: cpu
lora:
  rank: 2
  alpha: 6
prompts:
  source: [a cat | <b>bold</b>, a dog, a cow, a fox]
sampling:
  steps: 3
  guidance_scale: 2.0
  batch_size: 8
reward: compressibility
algorithm:
  name: ddpo
  prompts_per_iteration: 2
  samples_per_prompt: 2
  train_batch_size: 4
  advantages: group
train:
  steps: 2
  learning_rate: 1e-2
  sample_every: 0
evaluation:
  prompts: [a bird, a fish]
  seeds: 2
  sample_prompts: 1
  rewards: [incompressibility]
""",
        encoding="utf-8",
    )
    return path


def trained(config: Path, folder: Path, *words: str) -> Path:
    from typer.testing import CliRunner

    from diffusion_align.cli import app

    done = CliRunner().invoke(app, ["train", str(config), "--output", str(folder), *words])
    assert done.exit_code == 0, (done.stderr, done.exception)
    return folder


@pytest.fixture(scope="module")
def run(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(config, tmp_path_factory.mktemp("runs") / "mine")


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run that a test may change."""
    return Path(shutil.copytree(run, tmp_path / "mine"))


def test_a_run_ends_with_both_layouts_a_checked_card_and_its_numbers(run: Path) -> None:
    final = run / "final"
    names = {path.name for path in final.iterdir() if path.is_file()}
    assert names == {
        *("pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", "README.md"),
        *("report.html", "summary.json", "scores.csv", "grid.png"),
    }
    text = (final / "README.md").read_text(encoding="utf-8")
    assert is_untouched(final / "README.md")
    assert "the same pictures" in text and "of the ComfyUI file" in text
    assert "a cat &#124; &#60;b&#62;bold" in text and str(run.parent) not in text
    report = (final / "report.html").read_text(encoding="utf-8")
    assert (
        "/pipelines" not in report
        and str(run.parent) not in report
        and ">mine<" in report.replace(" ", "")
    )
    summary = json.loads((final / "summary.json").read_text())
    for name, row in summary["rewards"].items():
        rows = text.split("## Numbers")[1].splitlines()
        line = next(line for line in rows if line.startswith(f"| {name} |"))
        for number in (row["base"], row["tuned"], *row["ci95"]):
            assert f"{number:.4g}".lstrip("-") in line
    assert "| compressibility | trained on |" in text
    data = ModelCard(text).data.to_dict()
    assert (data["license"], data["license_name"]) == ("other", "unknown")


def test_the_cards_example_runs_with_plain_diffusers(
    run: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    here = Path(shutil.copytree(run / "final", tmp_path / "final"))
    (here / folders["sd"].name).symlink_to(folders["sd"])
    monkeypatch.chdir(here)
    space: dict[str, Any] = {}
    exec(compile(code, "README.md", "exec"), space)
    assert space["pipeline"].get_active_adapters() and space["image"].size == (32, 32)
    assert (here / "picture.png").is_file()
    assert "load_lora_weights('.', weight_name='pytorch_lora_weights.safetensors')" in code


def test_a_dry_run_lists_and_a_push_sends_exactly_that(copy: Path, hub: Any, call: Call) -> None:
    # As after an interrupted run: what is made from the weights is made up for.
    (copy / "final" / "README.md").unlink()
    (copy / "final" / "comfyui_lora.safetensors").unlink()
    listed = call("push", copy, "--to", "me/mine", "--dry-run")
    assert listed.exit_code == 0, (listed.stderr, listed.exception)
    assert hub.requests == [] and "would go to me/mine (private)" in listed.stdout
    done = call("push", copy, "--to", "me/mine", "--device", "cpu")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "the same pictures" in done.stderr
    assert f"made: {hub.endpoint}/me/mine (private" in done.stdout
    there = hub.repositories["me/mine"]
    sent = {line.split()[-1] for line in listed.stdout.splitlines()[:-1]}
    assert there.private and set(there.files) == sent
    assert {"pytorch_lora_weights.safetensors", "comfyui_lora.safetensors", "README.md"} <= sent
    assert not any(name.startswith(("checkpoints", "config", "metrics")) for name in sent)
    assert b"load_lora_weights('me/mine', " in there.files["README.md"]
    assert "load_lora_weights('.', " in (copy / "final" / "README.md").read_text()
    assert TOKEN not in done.stdout + done.stderr
    for path in copy.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()


def test_what_cannot_be_pushed_is_said_before_anything_is_sent(
    copy: Path, hub: Any, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    refused = call("push", copy, "--to", "me/mine")
    assert refused.exit_code == 2 and "HF_TOKEN: there is no token" in refused.stderr
    refused = call("push", copy, "--to", "mine")
    assert refused.exit_code == 2 and "no name of a repository" in refused.stderr
    refused = call("push", copy / "samples", "--to", "me/mine")
    assert refused.exit_code == 2 and "no final/" in refused.stderr
    # A LoRA of zeros: what is loaded draws the base model's pictures.
    lora = copy / "final" / "pytorch_lora_weights.safetensors"
    with safe_open(lora, "pt") as stored:
        told = stored.metadata()
    zeros = {k: v * ("lora_A" in k) for k, v in load_file(lora).items()}
    save_file(zeros, lora, metadata=told)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    refused = call("push", copy, "--to", "me/mine", "--device", "cpu")
    assert refused.exit_code == 2 and "base model's as well" in refused.stderr
    assert hub.requests == []


def test_a_secret_that_strayed_into_a_prompt_is_not_in_the_card(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusion_align.assemble.publishing import write_model_card
    from diffusion_align.config import load_config
    from diffusion_align.policy.tuned import find_tuned

    monkeypatch.setenv("HF_TOKEN", TOKEN)
    config = load_config(copy / "config.yaml")
    strayed = replace(
        config,
        prompts=replace(config.prompts, source=[f"a cat {TOKEN}"]),
        evaluation=replace(config.evaluation, prompts=[f"a dog {TOKEN}"]),
        output=f"runs/{TOKEN}",
    )
    write_model_card(strayed, find_tuned(copy), "", print)
    text = (copy / "final" / "README.md").read_text(encoding="utf-8")
    assert "a cat" in text and "a dog" in text
    # In no spelling: an underscore is an entity in a card.
    assert "canaryCanary" not in text


def test_an_edited_card_goes_as_it_is(copy: Path, hub: Any, call: Call) -> None:
    card = copy / "final" / "README.md"
    edited = card.read_text(encoding="utf-8").replace("# mine", "# My own words")
    card.write_text(edited, encoding="utf-8")
    done = call("push", copy, "--to", "me/mine", "--no-check")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "edited by hand" in done.stderr
    assert hub.repositories["me/mine"].files["README.md"].decode() == edited


def test_a_run_without_a_config_needs_a_card_of_its_owner(copy: Path, hub: Any, call: Call) -> None:
    (copy / "config.yaml").unlink()
    (copy / "final" / "README.md").unlink()
    refused = call("push", copy, "--to", "me/mine")
    assert refused.exit_code == 2 and "no config.yaml" in refused.stderr
    assert hub.requests == []
    (copy / "final" / "README.md").write_text("---\nlicense: mit\ntags: [lora]\n---\n# own\n")
    done = call("push", copy, "--to", "me/mine")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "unchecked" in done.stderr
    assert hub.repositories["me/mine"].files["README.md"].endswith(b"# own\n")


def test_a_merged_model_is_written_and_pushed_with_a_card_of_its_own(
    copy: Path, hub: Any, call: Call, tmp_path: Path
) -> None:
    out = tmp_path / "merged"
    done = call("merge", copy, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert "drew the pictures of its LoRA" in done.stderr and (out / "model_index.json").is_file()
    card: Any = ModelCard((out / "README.md").read_text(encoding="utf-8"))
    assert "merged into its weights" in card.text and "lora" not in (card.data.tags or [])
    assert "from_pretrained('.')" in card.text and "load_lora_weights" not in card.text
    assert call("merge", copy, "--out", out).exit_code == 2  # it is not empty
    words = ("push", copy, "--to", "me/whole", "--merged", "--no-check", "--dtype", "bfloat16")
    done = call(*words)
    assert done.exit_code == 0, (done.stderr, done.exception)
    there = set(hub.repositories["me/whole"].files)
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "README.md"} <= there
    assert not any("lora" in name for name in there)
    assert not list(copy.glob("merged-*"))


def test_a_whole_model_has_a_card_and_is_pushed_whole(
    config: Path, hub: Any, call: Call, tmp_path: Path
) -> None:
    words = ("lora=null", "train.learning_rate=1e-3", "--no-compare")
    run = trained(config, tmp_path / "whole", *words)
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "every weight of its denoiser" in text and "the same pictures" in text
    assert "No comparison with the base model was made" in text
    assert not (run / "final" / "comfyui_lora.safetensors").exists()
    refused = call("merge", run, "--out", tmp_path / "m")
    assert refused.exit_code == 2 and "whole model" in refused.stderr
    done = call("push", run, "--to", "me/whole", "--no-check")
    assert done.exit_code == 0, (done.stderr, done.exception)
    there = hub.repositories["me/whole"].files
    assert {"model_index.json", "unet/config.json", "vae/config.json", "README.md"} <= set(there)
    assert b"from_pretrained('me/whole')" in there["README.md"]
    # Going on replaces what is made from the weights, and moves nothing aside.
    trained(config, run, *words, "train.steps=4", "--resume")
    assert not list(run.glob("final.old*")) and is_untouched(run / "final" / "README.md")


def test_a_reward_is_pushed_with_a_card(hub: Any, call: Call, tmp_path: Path) -> None:
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    twin = Path(reward_models.__file__).parent / "assets" / "tiny-hps.safetensors"
    shutil.copy(twin, final / "reward.safetensors")
    refused = call("push", tmp_path / "run", "--to", "me/taste", "--merged")
    assert refused.exit_code == 2 and "no LoRA to merge" in refused.stderr
    done = call("push", tmp_path / "run", "--to", "me/taste")
    assert done.exit_code == 0, (done.stderr, done.exception)
    there = hub.repositories["me/taste"]
    assert set(there.files) == {".diffusion-align.json", "README.md", "reward.safetensors"}
    assert there.private
    assert there.files["reward.safetensors"] == twin.read_bytes()
    card: Any = ModelCard(there.files["README.md"].decode())
    assert "tiny-clip" in card.text and "reward-model" in (card.data.tags or [])
