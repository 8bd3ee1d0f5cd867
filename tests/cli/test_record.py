"""A run started from Python has no config: its run.json says what it was trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusion_align.assemble.pictures import record_of
from diffusion_align.policy.tuned import Tuned


def test_the_record_is_found_beside_final(tmp_path: Path) -> None:
    record = {"algorithm": "ddpo", "trained_on": ["taste"], "prompts": ["a red circle"]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    final = tmp_path / "final"
    final.mkdir()
    found = record_of(Tuned(final, whole=True))
    assert found == {"trained_on": ["taste"], "prompts": ["a red circle"]}


@pytest.mark.parametrize("text", ["", "[]", '{"trained_on": 3}'])
def test_a_damaged_record_is_no_record(tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    assert record_of(Tuned(tmp_path, whole=True)) is None
