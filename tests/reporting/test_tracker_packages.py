"""The trackers' own packages, where they are installed: what a reader of theirs sees of a run."""

from __future__ import annotations

import json
import os
import sqlite3
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion_align.errors import UserError
from diffusion_align.reporting.trackers import open_trackers

ROOT = Path(__file__).parents[2]
CANARY = "hf_CANARYabcdefghij0123456789"


def look(run: Path, step: int, grey: int) -> Path:
    folder = run / "samples" / f"step_{step:06d}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((6, 5, 3), grey, np.uint8)).save(folder / "p0000_s00.png")
    row = {"path": "p0000_s00.png", "prompt": "a red | circle"}
    (folder / "prompts.jsonl").write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


def killed_and_resumed(run: Path, name: str) -> None:
    """Five steps and a kill, then on from the checkpoint of step 2, with other values."""
    (run / "config.yaml").write_text("reward: compressibility\n")
    trackers = open_trackers((name,), run)
    for step in range(1, 6):
        trackers.log({"step": step, "reward/mean": step / 10, "heldout/taste": 0.25})
        sys.stdout.write(os.environ.get("TO_THE_SCREEN", ""))
    trackers.pictures(2, look(run, 2, 64))
    trackers.pictures(4, look(run, 4, 128))
    trackers.close()
    trackers = open_trackers((name,), run, step=2)
    for step in range(3, 7):
        trackers.log({"step": step, "reward/mean": step / 100})
    trackers.pictures(4, look(run, 4, 200))
    trackers.close()


def test_tensorboard_shows_a_resumed_run_as_one_curve(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    killed_and_resumed(tmp_path, "tensorboard")
    seen = EventAccumulator(
        str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0}
    )
    seen.Reload()
    scalars = [(event.step, round(event.value, 6)) for event in seen.Scalars("reward/mean")]
    assert scalars == [(1, 0.1), (2, 0.2), (3, 0.03), (4, 0.04), (5, 0.05), (6, 0.06)]
    assert [event.step for event in seen.Scalars("heldout/taste")] == [1, 2]
    pictures = seen.Images("samples/p0000_s00")
    assert [(event.step, event.width, event.height) for event in pictures] == [(2, 5, 6), (4, 5, 6)]
    greys = [_grey(event.encoded_image_string) for event in pictures]
    assert greys == [64, 200]  # of step 4 the one of the second sitting
    texts = {
        tag: b"".join(seen.Tensors(tag)[0].tensor_proto.string_val).decode()
        for tag in seen.Tags()["tensors"]
    }
    assert "compressibility" in texts["config/text_summary"]
    assert "a red \\| circle" in texts["samples/captions/text_summary"]


def test_tensorboard_over_a_file_is_refused_with_a_sentence(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    (tmp_path / "tensorboard").write_text("x")
    with pytest.raises(UserError, match="tensorboard did not begin"):
        open_trackers(("tensorboard",), tmp_path)


def test_tensorboard_of_a_run_that_died_before_its_first_checkpoint_begins_anew(
    tmp_path: Path,
) -> None:
    pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for value in (1.0, 2.0):
        trackers = open_trackers(("tensorboard",), tmp_path)
        for step in range(3 if value == 1.0 else 2):
            trackers.log({"step": step, "a": value})
        trackers.close()
    seen = EventAccumulator(str(tmp_path / "tensorboard"))
    seen.Reload()
    assert [(event.step, event.value) for event in seen.Scalars("a")] == [(0, 2.0), (1, 2.0)]


WANDB = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_tracker_packages import killed_and_resumed
killed_and_resumed(Path({run!r}), "wandb")
"""


def test_wandb_offline_keeps_every_row_of_both_sittings_and_no_secret(tmp_path: Path) -> None:
    """In a process of its own, with a secret in its environment and on its command line."""
    pytest.importorskip("wandb", reason="the extra wandb is not installed")
    run = tmp_path / "run"
    run.mkdir()
    code = WANDB.format(tests=str(Path(__file__).parent), run=str(run))
    _python(
        code,
        CANARY,
        WANDB_MODE="offline",
        WANDB_SILENT="true",
        HF_TOKEN=CANARY,
        TO_THE_SCREEN=CANARY,
    )
    run_id = json.loads((run / "trackers.json").read_text())["wandb"]
    sittings = sorted((run / "wandb").glob("offline-run-*"))
    assert len(sittings) == 2 and all(run_id in folder.name for folder in sittings)
    rows = [_wandb_history(next(folder.glob("*.wandb"))) for folder in sittings]
    steps = [[row["step"] for row in sitting if "reward/mean" in row] for sitting in rows]
    assert steps == [[1, 2, 3, 4, 5], [3, 4, 5, 6]]
    last = [row for row in rows[1] if "reward/mean" in row][-1]
    assert last["reward/mean"] == 0.06
    pictures = [row for row in rows[0] if "samples/p0000_s00.caption" in row]
    assert [row["step"] for row in pictures] == [2, 4]
    assert {row["samples/p0000_s00.caption"] for row in pictures} == {"a red | circle"}
    for file in (file for file in run.rglob("*") if file.is_file()):
        assert CANARY.encode() not in file.read_bytes(), file


def _wandb_history(file: Path) -> list[dict[str, Any]]:
    """The rows of an offline run."""
    records: Any = import_module("wandb.proto.wandb_internal_pb2")
    rows = []
    for data in _leveldb_log(file.read_bytes()[7:], 7):
        record = records.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in items})
    return rows


def _leveldb_log(data: bytes, used: int) -> Iterator[bytes]:
    """Records of LevelDB's log format, in which W&B's files are written after a short header.

    Blocks of 32 KiB hold pieces: 4 bytes checksum, 2 length, 1 kind (whole, first, middle, last).
    https://github.com/google/leveldb/blob/main/doc/log_format.md
    """
    whole, last = 1, 4
    at, record = 0, b""
    while at + 7 <= len(data):
        left = 32768 - (at + used) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (whole, last):
            yield record
            record = b""


def test_trackio_keeps_one_run_over_two_sittings(tmp_path: Path) -> None:
    pytest.importorskip("trackio", reason="the extra trackio is not installed")
    run, store = tmp_path / "run", tmp_path / "store"
    run.mkdir()
    code = WANDB.format(tests=str(Path(__file__).parent), run=str(run)).replace(
        '"wandb")', '"trackio")'
    )
    out = _python(code, TRACKIO_DIR=str(store), HF_HUB_OFFLINE="1")
    assert out == ""  # stdout is for results
    name = json.loads((run / "trackers.json").read_text())["trackio"]
    (database,) = store.glob("*.db")
    with sqlite3.connect(database) as connection:
        found = connection.execute(
            "select run_name, step, metrics from metrics order by id"
        ).fetchall()
    assert {row[0] for row in found} == {name}
    metrics = [(step, json.loads(text)) for _, step, text in found]
    assert [step for step, row in metrics if "reward/mean" in row] == [1, 2, 3, 4, 5, 3, 4, 5, 6]
    media = [row["samples/p0000_s00"] for _, row in metrics if "samples/p0000_s00" in row]
    assert [entry["caption"] for entry in media] == ["a red | circle"] * 3


def _grey(png: bytes) -> int:
    import io

    with Image.open(io.BytesIO(png)) as image:
        return int(np.asarray(image.convert("RGB"))[0, 0, 0])


def _python(code: str, *arguments: str, **variables: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), **variables},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
