"""The estimate beside the measured high-water, and what `check` says without loading weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusion_align.assemble.check import measure
from diffusion_align.assemble.estimate import estimate
from diffusion_align.assemble.one_update import amount, cut_to_one_update, quiet_end
from diffusion_align.cli import app
from diffusion_align.config import RunConfig, load_config
from diffusion_align.policy.catalogue import resolve

BAR = 0.15
PART = ("algorithm.timestep_fraction=0.5",)
SMALL = (
    "model.device=cpu",
    "sampling.steps=3",
    "sampling.batch_size=8",
    "algorithm.prompts_per_iteration=4",
    "algorithm.samples_per_prompt=4",
    "algorithm.train_batch_size=8",
    "train.accumulation=2",
)


def config(*words: str) -> RunConfig:
    loaded = load_config("demo", ["output=unused", *words])
    assert isinstance(loaded, RunConfig)
    return loaded


@pytest.mark.parametrize(
    "words",
    [
        ("model.gradient_checkpointing=false", "train.ema_decay=0.9"),
        pytest.param(("model.gradient_checkpointing=true",), marks=pytest.mark.slow),
        pytest.param(
            ("model.vae_slicing=true", "sampling.guidance_scale=3"), marks=pytest.mark.slow
        ),
        pytest.param(("lora=null", "algorithm.timesteps_per_loss=1"), marks=pytest.mark.slow),
        pytest.param(
            ("train.mixed_precision=bf16", "algorithm.clip_range=0.1"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_estimate_for_tiny_sd_is_within_the_bar(words: tuple[str, ...]) -> None:
    chosen = config(*SMALL, *words)
    found, measured = estimate(chosen), measure(chosen)
    assert found.step == pytest.approx(measured.step, rel=BAR)
    weights = sum(v for k, v in found.held.items() if k.startswith(("frozen", "trained")))
    assert weights == measured.level
    assert found.peak > found.step  # the whole holds more than the one update
    assert measured.iteration["sampling"] > measured.seconds["sampling"] > 0


@pytest.mark.slow
def test_a_setting_that_saves_memory_saves_it_in_the_estimate() -> None:
    plain = estimate(config(*SMALL))
    saving = estimate(config(*SMALL, "model.gradient_checkpointing=true"))
    sliced = estimate(config(*SMALL, "model.vae_slicing=true"))
    assert saving.phases["updating"] < 0.6 * plain.phases["updating"]
    assert sliced.phases["decoding"] < 0.5 * plain.phases["decoding"]
    assert saving.phases["decoding"] == plain.phases["decoding"]


def test_terms_that_are_arithmetic_are_exact() -> None:
    found = estimate(config(*SMALL, "train.ema_decay=0.5", "algorithm.timesteps_per_loss=1"))
    # 16 samples, 3 steps, latents of 4 x 8 x 8, in float32
    assert found.collected["stored latents"] == 16 * 4 * 256 * 4
    assert found.collected["log-probabilities"] == 16 * 3 * 4
    trained = found.held["trained parameters"]
    assert found.later["optimiser's moments"] == 2 * trained
    assert found.held["average (EMA)"] == found.gradients == trained
    assert trained > 0
    assert found.phases["optimiser"] >= trained  # every gradient is there
    # The tower's token table is stored sparse: 49408 rows of 64, of which the file has a few.
    assert found.held["rewards"] > 49408 * 64 * 4


@pytest.mark.parametrize("share", ["looks", pytest.param("low", marks=pytest.mark.slow)])
def test_the_most_at_once_is_that_of_a_whole_run(share: str, tmp_path: Path) -> None:
    """Two updates with looks at the model, from loading on, against the estimate's own peak."""
    import torch

    from diffusion_align.assemble.memory_plan import settle
    from diffusion_align.assemble.run import train_run
    from diffusion_align.training.memory import high_water

    chosen = config(
        *SMALL,
        *{"looks": (), "low": ("memory=low",)}[share],
        "evaluation.batch_size=32",
        "train.steps=2",
        "train.accumulation=1",
        "train.sample_every=1",
        "sampling.batch_size=4",
        "algorithm.train_batch_size=4",
        "evaluation.seeds=4",
        "evaluation.report=false",
        "evaluation.rewards=[]",
        "reward=incompressibility",
        f"output={tmp_path}/run",
    )
    # The check of the written files holds a second copy of so small a model; it is said, not
    # estimated.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("diffusion_align.assemble.run.publish_run", lambda *_: "")
        _, measured = high_water(torch.device("cpu"), lambda: train_run(chosen))
    found = estimate(settle(chosen).config)
    assert found.peak == pytest.approx(measured, rel=BAR)
    if share == "looks":
        assert found.fullest == "looking"


@pytest.mark.parametrize(
    "words",
    [
        ("algorithm.window_end=0.25", "algorithm.timesteps_per_loss=3", "sampling.steps=12"),
        *(
            pytest.param(words, marks=pytest.mark.slow)
            for words in [
                ("sampling.steps=12", "algorithm.timesteps_per_loss=2"),
                ("sampling.steps=12", "algorithm.timestep_fraction=0.3"),
                (
                    "sampling.steps=12",
                    "algorithm.window_start=0.5",
                    "algorithm.timestep_fraction=0.7",
                    "algorithm.timesteps_per_loss=2",
                ),
                ("algorithm=rwr", "sampling.steps=12"),
                ("sampling.steps=12", "algorithm.noise_window=5", "algorithm.timesteps_per_loss=1"),
            ]
        ),
    ],
)
def test_a_run_that_is_cut_has_the_peaks_and_the_arithmetic_of_the_whole(
    words: tuple[str, ...],
) -> None:
    from diffusion_align.assemble.dry_run import dry_run
    from diffusion_align.assemble.estimate import _stored

    small = (
        "model.device=cpu",
        "sampling.batch_size=8",
        "algorithm.prompts_per_iteration=2",
        "algorithm.samples_per_prompt=4",
        "algorithm.train_batch_size=4",
        "evaluation.batch_size=4",
        "reward=incompressibility",
    )
    if words[0] == "algorithm=rwr":
        loaded = load_config("rwr_tiny", ["output=unused", *small, *words[1:]])
        assert isinstance(loaded, RunConfig)
        whole = loaded
    else:
        whole = config(*small, *words)
    info = resolve(whole.model.id)
    cut = cut_to_one_update(whole, info)
    assert cut.sampling.steps is not None
    uncut = replace(whole, evaluation=cut.evaluation)
    a, b = dry_run(cut, {}), dry_run(uncut, {})
    all_of_it, part = amount(whole, info, b.quiet_end), amount(cut, info, a.quiet_end)
    in_a = sum(_stored(part, part.steps, a).values())
    in_b = sum(_stored(all_of_it, all_of_it.steps, b).values())
    assert a.peaks["updating"] - in_a == pytest.approx(b.peaks["updating"] - in_b, rel=0.02)
    scaled = a.flops["updating"] * all_of_it.pairs / part.per_update
    minibatches = whole.algorithm.options.minibatches
    assert scaled == pytest.approx(b.flops["updating"] * minibatches, rel=1e-6)


@pytest.mark.parametrize("group", [1, 2])
def test_a_noise_window_is_cut_with_the_steps(group: int) -> None:
    words = ("algorithm.noise_window=5", f"algorithm.timesteps_per_loss={group}")
    cut = cut_to_one_update(config("sampling.steps=12", *words), resolve("tiny-sd"))
    options, steps = cut.algorithm.options, cut.sampling.steps
    assert steps is not None and 1 <= options.noise_window <= steps - 1
    assert options.trained_steps(steps) >= 2 * group


def ends_with_noise(folder: Path) -> str:
    """tiny-sd with the last step of Stable Diffusion 1.5's scheduler, which takes noise."""
    shutil.copytree(
        resolve("tiny-sd").source, folder, ignore=shutil.ignore_patterns("SHA256SUMS.json")
    )
    path = folder / "scheduler" / "scheduler_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps({**settings, "set_alpha_to_one": False}))
    return str(folder)


@pytest.mark.parametrize("quiet", [0, 1])
def test_options_say_how_many_steps_the_algorithm_trains_on(quiet: int, tmp_path: Path) -> None:
    from itertools import product

    from diffusion_align.assemble.loading import load_policy
    from diffusion_align.assemble.named import load_algorithm
    from diffusion_align.data.prompts import Prompt
    from reward_models import load

    model = "tiny-sd" if quiet else ends_with_noise(tmp_path / "model")
    plain = config("model.device=cpu", "sampling.steps=10", f"model.id={model}")
    policy, reward = load_policy(plain), load("incompressibility")
    tried = product([0.0, 0.29, 0.5], [0.6, 1.0], [0.1, 0.29, 0.7, 1.0])
    for start, end, fraction in tried:
        options = replace(
            plain.algorithm.options,
            window_start=start,
            window_end=end,
            timestep_fraction=fraction,
        )
        chosen = replace(plain, algorithm=replace(plain.algorithm, options=options))
        algorithm = load_algorithm(chosen, policy, reward, [Prompt("a")])
        (said,) = (line for line in algorithm.describe() if line.startswith("one iteration"))
        trained = options.trained_steps(10, quiet_end=quiet)
        assert f" {trained} of 10 steps trained" in said
    assert quiet_end(plain, policy) == quiet


def test_a_replay_computes_each_pair_once_whatever_the_inner_epochs() -> None:
    whole = config("sampling.steps=12", "algorithm.inner_epochs=3")
    found = amount(whole, resolve("tiny-sd"), 1)
    assert found.different == 11 * whole.algorithm.options.samples == found.pairs / 3
    drawn = config(*("sampling.steps=12", "algorithm.inner_epochs=3"), *PART)
    found = amount(drawn, resolve("tiny-sd"), 1)
    assert found.different == found.pairs  # each epoch may draw others


def test_a_run_that_trains_its_last_step_alone_is_cut() -> None:
    """Which has noise in some models, and in tiny-sd none."""
    words = ("sampling.steps=50", "algorithm.window_start=0.98")
    assert cut_to_one_update(config(*words), resolve("tiny-sd")).sampling.steps == 50


def test_accumulated_gradients_are_counted_where_a_minibatch_has_one_loss() -> None:
    words = (*SMALL[:-1], "lora=null", "algorithm.timesteps_per_loss=3", "reward=incompressibility")
    one = estimate(config(*words, "train.accumulation=1"))
    two = estimate(config(*words, "train.accumulation=2"))
    trained = one.held["trained parameters"]
    assert two.phases["updating"] - one.phases["updating"] == pytest.approx(trained, rel=0.5)
    assert two.flops["updating"] == pytest.approx(one.flops["updating"])


@pytest.mark.parametrize(("device", "temporary"), [("cpu", 3), ("cuda", 8)])
def test_the_optimiser_step_counts_what_it_needs_for_itself(device: str, temporary: int) -> None:
    """On CUDA torch steps all tensors at once, with a temporary as large as all of them."""
    import torch
    from torch import nn
    from torch._subclasses.fake_tensor import FakeTensorMode

    from diffusion_align.assemble.dry_run import _step
    from diffusion_align.training.memory import LiveBytes

    with FakeTensorMode(allow_non_fake_inputs=True):
        parameters = [nn.Parameter(torch.empty(1000, device=device)) for _ in range(8)]
        for parameter in parameters:
            parameter.grad = torch.empty(1000, device=device)
    with LiveBytes("step") as live:
        _step(parameters, config())
    moments = 2 * 8 * 4000
    assert live.peak - moments == temporary * 4000


def test_measuring_asks_no_tracker_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tempfile

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("a recorder or a folder was asked for")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "mkdtemp", asked)
    monkeypatch.setattr("diffusion_align.training.loop.Recorder", asked)
    said: list[str] = []
    words = ("train.trackers=[tensorboard]", "model.attention_backend=flash")
    found = measure(config(*SMALL, "reward=incompressibility", *words), said.append)
    assert found.step > 0 and found.seconds["updating"] > 0
    assert not list(tmp_path.iterdir())
    assert any("attention_backend=flash has no effect" in line for line in said)


def test_numbers_stored_in_half_count_as_they_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import save_file

    from diffusion_align.assemble.reward_memory import _in_memory
    from reward_models.weights import WeightFile

    path = tmp_path / "head.safetensors"
    save_file({"w": torch.zeros(100, 7, dtype=torch.float16)}, path)
    monkeypatch.setattr("reward_models.weights.on_disk", lambda _: path)
    assert _in_memory(WeightFile(name="head")) == 100 * 7 * 4


SD15_ONE_LAYER = {
    "block_out_channels": [320, 640, 1280, 1280],
    "layers_per_block": 1,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "sample_size": 32,
}


@pytest.mark.slow
def test_the_estimate_for_sd15_widths_is_within_the_bar(tmp_path: Path) -> None:
    """Random weights, the true widths of SD 1.5 at one layer per block, latents of 32 x 32."""
    folder = _true_widths(tmp_path / "model")
    chosen = config(
        "model.device=cpu",
        f"model.id={folder}",
        "sampling.steps=2",
        "sampling.batch_size=2",
        "sampling.height=64",
        "sampling.width=64",
        "algorithm.prompts_per_iteration=1",
        "algorithm.samples_per_prompt=2",
        "algorithm.train_batch_size=2",
        "algorithm.timesteps_per_loss=1",
        "train.accumulation=1",
        "reward=incompressibility",
    )
    found, measured = estimate(chosen), measure(chosen)
    assert found.step == pytest.approx(measured.step, rel=BAR)
    print(f"estimated {found.step}, measured {measured.step}")


def _true_widths(folder: Path) -> Path:
    import importlib.util

    from diffusers import UNet2DConditionModel

    path = Path(__file__).parents[1] / "policy" / "tiny_pipelines.py"
    spec = importlib.util.spec_from_file_location("tiny_pipelines", path)
    assert spec is not None and spec.loader is not None
    tiny: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tiny)
    pipeline = tiny.stable_diffusion(tiny.ddim())
    width = tiny.text_config(768, 768)
    pipeline.register_modules(
        unet=UNet2DConditionModel(**SD15_ONE_LAYER), text_encoder=tiny.CLIPTextModel(width)
    )
    pipeline.save_pretrained(folder)
    return folder


# --- the command ---------------------------------------------------------------------------------


def call(*words: object) -> Any:
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.mark.slow
def test_the_command_shows_each_term_before_it_loads_weights(tmp_path: Path) -> None:
    """Without weights: an estimate needs configs alone, and no update is run."""
    from shutil import copytree, ignore_patterns

    from diffusion_align.policy.catalogue import resolve

    empty = tmp_path / "model"
    copytree(resolve("tiny-sd").source, empty, ignore=ignore_patterns("*.safetensors", "SHA*"))
    done = call("check", "demo", *SMALL, f"model.id={empty}", "memory=low")
    assert done.exit_code == 0, done.stderr
    for term in (
        "frozen unet",
        "frozen text_encoder",
        "trained parameters",
        "gradients",
        "optimiser's moments",
        "stored latents",
        "embeddings",
        "training: activations",
        "decoding: activations",
        "rewards",
        "the most at once",
        "memory low: model.release_text_encoders=true",
    ):
        assert term in done.stdout
    assert "No update was run" in done.stdout and "One real update" not in done.stdout


def test_a_reward_run_and_typos_are_answered() -> None:
    answered = call("check", "reward_small_world_hps")
    assert answered.exit_code == 0 and "this one trains a reward" in answered.stdout
    assert "no problems found" in answered.stdout and not answered.stderr
    wrong = call("check", "demo", "train.ema_decy=0.9", "memory=lo")
    assert wrong.exit_code == 2
    assert "train.ema_decay" in wrong.stderr and "did you mean  low" in wrong.stderr


def test_a_reward_is_not_averaged(tmp_path: Path) -> None:
    refused = call("train", "reward_small_world_hps", "train.ema_decay=0.9", f"output={tmp_path}/r")
    assert refused.exit_code == 2 and "best validation" in refused.stderr
    assert json.dumps(sorted(p.name for p in tmp_path.iterdir())) == "[]"
