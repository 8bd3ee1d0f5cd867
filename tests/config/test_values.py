"""What a value in a config means: decided by the declared type, never by YAML's guess."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.config import (
    ConfigError,
    RunConfig,
    config_names,
    differences,
    load_config,
    to_yaml,
)

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
SMALLEST = """\
model:
  id: tiny-sd
prompts:
  source: animals
reward: compressibility
algorithm:
  name: ddpo
"""


def written(folder: Path, text: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_parses_and_starts_with_its_launch_command(path: Path) -> None:
    config = load_config(path)
    text = path.read_text(encoding="utf-8")
    assert text.startswith("# Launch:")
    assert f"diffusion-align train {path.stem}" in text.split("\n\n")[0]
    assert "# Source:" in text
    assert config.output == f"runs/{path.stem}"


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_a_resolved_config_loads_back_to_itself(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = load_config(written(tmp_path, to_yaml(config)))
    assert again == config
    assert differences(config, again) == []


def test_left_out_values_are_the_rooms_own_defaults(tmp_path: Path) -> None:
    from diffusion_align.algorithms.options import DDPOOptions
    from diffusion_align.evaluation.options import EvaluationOptions
    from diffusion_align.policy.options import LoRAOptions, ModelOptions
    from diffusion_align.sampling.options import SamplingOptions
    from diffusion_align.training.options import TrainOptions

    config = load_config(written(tmp_path, SMALLEST))
    assert config.model == ModelOptions(id="tiny-sd")
    assert config.lora == LoRAOptions()
    assert config.sampling == SamplingOptions()
    assert config.train == TrainOptions()
    assert config.evaluation == EvaluationOptions()
    assert config.algorithm.options == DDPOOptions()
    assert (config.seed, config.output) == (0, "runs/mine")


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", ".0001", "1E-4", '"1e-4"'])
def test_every_spelling_of_a_number_is_that_number(tmp_path: Path, text: str) -> None:
    # PyYAML reads 1e-4 as text.
    path = written(tmp_path, f"{SMALLEST}train:\n  learning_rate: {text}\n")
    assert load_config(path).train.learning_rate == 1e-4
    assert load_config("demo", [f"train.learning_rate={text}"]).train.learning_rate == 1e-4


@given(value=st.floats(min_value=1e-30, max_value=1e30))
@settings(max_examples=50, deadline=None)
def test_a_float_survives_being_written_and_read(value: float) -> None:
    assert load_config("demo", [f"train.learning_rate={value!r}"]).train.learning_rate == value


@pytest.mark.parametrize("text", ["yes", "on", "1", "y", "no", "off", "0", "tru"])
def test_only_true_and_false_are_booleans(text: str) -> None:
    # YAML 1.1 takes `on` for True; here it is more probably a mistake.
    with pytest.raises(ConfigError, match="is not true or false"):
        load_config("demo", [f"algorithm.train_guidance={text}"])


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False)])
def test_true_and_false_are_read(text: str, value: bool) -> None:
    options = load_config("demo", [f"algorithm.train_guidance={text}"]).algorithm.options
    assert options.train_guidance is value


@pytest.mark.parametrize("text", ["1.5", "ten", "1e3", "[1]", "null", "true", "1_0.5"])
def test_a_whole_number_is_whole(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.steps .* is not a whole number"):
        load_config("demo", [f"train.steps={text}"])


@pytest.mark.parametrize("text", [".nan", "nan", "inf", "-inf", ".inf"])
def test_numbers_are_finite(text: str) -> None:
    with pytest.raises(ConfigError, match=r"train\.learning_rate"):
        load_config("demo", [f"train.learning_rate={text}"])


@pytest.mark.parametrize("text", ["no", "'no'", '"no"'])
def test_no_stays_the_word_where_a_word_is_declared(text: str) -> None:
    config = load_config("demo", [f"train.mixed_precision={text}"])
    assert config.train.mixed_precision == "no"


def test_text_that_looks_like_something_else_stays_text(tmp_path: Path) -> None:
    for text in ("2024-01-01", "012", "on", "1e4", "true"):
        assert load_config("demo", [f"prompts.negative={text}"]).prompts.negative == text


def test_null_is_nothing_and_quoted_null_is_a_word() -> None:
    assert load_config("demo", ["lora=null"]).lora is None
    assert load_config("demo", ["prompts.negative='null'"]).prompts.negative == "null"


def test_a_list_may_be_written_with_commas_or_brackets() -> None:
    for text in ("verifier,taste", "[verifier, taste]", "verifier, taste"):
        config = load_config("demo", [f"evaluation.rewards={text}"])
        assert config.evaluation.rewards == ("verifier", "taste")
    # but a prompt with a comma in it is one prompt
    config = load_config("demo", ["prompts.source=['a cat, a dog']"])
    assert config.prompts.source == ["a cat, a dog"]


def test_an_override_may_bring_a_section_back() -> None:
    config = load_config("demo", ["lora=null", "lora.rank=16"])
    assert config.lora is not None
    assert config.lora.rank == 16


def test_a_lora_that_goes_on_is_loaded_with_the_rank_that_was_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusion_align.assemble import load_policy
    from diffusion_align.policy import Policy

    asked: list[dict[str, object]] = []
    monkeypatch.setattr(Policy, "load", lambda model, **how: asked.append({"model": model, **how}))
    for overrides in (["lora.path=x", "lora.rank=4"], ["lora.path=x", "lora.rank=null"]):
        load_policy(load_config("demo", overrides))
    load_policy(load_config("demo", ["lora.rank=null"]))
    assert [how["lora_rank"] for how in asked] == [4, None, 8]
    assert [how.get("lora_path") for how in asked] == ["x", "x", None]


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_a_seed_may_be_as_large_as_torch_takes(seed: int) -> None:
    assert load_config("demo", [f"seed={seed}"]).seed == seed


@pytest.mark.parametrize("seed", [-1, 2**63, 10**20, 10**400])
def test_another_seed_is_refused_with_the_range(seed: int) -> None:
    with pytest.raises(ConfigError, match=r"seed  must lie in \[0, 2\*\*63 - 1\]"):
        load_config("demo", [f"seed={seed}"])


def test_the_last_override_wins() -> None:
    assert load_config("demo", ["seed=1", "seed=2"]).seed == 2


def test_a_config_is_frozen() -> None:
    config = load_config("demo")
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
    with pytest.raises(AttributeError):
        config.train.steps = 3  # type: ignore[misc]


def test_differences_name_dotted_keys() -> None:
    before = load_config("demo")
    after = load_config("demo", ["train.steps=7", "algorithm.clip_range=0.5", "lora=null"])
    changed = {line.partition(":")[0] for line in differences(before, after)}
    assert {"train.steps", "algorithm.clip_range", "lora.rank"} <= changed
    assert not any(key.startswith(("model", "sampling", "prompts")) for key in changed)


def test_the_published_settings_are_the_published_numbers() -> None:
    # TRL's examples/scripts/ddpo.py and DDPOConfig
    config: RunConfig = load_config("ddpo_sd15_aesthetic")
    options = config.algorithm.options
    assert (config.model.id, config.reward) == ("sd15", "aesthetic")
    assert (config.sampling.steps, config.sampling.guidance_scale) == (50, 5.0)
    assert config.sampling.batch_size == 6
    samples = options.prompts_per_iteration * options.samples_per_prompt
    assert samples == 4 * config.sampling.batch_size
    assert options.train_batch_size == 3
    assert config.train.steps == 200 * samples / options.train_batch_size
    assert (options.advantages, options.buffer_size, options.buffer_min_count) == ("prompt", 32, 16)
    assert (options.clip_range, options.clip_unit, options.advantage_clip) == (1e-4, "mean", 5.0)
    assert (config.train.learning_rate, config.train.weight_decay) == (3e-4, 1e-4)
    assert config.lora is not None
    assert config.lora.alpha == config.lora.rank == 4


def test_all_configs_are_known_by_name() -> None:
    assert config_names() == sorted(path.stem for path in CONFIGS.glob("*.yaml"))
    assert {"demo", "ddpo_sd15_aesthetic"} <= set(config_names())


def test_a_resolved_config_explains_every_key() -> None:
    config = load_config("demo")
    lines = [line for line in to_yaml(config).splitlines() if ": " in line and "name: " not in line]
    assert all("  # " in line for line in lines)
    assert len(lines) > len(asdict(config.train))
