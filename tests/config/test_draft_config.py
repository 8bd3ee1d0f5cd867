"""Configs of reward backpropagation: what is refused before anything is loaded; the presets."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from diffusion_align.algorithms.gradient_plan import GradientPlan
from diffusion_align.algorithms.reward_gradient import RewardLoss
from diffusion_align.config import RunConfig, load_config
from diffusion_align.data.prompts import load_prompts
from diffusion_align.errors import UserError
from diffusion_align.policy.catalogue import resolve
from diffusion_align.policy.choices import check_size, clip_length
from diffusion_align.policy.families import FAMILIES
from diffusion_align.sampling.options import resolve_sampling
from reward_models.catalogue import components, find
from reward_models.video.frames import FrameChoice


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["reward=incompressibility"], ["incompressibility has no gradient", "tiny-hps"]),
        (
            ["reward=0.5*tiny-hps + 0.5*incompressibility"],
            ["incompressibility has no gradient", "ddpo"],
        ),
        (
            ["algorithm.preset=draft-k", "algorithm.active_steps=20"],
            ["algorithm.active_steps", "20 of 12 steps"],
        ),
        (["train.mixed_precision=fp16"], ["train.mixed_precision", "use no, or bf16"]),
        (["model.dtype=float16"], ["model.dtype", "use bfloat16 or float32"]),
        (["lora.dropout=0.1"], ["lora.dropout", "set lora.dropout=0"]),
        (["algorithm.train_batch_size=8"], ["one update of an iteration", "accumulation=3"]),
        (["algorithm.decode_frames=first"], ["algorithm.decode_frames", "tiny-sd makes images"]),
        (["algorithm.reward_frames=uniform:2"], ["algorithm.reward_frames", "no frames"]),
        (["algorithm.coupling=2"], ["algorithm.coupling", "lie in [0, 1]"]),
        (["algorithm.preset=draft-kk"], ["algorithm.preset", "draft-k"]),
    ],
    ids=str,
)
def test_what_does_not_fit_is_named_with_what_to_do(words: list[str], said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_config("draft_tiny", words)
    for part in said:
        assert part in str(caught.value)


def test_minibatches_of_one_update_are_accumulated() -> None:
    words = ["algorithm.train_batch_size=8", "train.accumulation=3"]
    assert load_config("draft_tiny", words).algorithm.options.minibatches == 3


CONFIGS = Path(__file__).resolve().parents[2] / "configs"
PAGES = [CONFIGS.parent / "README.md", *sorted((CONFIGS.parent / "docs").glob("*.md"))]
DRAFT = [path for path in sorted(CONFIGS.glob("*.yaml")) if path.stem.startswith("draft_")]
PUBLISHED = [path for path in DRAFT if path.stem != "draft_tiny"]


@pytest.mark.parametrize("path", DRAFT, ids=lambda path: path.stem)
def test_a_preset_of_reward_gradients_fits_its_model_and_its_reward(path: Path) -> None:
    config = load_config(path)
    assert isinstance(config, RunConfig) and config.algorithm.name == "draft"
    options, info = config.algorithm.options, resolve(config.model.id)
    family = next(family for family in FAMILIES if family.name == info.family)

    sampling = resolve_sampling(config.sampling, info)
    options.plan.check(sampling.steps)
    check_size(family, sampling.height, sampling.width)
    assert clip_length(family, info, config.sampling.frames) == sampling.frames
    if info.modality == "video":  # as their scripts sample
        assert sampling.eta == 0 if family.schedule == "ddim" else sampling.flow_kind == "ode"

    trained = [find(name).info for name in components(config.reward)]
    assert trained and all(reward.differentiable for reward in trained)
    assert config.reward not in config.evaluation.rewards  # some reward is held out
    for reward in [*trained, *(find(name).info for name in config.evaluation.rewards)]:
        assert reward.modality == "image" or info.modality == "video"

    if info.modality == "image":
        assert (options.decode_frames, options.frames_scored) == ("all", "all")
    else:
        decoded = FrameChoice.parse(options.decode_frames)
        latent = 1 + (sampling.frames - 1) // family.frames.ratio  # type: ignore[union-attr,operator]
        assert decoded.kind == "all" or max(decoded.indices(latent)) < latent
        assert FrameChoice.parse(options.frames_scored)

    assert load_prompts(config.prompts.source) and load_prompts(config.evaluation.prompts)
    assert config.lora is not None and config.lora.targets is None


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.stem)
def test_a_preset_of_a_large_model_says_where_it_comes_from(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    head = " ".join(line.removeprefix("#").strip() for line in text.split("\n\n")[0].splitlines())
    assert re.search(r"Source: .*(chosen here|We differ|as draft_)", head)
    assert max(map(len, text.splitlines())) <= 120


def test_the_presets_have_the_published_values() -> None:
    def told(name: str) -> tuple[RunConfig, GradientPlan]:
        config = load_config(name)
        assert isinstance(config, RunConfig)
        return config, config.algorithm.options.plan

    for name, tail in (("wan_hps", 5), ("wan_mps", 5), ("easyanimate_hps", 10)):
        config, plan = told(f"draft_{name}")
        assert (plan.active, plan.active_steps, plan.coupling) == ("last", tail, 1.0)
        assert (config.train.adam_epsilon, config.train.max_grad_norm) == (1e-10, 0.3)
        assert (config.sampling.height, config.sampling.width) == (256, 256)
    assert told("draft_easyanimate_mps")[1] == told("draft_easyanimate_hps")[1]
    assert told("draft_cogvideox_mps")[1].active_steps == 1

    config, plan = told("draft_sd15_aesthetic")
    assert config.algorithm.options.samples == 128
    assert (plan.active, plan.cut_mean * 50, plan.cut_std * 50) == ("cut", 42, 5)
    plan = told("draft_sd15_hps")[1]
    assert (plan.lv_copies, plan.active_steps, plan.guidance_gradient) == (2, 1, "conditional")
    plan = told("draft_flux_hps")[1]
    assert (plan.active_steps, plan.coupling, plan.stop_start) == (3, 0.0, 0.6)


@pytest.mark.parametrize("name", ["draft_easyanimate_mps", "draft_wan_mps", "draft_cogvideox_mps"])
def test_a_scaled_logit_pulls_as_hard_as_the_cosine_that_they_train_on(name: str) -> None:
    """|1 - cosine| and minus 0.01 x (100 x cosine) have the same gradient."""
    options = load_config(name).algorithm.options
    cosine = torch.tensor([0.05, 0.09], dtype=torch.float64, requires_grad=True)
    (theirs,) = torch.autograd.grad((cosine - 1).abs().mean(), cosine)
    ours = RewardLoss.of(options)(100 * cosine).mean()
    torch.testing.assert_close(torch.autograd.grad(ours, cosine)[0], theirs)


def test_the_documented_table_of_presets_is_the_folder() -> None:
    """A table whose first column is headed `preset`, wherever it stands."""
    rows = [
        name
        for page in PAGES
        for table in re.findall(r"^\| preset \|.*\n\|[-| ]+\n((?:\|.*\n)+)", _text(page), re.M)
        for name in re.findall(r"^\| `(\w+)`", table, re.M)
    ]
    if not rows:
        pytest.skip("no page has a table of presets")
    assert sorted(rows) == sorted(path.stem for path in CONFIGS.glob("*.yaml"))


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")
