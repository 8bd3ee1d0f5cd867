"""Judgements of a config: what is held out is really held out, or it is said."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion_align.assemble.reward_run import load_judgements
from diffusion_align.data.judgement_options import JudgementOptions
from diffusion_align.errors import UserError


def pairs(folder: Path, name: str, rows: list[tuple[str, str, str]]) -> str:
    for row in rows:
        for picture in row[1:]:
            Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(folder / picture)
    lines = [json.dumps({"prompt": p, "chosen": a, "rejected": b}) for p, a, b in rows]
    (folder / name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(folder / name)


def test_rows_held_out_that_share_a_prompt_or_a_picture_are_counted(tmp_path: Path) -> None:
    source = pairs(tmp_path, "a.jsonl", [("one", "1.png", "2.png"), ("two", "3.png", "4.png")])
    held = pairs(
        tmp_path,
        "b.jsonl",
        [("one", "5.png", "6.png"), ("three", "3.png", "7.png"), ("four", "8.png", "9.png")],
    )
    learnt, held_out = load_judgements(JudgementOptions(source, validation=held), seed=0)
    assert held_out is not None and len(held_out) == 3
    assert learnt.notes == ("2 of 3 rows held out share a prompt or picture with training",)


def test_a_file_that_holds_nothing_out_is_refused(tmp_path: Path) -> None:
    source = pairs(tmp_path, "a.jsonl", [("one", "1.png", "2.png"), ("two", "3.png", "4.png")])
    with pytest.raises(UserError, match="nothing is held out"):
        load_judgements(JudgementOptions(source, validation=source), seed=0)


def test_other_rows_need_no_note(tmp_path: Path) -> None:
    source = pairs(tmp_path, "a.jsonl", [("one", "1.png", "2.png")])
    held = pairs(tmp_path, "b.jsonl", [("two", "3.png", "4.png")])
    learnt, _ = load_judgements(JudgementOptions(source, validation=held), seed=0)
    assert learnt.notes == ()
