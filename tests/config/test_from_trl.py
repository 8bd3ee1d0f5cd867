"""docs/from_trl.md: every setting of TRL's DDPO has a place, and the presets hold its values."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.config import RunConfig, load_config
from diffusion_align.config.validate import keys

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "from_trl.md").read_text(encoding="utf-8")
KEYS = keys(RunConfig, DDPOOptions)

# The fields of trl/trainer/ddpo_config.py in the wheel of TRL 0.23.1, in their order, with their
# defaults.
TRL: dict[str, Any] = {
    "exp_name": None,
    "run_name": "",
    "seed": 0,
    "log_with": None,
    "tracker_kwargs": {},
    "accelerator_kwargs": {},
    "project_kwargs": {},
    "tracker_project_name": "trl",
    "logdir": "logs",
    "num_epochs": 100,
    "save_freq": 1,
    "num_checkpoint_limit": 5,
    "mixed_precision": "fp16",
    "allow_tf32": True,
    "resume_from": "",
    "sample_num_steps": 50,
    "sample_eta": 1.0,
    "sample_guidance_scale": 5.0,
    "sample_batch_size": 1,
    "sample_num_batches_per_epoch": 2,
    "train_batch_size": 1,
    "train_use_8bit_adam": False,
    "train_learning_rate": 3e-4,
    "train_adam_beta1": 0.9,
    "train_adam_beta2": 0.999,
    "train_adam_weight_decay": 1e-4,
    "train_adam_epsilon": 1e-8,
    "train_gradient_accumulation_steps": 1,
    "train_max_grad_norm": 1.0,
    "train_num_inner_epochs": 1,
    "train_cfg": True,
    "train_adv_clip_max": 5.0,
    "train_clip_range": 1e-4,
    "train_timestep_fraction": 1.0,
    "per_prompt_stat_tracking": False,
    "per_prompt_stat_tracking_buffer_size": 16,
    "per_prompt_stat_tracking_min_count": 16,
    "async_reward_computation": False,
    "max_workers": 2,
    "negative_prompts": "",
    "push_to_hub": False,
}
# What the published single-GPU run says instead of a default.
PUBLISHED: dict[str, Any] = {
    "num_epochs": 200,
    "train_batch_size": 3,
    "sample_batch_size": 6,
    "sample_num_batches_per_epoch": 4,
    "per_prompt_stat_tracking": True,
    "per_prompt_stat_tracking_buffer_size": 32,
}


def rows() -> list[list[str]]:
    """The cells of the table of fields."""
    table = PAGE.split("## Every field of")[1].split("\n## ")[0]
    lines = [line for line in table.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_every_field_of_trl_stands_in_the_table_once_in_its_order() -> None:
    assert [row[0].strip("`") for row in rows()] == list(TRL)


def test_the_defaults_in_the_table_are_those_of_trl() -> None:
    for name, default, *_ in rows():
        expected = TRL[name.strip("`")]
        if expected is None:
            continue
        if isinstance(expected, bool):
            assert default == str(expected).lower()
        elif isinstance(expected, int | float):
            assert float(default) == expected
        else:
            said = "{}" if expected == {} else f'"{expected}"'
            assert default == f"`{said}`"


def test_every_field_is_a_key_of_ours_or_says_why_it_is_none() -> None:
    for name, _, ours, note in rows():
        for said in re.findall(r"`([^`]+)`", ours):
            assert said in KEYS or said == "--resume", name
        assert ours != "-" or note, name


def test_every_key_that_the_page_names_exists() -> None:
    sections = {key.partition(".")[0] for key in KEYS if "." in key}
    named = re.findall(rf"`((?:{'|'.join(sections)})\.\w+)", PAGE)
    assert len(set(named)) > 25
    assert {key for key in named if key not in KEYS} == set()


@pytest.mark.parametrize("name", ["ddpo_sd15_aesthetic", "ddpo_sd15_aesthetic_full"])
def test_the_presets_hold_the_published_values(name: str) -> None:
    config = load_config(name)
    options = config.algorithm.options
    said = TRL | PUBLISHED
    samples = said["sample_num_batches_per_epoch"] * said["sample_batch_size"]
    assert options.samples == samples == 24 and options.samples_per_prompt == 1
    updates = samples // said["train_batch_size"] // said["train_gradient_accumulation_steps"]
    full = name.endswith("full")
    expected = {
        "num_epochs": config.train.steps // updates,
        "save_freq": config.train.checkpoint_every,
        "num_checkpoint_limit": config.train.keep_checkpoints,
        "mixed_precision": "fp16" if full else config.train.mixed_precision,
        "sample_num_steps": config.sampling.steps,
        "sample_eta": config.sampling.eta,
        "sample_guidance_scale": config.sampling.guidance_scale,
        "sample_batch_size": config.sampling.batch_size,
        "train_batch_size": options.train_batch_size,
        "train_use_8bit_adam": config.train.optimizer != "adamw",
        "train_learning_rate": 3e-4 if full else config.train.learning_rate,
        "train_adam_beta1": config.train.adam_beta1,
        "train_adam_beta2": config.train.adam_beta2,
        "train_adam_weight_decay": config.train.weight_decay,
        "train_adam_epsilon": config.train.adam_epsilon,
        "train_gradient_accumulation_steps": config.train.accumulation,
        "train_max_grad_norm": config.train.max_grad_norm,
        "train_num_inner_epochs": options.inner_epochs,
        "train_cfg": options.train_guidance,
        "train_adv_clip_max": options.advantage_clip,
        "train_clip_range": options.clip_range,
        "train_timestep_fraction": options.timestep_fraction,
        "per_prompt_stat_tracking": options.advantages == "prompt",
        "per_prompt_stat_tracking_buffer_size": options.buffer_size,
        "per_prompt_stat_tracking_min_count": options.buffer_min_count,
        "negative_prompts": config.prompts.negative,
        "seed": config.seed,
    }
    assert {field: (value, said[field]) for field, value in expected.items()} == {
        field: (said[field], said[field]) for field in expected
    }
    assert config.train.steps % updates == 0
    assert (options.clip_unit, options.kl_weight, config.train.ema_decay) == ("mean", 0.0, 0.0)


def test_full_fine_tuning_follows_the_published_advice() -> None:
    config = load_config("ddpo_sd15_aesthetic_full")
    assert config.lora is None
    assert config.train.learning_rate == 1e-5
    assert (config.train.mixed_precision, config.model.dtype) == ("no", "float32")


def test_the_small_preset_differs_from_the_published_one_only_where_it_says_so() -> None:
    large, small = (
        asdict(load_config("ddpo_sd15_aesthetic")),
        asdict(load_config("ddpo_tiny_published")),
    )
    assert small["lora"] == large["lora"] and small["algorithm"]["name"] == "ddpo"
    options = (small["algorithm"]["options"], large["algorithm"]["options"])
    changed = {k for k, value in options[0].items() if value != options[1][k]}
    assert changed == {"timesteps_per_loss"}  # how many at once, not how many
    changed = {k for k, value in small["sampling"].items() if value != large["sampling"][k]}
    assert changed == {"steps", "guidance_scale", "batch_size"}
    changed = {k for k, value in small["train"].items() if value != large["train"][k]}
    assert changed == {"mixed_precision", "checkpoint_every", "keep_checkpoints", "sample_every"}


def test_the_fast_preset_differs_from_the_published_one_only_where_it_says_so() -> None:
    """And its updates cost a third of the calls."""
    published, fast = load_config("ddpo_tiny_published"), load_config("ddpo_tiny_fast")
    for section in ("model", "lora", "prompts", "sampling", "reward", "evaluation", "seed"):
        assert getattr(published, section) == getattr(fast, section), section
    slow, quick = asdict(published.algorithm.options), asdict(fast.algorithm.options)
    changed = {name for name, value in quick.items() if value != slow[name]}
    assert changed == {"timesteps_per_loss", "buffer_min_count", "window_start", "clip_range"}
    slow, quick = asdict(published.train), asdict(fast.train)
    changed = {name for name, value in quick.items() if value != slow[name]}
    assert changed == {"steps", "learning_rate", "sample_every"}
    calls = []
    for config in (published, fast):
        options, steps = config.algorithm.options, config.sampling.steps
        assert steps is not None and config.train.steps % options.minibatches == 0
        each = 2 * (steps + 3 * options.trained_steps(steps))  # tiny-sd's last step has no noise
        calls.append(config.train.steps // options.minibatches * options.samples * each)
    assert calls == [432_000, 143_856]


def test_the_python_of_the_page_is_python_and_its_prompts_are_prompts() -> None:
    from diffusion_align.data.prompts import load_prompts

    blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    assert len(blocks) == 2
    compiled = [compile(block, "docs/from_trl.md", "exec") for block in blocks]
    assert 'lora_init="gaussian"' in blocks[0]  # the learning rate is of this start
    names: dict[str, object] = {}
    exec(compiled[1], names)
    texts = [prompt.text for prompt in load_prompts(names["prompts"])]  # type: ignore[arg-type]
    assert texts == ["a red cat", "a red dog", "a blue cat", "a blue dog"]
