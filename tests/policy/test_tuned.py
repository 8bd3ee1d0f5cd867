"""What a run left behind, told apart by its files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion_align import UserError
from diffusion_align.policy.tuned import LORA_FILE, Tuned, find_lora, find_tuned


def put(path: Path, content: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")
    return path


def test_a_lora_is_found_by_its_file_its_folder_and_its_run(tmp_path: Path) -> None:
    file = put(tmp_path / "run" / "final" / LORA_FILE)
    put(tmp_path / "run" / "config.yaml")
    for given in (file, file.parent, tmp_path / "run"):
        assert find_tuned(given) == Tuned(file, whole=False)
        assert find_lora(given) == file
    assert find_tuned(file).folder == file.parent


def test_a_lora_of_another_name_is_found_where_it_is_alone(tmp_path: Path) -> None:
    file = put(tmp_path / "my_style.safetensors")
    assert find_tuned(tmp_path) == Tuned(file, whole=False)
    put(tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"which LoRA is meant\? my_style.*, other"):
        find_tuned(tmp_path)
    put(tmp_path / LORA_FILE)
    assert find_tuned(tmp_path).path.name == LORA_FILE


def test_a_whole_model_is_found_by_its_folder_and_its_run(tmp_path: Path) -> None:
    put(tmp_path / "run" / "final" / "model_index.json")
    put(tmp_path / "run" / "metrics.jsonl")
    for given in (tmp_path / "run", tmp_path / "run" / "final"):
        found = find_tuned(given)
        assert found == Tuned(tmp_path / "run" / "final", whole=True)
        assert found.folder == found.path
    with pytest.raises(UserError, match="a whole model, not a LoRA"):
        find_lora(tmp_path / "run")


def test_what_is_neither_says_what_it_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such LoRA or model"):
        find_tuned(tmp_path / "gone")
    with pytest.raises(UserError, match="no LoRA weights and no model"):
        find_tuned(tmp_path)
    with pytest.raises(UserError, match="this file is no LoRA"):
        find_tuned(put(tmp_path / "a.txt"))
    put(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    put(tmp_path / "unet" / "config.json", json.dumps({"_class_name": "UNet2DConditionModel"}))
    with pytest.raises(UserError, match="a UNet2DConditionModel alone"):
        find_tuned(tmp_path / "unet")
    put(tmp_path / "run" / "checkpoints" / "step_000001" / "parameters.safetensors")
    with pytest.raises(UserError, match=r"no final/ yet[^$]*--resume"):
        find_tuned(tmp_path / "run")
