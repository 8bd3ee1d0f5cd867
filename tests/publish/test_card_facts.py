"""What a card says of a base model that the catalogue does not know."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants

from diffusion_align.assemble.card_facts import card_of
from diffusion_align.config import RunConfig, load_config
from diffusion_align.errors import UserError
from diffusion_align.policy.tuned import Tuned
from diffusion_align.publish.card import Card, Kind
from diffusion_align.publish.example import example

INDEX = {
    "_class_name": "WanPipeline",
    "scheduler": ["diffusers", "UniPCMultistepScheduler"],
}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's cache, with the index of the model me/clips in it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--me--clips"
    (repository / "snapshots" / "abc").mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc", encoding="utf-8")
    index = repository / "snapshots" / "abc" / "model_index.json"
    index.write_text(json.dumps(INDEX), encoding="utf-8")
    return tmp_path


def card(model: str, folder: Path, kind: Kind = "lora") -> Card:
    config = load_config("ddpo_tiny_fast", [f"model.id={model}", f"output={folder}/mine"])
    assert isinstance(config, RunConfig)
    whole = kind == "model"
    return card_of(config, Tuned(folder if whole else folder / "lora", whole=whole), kind, "")


def test_a_model_of_the_hub_is_known_by_the_index_that_training_has_read(cache: Path) -> None:
    made = card("me/clips", cache)
    assert (made.family.name, made.scheduler) == ("wan2.1", INDEX["scheduler"][1])
    assert made.loads_lora and made.fps == 16
    code = example(made)
    assert "FlowMatchEulerDiscreteScheduler" in code and "eta" not in code


def test_of_a_whole_model_it_is_the_models_own_index(cache: Path) -> None:
    saved = {**INDEX, "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"]}
    (cache / "model_index.json").write_text(json.dumps(saved), encoding="utf-8")
    assert "scheduler" not in example(card("me/clips", cache, "model")).lower()


def test_without_an_index_the_catalogue_tells_or_nothing_is_made_up(cache: Path) -> None:
    assert card("flux-dev", cache).family.name == "flux"
    with pytest.raises(UserError, match=r"me/other: which pipeline[^$]*--no-check"):
        card("me/other", cache)
