"""The JSON Schema says what the dataclasses say."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.reward_options import RewardStart
from diffusion_align.config import RewardRunConfig, RunConfig, json_schema
from diffusion_align.data.judgement_options import JudgementOptions
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.policy.options import LoRAOptions, ModelOptions
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.guard_options import GuardOptions
from diffusion_align.training.options import TrainOptions


@pytest.fixture(scope="module")
def schema() -> dict[str, Any]:
    return json.loads(json_schema())


def definition(schema: dict[str, Any], algorithm: str) -> dict[str, Any]:
    """What the schema holds a config with this algorithm against."""
    rewards = schema["if"]["properties"]["algorithm"]["properties"]["name"]["enum"]
    chosen = schema["then" if algorithm in rewards else "else"]["$ref"]
    return schema["$defs"][chosen.removeprefix("#/$defs/")]


@pytest.mark.parametrize(("algorithm", "root"), [("ddpo", RunConfig), ("reward", RewardRunConfig)])
def test_the_sections_are_those_of_a_run(
    schema: dict[str, Any], algorithm: str, root: type
) -> None:
    found = definition(schema, algorithm)
    assert set(found["properties"]) == {field.name for field in fields(root)} | {"base"}
    assert found["additionalProperties"] is False


@pytest.mark.parametrize(
    "options",
    [
        ModelOptions,
        LoRAOptions,
        SamplingOptions,
        TrainOptions,
        GuardOptions,
        EvaluationOptions,
        RewardStart,
        JudgementOptions,
    ],
)
def test_every_option_is_there_with_its_text_and_nothing_else_is(
    schema: dict[str, Any], options: type
) -> None:
    section = schema["$defs"][options.__name__]
    assert set(section["properties"]) == {field.name for field in fields(options)}
    assert all(entry.get("description") for entry in section["properties"].values())
    assert section["additionalProperties"] is False


def test_an_algorithm_s_options_stand_beside_its_name(schema: dict[str, Any]) -> None:
    section = schema["$defs"]["ddpo_section"]
    assert set(section["properties"]) == {field.name for field in fields(DDPOOptions)} | {"name"}
    assert section["properties"]["name"]["const"] == "ddpo"
    assert section["properties"]["clip_range"]["default"] == DDPOOptions().clip_range


def test_the_shipped_configs_use_only_keys_of_the_schema(schema: dict[str, Any]) -> None:
    import yaml

    folder = Path(__file__).resolve().parents[2] / "configs"
    for path in folder.glob("*.yaml"):
        written = whole = yaml.safe_load(path.read_text(encoding="utf-8"))
        while "algorithm" not in whole:  # it is that of the config it inherits from
            whole = yaml.safe_load((folder / f"{whole['base']}.yaml").read_text(encoding="utf-8"))
        known = definition(schema, whole["algorithm"]["name"])["properties"]
        assert set(written) <= set(known), path.name
