"""A resumed run does not meet other files under the names it began with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion_align.assemble import inputs
from diffusion_align.assemble.inputs import look_at_inputs, write_inputs
from diffusion_align.config import load_config
from diffusion_align.errors import UserError
from diffusion_align.training.run_folder import RunFolder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with files of one's own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "p.txt").write_text("a red circle\na blue square\n", encoding="utf-8")
    (tmp_path / "held.txt").write_text("a green circle\n", encoding="utf-8")
    (tmp_path / "mine.py").write_text("def score(images, prompts): ...\n", encoding="utf-8")
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "pytorch_lora_weights.safetensors").write_bytes(b"weights")
    (tmp_path / "pairs.jsonl").write_text("{}\n", encoding="utf-8")
    return tmp_path


def policy_run(*more: str) -> Any:
    own = ["prompts.source=p.txt", "evaluation.prompts=held.txt", "output=run"]
    return load_config("demo", [*own, "lora.path=lora", "lora.rank=null", *more])


def begun(config: Any) -> None:
    write_inputs(RunFolder(Path("run")), look_at_inputs(config, resume=False, say=print))


def resumed(config: Any) -> list[str]:
    said: list[str] = []
    look_at_inputs(config, resume=True, say=said.append)
    return said


def test_unchanged_files_are_not_mentioned(place: Path) -> None:
    begun(policy_run())
    (place / "lora" / "report.html").write_text("made later", encoding="utf-8")
    assert resumed(policy_run()) == []
    record = json.loads((place / "run" / "inputs.json").read_text(encoding="utf-8"))
    assert set(record) == {"prompts.source", "evaluation.prompts", "lora.path"}


@pytest.mark.parametrize(
    ("key", "file"),
    [("prompts.source", "p.txt"), ("lora.path", "lora/pytorch_lora_weights.safetensors")],
)
def test_what_is_learnt_from_must_be_the_same(place: Path, key: str, file: str) -> None:
    begun(policy_run())
    (place / file).write_bytes((place / file).read_bytes() + b"more\n")
    with pytest.raises(UserError, match=rf"changed since it began: {key}: [^$]*--new"):
        resumed(policy_run())


def test_judgements_must_be_the_same(place: Path) -> None:
    def config() -> Any:
        return load_config(
            "reward_small_world_hps", ["data.source=pairs.jsonl", "data.limit=null", "output=run"]
        )

    begun(config())
    assert resumed(config()) == []
    (place / "pairs.jsonl").write_text("{ }\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"data\.source: pairs\.jsonl"):
        resumed(config())


def test_ones_own_code_and_what_is_only_looked_at_may_change_and_are_told(place: Path) -> None:
    """Whoever mends a reward that failed must be able to go on."""
    begun(policy_run("reward=mine:score"))
    (place / "mine.py").write_text("def score(images, prompts): return 1\n", encoding="utf-8")
    (place / "held.txt").write_text("a grey circle\n", encoding="utf-8")
    said = resumed(policy_run("reward=mine:score"))
    assert [line.split(": ")[1] for line in said] == ["evaluation.prompts", "reward (code)"]


def test_a_trained_reward_must_be_the_same(place: Path) -> None:
    (place / "r").mkdir()
    (place / "r" / "reward.safetensors").write_bytes(b"first")
    begun(policy_run("reward=0.5*taste + 0.5*tiny-hps"))
    assert "reward" not in json.loads((place / "run" / "inputs.json").read_text())
    config = policy_run()
    object.__setattr__(config, "reward", str(place / "r"))
    begun(config)
    (place / "r" / "reward.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="changed since it began: reward: "):
        resumed(config)


def test_a_run_without_the_record_goes_on(place: Path) -> None:
    assert resumed(policy_run()) == []


def test_a_large_file_is_known_by_its_size_and_by_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "WHOLE", 1 << 21)
    file = tmp_path / "weights.bin"
    blob = bytearray(5 << 20)
    file.write_bytes(blob)
    first = inputs._contents(file)
    assert inputs._contents(file) == first
    for where in (0, len(blob) // 2, len(blob) - 1):
        changed = bytearray(blob)
        changed[where] = 1
        file.write_bytes(changed)
        assert inputs._contents(file) != first
    file.write_bytes(blob + b"\0")
    assert inputs._contents(file) != first
