"""`score` and `rewards`, called as from a shell: what goes in, what comes out, exit codes."""

from __future__ import annotations

import csv
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image

import reward_models.catalogue
from diffusion_align.assemble import loading, pictures
from diffusion_align.commands import progress, tables
from diffusion_align.commands.progress import Pace, bar

ROOT = Path(__file__).resolve().parents[2]
Call = Callable[..., Any]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Five noisy pictures, one of them cut off, in a working folder of their own."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pics").mkdir()
    rng = np.random.default_rng(0)
    for index in range(5):
        pixels = rng.integers(0, 40 * (index + 1), (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "pics" / f"{index}.png")
    content = (tmp_path / "pics" / "4.png").read_bytes()
    (tmp_path / "pics" / "4.png").write_bytes(content[:500])
    return tmp_path


def summary(stdout: str) -> dict[str, dict[str, str]]:
    """The table of a run by reward."""
    lines = [line.split("\t") for line in stdout.splitlines() if "\t" in line]
    return {row[0]: dict(zip(lines[0][1:], row[1:], strict=True)) for row in lines[1:]}


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_scores_are_written_and_summed_up(call: Call, ending: str) -> None:
    done = call("score", "pics", "--reward", "compressibility", "--out", f"s.{ending}")
    assert done.exit_code == 0, done.stderr
    assert f"4 of 5 scored: s.{ending}" in done.stdout
    assert done.stderr.count("4.png") == 1 and "damaged or cut off" in done.stderr
    if ending == "jsonl":
        lines = Path("s.jsonl").read_text().splitlines()
        values = [json.loads(line)["scores"]["compressibility"] for line in lines]
    elif ending == "csv":
        with Path("s.csv").open(newline="") as stream:
            cells = [row["compressibility"] for row in csv.DictReader(stream)]
        values = [float(cell) if cell else None for cell in cells]
    else:
        table = pyarrow.parquet.read_table("s.parquet")
        values = table.column("compressibility").to_pylist()
    known = np.array([value for value in values if value is not None])
    facts = summary(done.stdout)["compressibility"]
    assert (facts["count"], facts["failed"]) == ("4", "1")
    for name, value in {
        "mean": known.mean(),
        "std": known.std(ddof=1),
        "min": known.min(),
        "median": np.median(known),
        "max": known.max(),
    }.items():
        assert float(facts[name]) == pytest.approx(float(value), rel=1e-3)


def test_files_of_other_endings_are_told_in_one_line(call: Call) -> None:
    (Path("pics") / "notes.txt").write_text("no picture")
    (Path("pics") / "p.jsonl").write_text('{"path": "0.png", "prompt": "a cat"}\n')
    words = ("score", "pics", "--reward", "compressibility", "--prompts", "pics/p.jsonl")
    done = call(*words, "--out", "pics/s.csv")
    assert done.exit_code == 0 and "4 of 5 scored" in done.stdout
    told = [line for line in done.stderr.splitlines() if line.startswith("left out")]
    assert told == ["left out: 1 file that is no image or video by the ending (.txt 1)"]


def test_nothing_scored_is_exit_code_2(call: Call) -> None:
    done = call("score", "pics/4.png", "--reward", "compressibility", "--sheet", "sheet.png")
    assert done.exit_code == 2
    assert "0 of 1 scored: scores.jsonl" in done.stdout and "pics/4.png" in done.stderr
    assert not Path("sheet.png").exists()
    assert summary(done.stdout)["compressibility"]["mean"] == "-"


def test_a_score_of_one_reward_is_enough(call: Call) -> None:
    done = call("score", "pics/0.png", "pics/1.png", "--reward", "compressibility,flicker")
    assert done.exit_code == 0
    assert "2 of 2 scored" in done.stdout
    assert "pics/0.png and 1 more: flicker: scores videos, and this is an image" in done.stderr


def test_a_table_is_scored_with_its_own_prompts(call: Call) -> None:
    Path("t.csv").write_text(
        "file_name,caption\npics/0.png,a small red circle at the top left on a white background\n"
        "pics/0.png,a large blue square at the top left on a white background\npics/1.png,\n"
    )
    prompt = "a large green square at the top left on a white background"
    words = ("score", "t.csv", "--reward", "taste", "--prompt", prompt)
    done = call(*words)
    assert done.exit_code == 0, done.stderr
    rows = [json.loads(line) for line in Path("scores.jsonl").read_text().splitlines()]
    assert [row["prompt"][:7] for row in rows] == ["a small", "a large", "a large"]
    assert rows[2]["prompt"] == prompt
    assert [row["path"] for row in rows] == ["pics/0.png", "pics/0.png", "pics/1.png"]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_prompts_come_from_a_table(call: Call, ending: str) -> None:
    table = Path(f"p.{ending}")
    table.write_text(
        "path,prompt\npics/0.png,a cat\n"
        if ending == "csv"
        else '{"path": "pics/0.png", "prompt": "a cat"}\n'
    )
    done = call("score", "pics/0.png", "--reward", "compressibility", "--prompts", table)
    assert done.exit_code == 0, done.stderr
    assert json.loads(Path("scores.jsonl").read_text())["prompt"] == "a cat"


def test_sums_are_rewards_and_parts_are_kept_on_request(call: Call) -> None:
    total = "2*compressibility + 0.5*incompressibility"
    words = ("score", "pics/0.png", "--reward", f"{total}, compressibility")
    done = call(*words, "--parts")
    assert done.exit_code == 0, done.stderr
    scores = json.loads(Path("scores.jsonl").read_text())["scores"]
    parts = [f"{total}/compressibility", f"{total}/incompressibility"]
    assert list(scores) == [total, *parts, "compressibility"]
    assert scores[total] == pytest.approx(1.5 * scores["compressibility"], rel=1e-6)
    assert list(summary(done.stdout)) == [total, "compressibility", *parts]
    assert call(*words, "--out", "plain.jsonl").exit_code == 0
    assert list(json.loads(Path("plain.jsonl").read_text())["scores"]) == [
        total,
        "compressibility",
    ]


def test_a_sum_and_its_parts_fail_together(call: Call) -> None:
    total = "2*compressibility + 0.5*incompressibility"
    facts = summary(call("score", "pics", "--reward", total, "--parts").stdout)
    counts = {name: (row["count"], row["failed"]) for name, row in facts.items()}
    names = [total, f"{total}/compressibility", f"{total}/incompressibility"]
    assert counts == dict.fromkeys(names, ("4", "1"))


def test_a_name_is_written_in_one_way(call: Call) -> None:
    done = call("score", "pics/0.png", "--reward", "Compressibility,inCompressibility")
    assert done.exit_code == 0, done.stderr
    row = json.loads(Path("scores.jsonl").read_text())
    assert list(row) == ["path", "prompt", "scores", "error"]
    assert list(row["scores"]) == ["compressibility", "incompressibility"]
    again = call("score", "pics/0.png", "--reward", "compressibility, INcompressibility")
    assert "1 of 1 scored" in again.stdout


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("tiny-clip,Tiny_Clip", "tiny-clip"),
        ("clip,clipscore", "clip"),
        ("flicker,flicker", "flicker"),
        ("2*compressibility+flicker, 2 * compressibility + flicker", "2*compressibility + flicker"),
    ],
)
def test_a_reward_in_two_spellings_is_one_reward(call: Call, words: str, name: str) -> None:
    done = call("score", "pics/0.png", "--prompt", "x", "--reward", words)
    assert done.exit_code == 2
    assert f"a reward is named twice: {name}" in done.stderr
    assert not Path("scores.jsonl").exists()


def test_other_options_are_not_mixed_into_a_result(call: Call) -> None:
    words = ("score", "pics/0.png", "--reward", "compressibility")
    assert call(*words, "--frames", "all").exit_code == 0
    before = Path("scores.jsonl").read_bytes()
    done = call(*words, "--frames", "first")
    assert done.exit_code == 2
    assert "scores.jsonl: made with --frames all, now first" in done.stderr
    assert Path("scores.jsonl").read_bytes() == before


def test_a_sheet_is_drawn(call: Call) -> None:
    words = ("score", "pics", "--reward", "compressibility,incompressibility")
    done = call(*words, "--sheet", "out/sheet.png", "--sheet-count", 1)
    assert done.exit_code == 0, done.stderr
    with Image.open("out/sheet.png") as sheet:
        small = sheet.size
    call(*words, "--sheet", "out/sheet.png", "--sheet-count", 2)
    with Image.open("out/sheet.png") as sheet:
        assert sheet.width > small[0] and sheet.height == small[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("gone.png",), "gone.png: no such file or folder"),
        (("gone/*.png",), "gone/*.png: this pattern matches nothing"),
        (("bad.csv",), "bad.csv:3: has 1 cells under 2 headings"),
        (("pics", "--prompts", "bad.csv"), "bad.csv:3: has 1 cells"),
        (("pics", "--prompts", "gone.csv"), "gone.csv: no such file"),
        (("pics", "--out", "s.xlsx"), "s.xlsx: scores are not written as .xlsx"),
        (("pics", "--out", "bad.csv"), "bad.csv"),
        (("pics", "--sheet", "s.gif"), "s.gif: a sheet is not written as .gif"),
        (("pics", "--sheet", "pics"), "pics"),
        (("pics", "--frames", "unifrom:8"), "'unifrom:8' is no choice of frames"),
        (("pics", "--pool", "max"), "'max' is no way to pool frames"),
        (("pics",), "verifier needs a prompt for every image"),
        (("pics", "--device", "gpu"), "unknown device 'gpu'"),
    ],
)
def test_mistakes_are_answered_before_any_weights_are_loaded(
    call: Call, monkeypatch: pytest.MonkeyPatch, words: Sequence[str], message: str
) -> None:
    def never(*args: object, **options: object) -> None:
        raise AssertionError("a reward was loaded")

    monkeypatch.setattr(reward_models.catalogue, "load", never)
    monkeypatch.setattr(loading, "load_rewards", never)
    monkeypatch.setattr(pictures, "load_rewards", never)
    Path("bad.csv").write_text("path,prompt\npics/0.png,a\npics/1.png\n")
    before = Path("bad.csv").read_bytes()
    prompt = () if "verifier" in message else ("--prompt", "x") if "--prompts" not in words else ()
    done = call("score", *words, *prompt, "--reward", "verifier")
    assert done.exit_code == 2, done.exception
    assert message in done.stderr
    assert "Traceback" not in done.stderr and not Path("scores.jsonl").exists()
    assert Path("bad.csv").read_bytes() == before


def test_tables_and_files_are_checked_before_torch_is_imported(elsewhere: Path) -> None:
    Path("bad.jsonl").write_text('{"prompt": "x"}\n')
    program = (
        "import sys; from diffusion_align.cli import main\n"
        "sys.argv = ['', 'score', 'bad.jsonl', '--reward', 'taste']\n"
        "try: main()\nexcept SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert done.stdout.strip() == "2 False", done.stderr
    assert "bad.jsonl:1: a line needs the text" in done.stderr


@pytest.mark.parametrize("out", ["s.jsonl", "s.csv"])
def test_ctrl_c_says_where_the_rows_are(
    call: Call, monkeypatch: pytest.MonkeyPatch, out: str
) -> None:
    from reward_models import scoring

    read, count = scoring.read_picture, iter(range(100))

    def interrupted(path: Path, reserve: Any) -> Any:
        if next(count) == 2:
            raise KeyboardInterrupt
        return read(path, reserve)

    monkeypatch.setattr(scoring, "read_picture", interrupted)
    words = ("score", "pics", "--reward", "compressibility", "--out", out, "--batch-size", 1)
    done = call(*words)
    assert done.exit_code == 130
    kept = "s.csv.partial.jsonl" if out == "s.csv" else out
    assert f"Rows so far are in {kept}" in done.stderr
    assert len(Path(kept).read_text().splitlines()) == 2
    monkeypatch.setattr(scoring, "read_picture", read)
    assert "4 of 5 scored" in call(*words).stdout
    assert Path(out).exists() and Path(kept).exists() == (out == "s.jsonl")


def test_many_failures_do_not_flood(call: Call) -> None:
    for index in range(80):
        (Path("pics") / f"broken{index:02d}.png").write_bytes(b"")
    done = call("score", "pics", "--reward", "compressibility")
    assert done.exit_code == 0
    assert "broken10.png" in done.stderr and "and 31 more; see error in" in done.stderr
    assert summary(done.stdout)["compressibility"]["failed"] == "81"


def test_rewards_lists_what_matters_tab_separated(call: Call) -> None:
    lines = [line.split("\t") for line in call("rewards").stdout.splitlines() if "\t" in line]
    heads, rows = lines[0], {line[0]: line for line in lines[1:]}
    short = ["reward", "input", "gradient", "prompt", "MB", "installed"]
    assert heads == [*short, "range", "licence", "source"]
    assert set(rows) == set(reward_models.catalogue.names())
    assert all(len(row) == len(heads) for row in rows.values())
    assert rows["aesthetic"][heads.index("MB")] == "1714"
    assert rows["compressibility"][2:6] == ["-", "-", "-", "yes"]
    assert rows["flicker"][1] == "video"
    assert rows["hpsv2.1"][heads.index("source")].startswith("https://")


def test_presets_are_listed(call: Call) -> None:
    from reward_models.presets import describe

    lines = call("rewards", "--presets").stdout.splitlines()
    assert [tuple(line.split("\t")) for line in lines if "\t" in line][1:] == describe()


@pytest.mark.parametrize("width", [40, 80, 300])
def test_a_narrow_terminal_still_shows_every_word(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], width: int
) -> None:
    monkeypatch.setattr(tables.sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")  # of a dumb one rich believes no width
    rows = [("name-one", "image", "12", "some long words " * 8), ("b", "video", "7", "few")]
    tables.show_records(("reward", "input", "MB", "range"), rows, short=3, numbers=["MB"])
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out)
    assert all(len(line.rstrip()) <= width for line in shown.splitlines())
    for word in ("name-one", "image", "12", "video", "few", "MB"):
        assert word in shown
    assert shown.split().count("long") == 8


def test_the_pace_is_that_of_the_last_seconds() -> None:
    pace = Pace()
    pace.tell(0.0, 0)
    assert pace.words(1000) == ""
    pace.tell(0.01, 500)  # what an earlier run did
    for second in range(1, 101):
        pace.tell(float(second), 500 + 2 * second)
    assert pace.words(1000) == "2/s, 2:30 left"
    assert pace.words(700) == "2/s"


def test_without_a_terminal_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str],
) -> None:
    now = iter(range(0, 1000, 4))
    with bar("scoring", clock=lambda: float(next(now))) as tell:
        for done in range(0, 11):
            tell(done, 10)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "scoring 2/10, 4 s each, 0:32 left"
    assert len(lines) == 3  # every 12 of 44 seconds
    assert progress._BETWEEN == 10.0
