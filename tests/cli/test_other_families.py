"""FLUX and Wan in small, from a config to a merged model: looks, comparison, check, card."""

from __future__ import annotations

import importlib.util
import inspect
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.utils import export_to_video
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

Call = Callable[..., Any]
BUILDERS = Path(__file__).parents[1] / "policy" / "tiny_transformers.py"
SLOW = pytest.mark.slow


def builders() -> Any:
    spec = importlib.util.spec_from_file_location("tiny_transformers_of_commands", BUILDERS)
    assert spec is not None and spec.loader is not None
    tiny: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    return tiny


def frames(name: str) -> int:
    """Of a clip; 0 for images."""
    return {"flux": 0, "sd3": 0, "cogvideox": 9}.get(name, 5)


class Runs:
    """Finished runs, each made when it is first asked for."""

    def __init__(self, root: Path) -> None:
        self.root, self.made = root, dict[str, Path]()

    def model(self, name: str) -> Path:
        return self.root / "models" / name

    def __call__(self, name: str) -> Path:
        if name not in self.made:
            self.made[name] = self._train(name)
        return self.made[name]

    def _train(self, name: str) -> Path:
        from diffusion_align.cli import app

        tiny = builders()
        pipeline = {
            "flux": tiny.flux,
            "wan": tiny.wan,
            "wan-unipc": lambda: tiny.wan(unipc()),
            "sd3": tiny.stable_diffusion_3,
            "cogvideox": tiny.cogvideox,
            "easyanimate": tiny.easyanimate,
        }[name]()
        pipeline.save_pretrained(self.model(name))
        config, run = self.root / f"{name}.yaml", self.root / "runs" / name
        config.write_text(
            f"""\
model:
  id: {self.model(name)}
  device: cpu
lora:
  rank: 2
  alpha: 40
prompts:
  source: [a cat, a dog]
sampling:
  steps: 2
  guidance_scale: 2.0
  height: 32
  width: 32
  frames: {frames(name) or "null"}
reward: tiny-hps
algorithm:
  name: draft
  preset: draft
  range_check: "off"          # a model of random weights draws no pictures
  prompts_per_iteration: 2
  train_batch_size: 2
train:
  steps: 2
  learning_rate: 3e-2
  sample_every: 1
evaluation:
  prompts: [a bird, a fish]
  seeds: 1
  sample_prompts: 1
""",
            encoding="utf-8",
        )
        done = CliRunner().invoke(app, ["train", str(config), "--output", str(run)])
        assert done.exit_code == 0, (done.stdout, done.stderr, done.exception)
        return run


def unipc() -> Any:
    """As Wan 2.1's own: a scheduler without a likelihood, which training replaces."""
    from diffusers import UniPCMultistepScheduler

    return UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("families"))


LATER = ("wan-unipc", "sd3", "cogvideox", "easyanimate")
# Wan's own scheduler is replaced for training, so that the card must replace it too.
EVERY = ["flux", "wan", *(pytest.param(n, marks=SLOW) for n in LATER)]


@pytest.mark.parametrize("name", EVERY)
def test_a_run_ends_with_looks_a_comparison_a_check_and_a_card(runs: Runs, name: str) -> None:
    run = runs(name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2] and "heldout/tiny-hps" in rows[0]
    assert (run / "samples" / "step_000000" / "grid.png").is_file()
    summary = json.loads((run / "final" / "summary.json").read_text())
    assert (summary["trained_on"], summary["pairs"]) == (["tiny-hps"], 2)
    moved = load_file(run / "final" / "pytorch_lora_weights.safetensors")
    assert any(bool(moved[key].any()) for key in moved if key.endswith("lora_B.weight"))
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    media = "clips" if frames(name) else "pictures"
    loader = "plain diffusers" if name != "easyanimate" else "diffusers and this package"
    assert f"loaded again by {loader}" in text and f"the same {media} (largest" in text
    assert f"{'1 clip' if frames(name) else '2 pictures'} in 2 steps" in text
    data = ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == ("text-to-video" if frames(name) else "text-to-image")
    assert data["pipeline_tag"] in data["tags"]


def executed(
    folder: Path, runs: Runs, name: str, monkeypatch: pytest.MonkeyPatch
) -> tuple[str, dict[str, Any]]:
    """The example of the card in `folder`, and what it leaves, drawn from the noise of seed 0."""
    from diffusers import utils

    text = (folder / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    if not (folder / name).exists():
        (folder / name).symlink_to(runs.model(name))
    monkeypatch.chdir(folder)
    signature, written = inspect.signature(export_to_video), list[Any]()

    def export(*args: Any, **options: Any) -> None:  # the real one needs imageio and ffmpeg
        written.append(signature.bind(*args, **options).arguments)

    monkeypatch.setattr(utils, "export_to_video", export)
    space: dict[str, Any] = {}
    name_of_it = "video" if frames(name) else "image"
    load, draw = code.split(f"\n{name_of_it} = ")
    exec(compile(load, "README.md", "exec"), space)
    torch.manual_seed(0)  # loading draws numbers too
    exec(compile(f"{name_of_it} = {draw}", "README.md", "exec"), space)
    if not frames(name):
        assert (folder / "picture.png").is_file() and not written
        return code, space
    (call,) = written
    assert call["output_video_path"] == "clip.mp4" and len(call["video_frames"]) == frames(name)
    assert call["video_frames"] is space["video"]
    assert call["fps"] == (16 if "wan" in name else 8)
    return code, space


def pixels(drawn: Any) -> torch.Tensor:
    """In [0, 1], of a picture, a list of them or an array."""
    array = np.stack([np.asarray(frame) for frame in drawn]) if isinstance(drawn, list) else drawn
    array = np.asarray(array)
    return torch.from_numpy(array / (255.0 if array.dtype == np.uint8 else 1.0)).float()


def drawn_by(pipeline: Any, name: str) -> torch.Tensor:
    """What the example draws, by a call that is written here for each family."""
    call: dict[str, Any] = {"num_frames": frames(name)} if frames(name) else {}
    if name == "easyanimate":
        call["negative_prompt"] = ""
    torch.manual_seed(0)
    size: dict[str, Any] = {"height": 32, "width": 32, "guidance_scale": 2.0}
    return pixels(pipeline("a bird", num_inference_steps=2, **size, **call)[0][0])


@pytest.mark.parametrize("name", EVERY)
def test_the_cards_example_draws_what_was_trained_and_so_does_the_merged_model(
    runs: Runs, name: str, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import DiffusionPipeline

    from diffusion_align import Policy

    run = runs(name)
    here = Path(shutil.copytree(run / "final", tmp_path / "final"))
    code, space = executed(here, runs, name, monkeypatch)
    plain = name != "easyanimate"  # diffusers has no loader for a LoRA of it
    assert plain == ("diffusion_align" not in code)
    assert ("FlowMatchEulerDiscreteScheduler" in code) == (name == "wan-unipc")
    ours = Policy.load(runs.model(name), lora_path=run)
    drawn = pixels(space["video" if frames(name) else "image"])
    rounding = 0 if frames(name) and plain else 1 / 255  # of pictures in 8 bits
    expected = drawn_by(ours.pipeline, name)
    torch.testing.assert_close(drawn, expected, atol=1e-4 + rounding, rtol=0)
    with ours.reference("base"):
        assert not torch.allclose(drawn_by(ours.pipeline, name), drawn, atol=1e-3 + 2 * rounding)

    out = tmp_path / "merged"
    done = call("merge", run, "--out", out, "--device", "cpu")
    assert done.exit_code == 0, (done.stderr, done.exception)
    assert f"drew the {'clips' if frames(name) else 'pictures'} of its LoRA" in done.stderr
    code, space = executed(out, runs, name, monkeypatch)
    assert "from_pretrained('.')" in code and "diffusion_align" not in code
    again = pixels(space["video" if frames(name) else "image"])
    torch.testing.assert_close(again, expected, atol=1e-4 + rounding, rtol=0)
    own = DiffusionPipeline.load_config(out)["scheduler"][1]
    assert (own == "UniPCMultistepScheduler") == (name == "wan-unipc")


@pytest.mark.parametrize("name", ["wan", pytest.param("easyanimate", marks=SLOW)])
def test_an_upload_of_a_clip_model_is_checked_first(runs: Runs, name: str, tmp_path: Path) -> None:
    from diffusion_align.assemble.publishing import prepare_upload

    run, said = Path(shutil.copytree(runs(name), tmp_path / name)), list[str]()
    how: dict[str, Any] = {"check": True, "device": "cpu", "checkpoints": False, "record": False}
    how |= {"merged": None, "dtype": "float32", "say": said.append}
    sent = {upload.name: upload.source for upload in prepare_upload(run, "me/mine", **how)}
    assert any("the same clips" in line for line in said)
    card = sent["README.md"]
    assert isinstance(card, bytes) and b"'me/mine'" in card and b"'.'" not in card
    (run / "final" / "README.md").unlink()
    prepare_upload(run, "me/mine", **{**how, "check": False})
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "not loaded again" in text and "text-to-video" in text


def test_a_lora_of_clips_that_lost_its_alpha_is_found(runs: Runs, tmp_path: Path) -> None:
    from diffusion_align import Policy
    from diffusion_align.assemble.publishing import check_run
    from diffusion_align.config import RunConfig, load_config
    from diffusion_align.policy.tuned import LORA_FILE, find_tuned

    run = runs("wan")
    config = load_config(run / "config.yaml")
    assert isinstance(config, RunConfig)
    policy = Policy.load(config.model.id, lora_path=run)
    save_file(load_file(run / "final" / LORA_FILE), tmp_path / LORA_FILE)  # without its metadata
    found = check_run(config, policy, find_tuned(tmp_path))
    assert not found.same and found.changes and "OTHER CLIPS than the policy" in found.sentence()
    assert check_run(config, policy, find_tuned(run)).passed


@SLOW
def test_a_whole_model_of_clips_comes_with_the_scheduler_that_training_used(
    runs: Runs, tmp_path: Path, call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs("wan-unipc")
    run = tmp_path / "whole"
    words = ("lora=null", "train.learning_rate=1e-3", "--no-compare", "--output", run)
    done = call("train", runs.root / "wan-unipc.yaml", *words)
    assert done.exit_code == 0, (done.stderr, done.exception)
    text = (run / "final" / "README.md").read_text(encoding="utf-8")
    assert "every weight of its denoiser" in text and "the same clips" in text
    code, space = executed(run / "final", runs, "wan-unipc", monkeypatch)
    assert "cheduler" not in code
    assert type(space["pipeline"].scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
