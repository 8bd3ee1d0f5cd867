"""Scores as JSON lines, CSV and parquet: the same rows, the same after any interruption."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models.base import Reward, RewardError, RewardInfo, Scores
from reward_models.inputs import find_images
from reward_models.plugin import FunctionReward
from reward_models.result_record import record_of
from reward_models.rows import Results, ScoredFile, journal_of
from reward_models.scoring import score_files

ENDINGS = ["jsonl", "csv", "parquet"]


@pytest.fixture
def folder(tmp_path: Path, photo) -> Path:  # type: ignore[no-untyped-def]
    """Seven pictures of two sizes, one damaged."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for index in range(7):
        size = (24, 32) if index % 2 else (16, 16)
        Image.fromarray(photo(*size, seed=index)).save(pictures / f"{index}.png")
    (pictures / "5.png").write_bytes((pictures / "5.png").read_bytes()[:200])
    return pictures


class Halves:
    """Brightness with the two halves of the picture as parts; nothing for dark ones."""

    info = RewardInfo("halves", "image", False, "", "", "")

    def score(self, media: Tensor, prompts: Sequence[str], **unused: Any) -> Scores:
        left, right = (half.mean(dim=(1, 2, 3)) for half in media.tensor_split(2, dim=-1))
        values = (left + right) / 2
        return Scores(values, {"left": left, "right": right.where(values > 0.2, torch.nan)})


def rewards() -> dict[str, Reward]:
    return {
        "brightness": FunctionReward(lambda images, prompts: images.mean(dim=(1, 2, 3))),
        "halves": Halves(),
    }


def entries(path: Path) -> list[dict[str, Any]]:
    """The rows of a result as plain JSON rows, read by other libraries than ours."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_bytes().splitlines()]
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [_numbers(row) for row in csv.DictReader(stream)]
    else:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    return [
        {
            "path": row.pop("path"),
            "prompt": row.pop("prompt") or "",
            "error": row.pop("error"),
            "scores": row,
        }
        for row in rows
    ]


def _numbers(row: dict[str, str]) -> dict[str, Any]:
    texts = ("path", "prompt", "error")
    return {k: (v if k in texts else float(v)) if v else None for k, v in row.items()}


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_every_format_holds_the_same_rows(folder: Path, tmp_path: Path, ending: str) -> None:
    found = {}
    for name in ("lines.jsonl", f"table.{ending}"):
        score_files(find_images([folder]), rewards(), prompts="a, b", out=tmp_path / name)
        found[name] = entries(tmp_path / name)
    assert found["lines.jsonl"] == found[f"table.{ending}"]
    assert len(found["lines.jsonl"]) == 7
    assert not journal_of(tmp_path / f"table.{ending}").exists()
    columns = (
        pyarrow.parquet.read_schema(tmp_path / "table.parquet").names
        if ending == "parquet"
        else (tmp_path / "table.csv").read_text().splitlines()[0].split(",")
    )
    assert columns == ["path", "prompt", "brightness", "halves", "error"]


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("kept", [0, 2, 4, 6])
def test_a_killed_run_goes_on_to_the_same_bytes(
    folder: Path, tmp_path: Path, ending: str, kept: int, parts: bool
) -> None:
    """SIGKILL, in a process of its own: nothing is tidied up."""
    images, whole, part = find_images([folder]), tmp_path / f"w.{ending}", tmp_path / f"p.{ending}"
    first = score_files(images, rewards(), out=whole, batch_size=2, parts=parts)

    def killed(done: int, total: int) -> None:
        if done >= kept:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        try:
            score_files(images, rewards(), out=part, batch_size=2, parts=parts, progress=killed)
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    lines = part if ending == "jsonl" else journal_of(part)
    assert lines.exists() == bool(kept)
    if kept:
        with lines.open("ab") as stream:  # what a write that was cut off leaves
            stream.write(b'{"path": "pictures/')
    again = score_files(images, rewards(), out=part, batch_size=2, parts=parts)
    assert part.read_bytes() == whole.read_bytes()
    assert again == first
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(
        ["pictures", *(f"{out.name}{end}" for out in (whole, part) for end in ("", ".how.json"))]
    )


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_finished_table_is_continued_and_not_touched_without_need(
    folder: Path, tmp_path: Path, ending: str
) -> None:
    out, images, calls = tmp_path / f"t.{ending}", find_images([folder]), []

    def counted(media: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(media))
        return media.mean(dim=(1, 2, 3))

    table = {"r": FunctionReward(counted)}
    first = score_files(images[:3], table, out=out, batch_size=1)
    before = out.stat().st_mtime_ns, out.read_bytes()
    assert score_files(images[:3], table, out=out, batch_size=1) == first
    assert (out.stat().st_mtime_ns, out.read_bytes()) == before and len(calls) == 3
    score_files(images, table, out=out, batch_size=1)
    assert len(calls) == 6  # the seventh is damaged
    assert [entry["path"] for entry in entries(out)] == list(map(str, images))
    Image.new("RGB", (8, 8), (51, 51, 51)).save(folder / "5.png")
    score_files(images, table, out=out, batch_size=1)
    repaired = entries(out)
    assert [entry["path"] for entry in repaired] == list(map(str, images))
    assert repaired[5]["scores"]["r"] == pytest.approx(0.2) and repaired[5]["error"] is None


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_result_of_other_rewards_is_refused_and_left(
    folder: Path, tmp_path: Path, ending: str
) -> None:
    out, images = tmp_path / f"t.{ending}", find_images([folder])
    score_files(images, rewards(), out=out)
    before = out.read_bytes()
    other = {"brightness": rewards()["brightness"]}
    with pytest.raises(RewardError, match="holds scores of brightness, halves, not of brightness"):
        score_files(images, other, out=out)
    assert out.read_bytes() == before and not journal_of(out).exists()


@pytest.mark.parametrize("ending", ENDINGS[1:])
def test_a_journal_of_other_rewards_is_refused_and_left(
    folder: Path, tmp_path: Path, ending: str
) -> None:
    out = tmp_path / f"t.{ending}"
    journal = journal_of(out)
    journal.write_text('{"path": "a", "prompt": "", "scores": {"x": 1.0}, "error": null}\n')
    before = journal.read_bytes()
    with pytest.raises(RewardError, match=r"partial\.jsonl:1: holds scores of x"):
        score_files(find_images([folder]), rewards(), out=out)
    assert journal.read_bytes() == before and not out.exists()


@pytest.mark.parametrize(
    "content",
    [
        "path,prompt\na.png,a cat\n",
        "a,b\n",
        "path,prompt,r,error\n",
        "path,prompt,r,error\na,,much,\n",
        "path,prompt,r,s,error\na,,1,2,\n",
        "path,prompt,r,error\na,,1\n",
        "nothing at all",
    ],
)
def test_a_foreign_csv_keeps_every_byte(folder: Path, tmp_path: Path, content: str) -> None:
    out = tmp_path / "t.csv"
    out.write_text(content)
    with pytest.raises(RewardError, match=r"t\.csv"):
        score_files(find_images([folder]), {"r": rewards()["brightness"]}, out=out)
    assert out.read_text() == content and not journal_of(out).exists()


def test_parts_are_written_behind_their_reward_when_asked(folder: Path, tmp_path: Path) -> None:
    dark = folder / "dark.png"
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(dark)
    images = [folder / "0.png", folder / "5.png", dark]
    rows = score_files(images, rewards(), parts=True, out=tmp_path / "t.csv")
    names = ["brightness", "halves", "halves/left", "halves/right"]
    assert list(rows[0].scores) == names
    assert (tmp_path / "t.csv").read_text().startswith(f"path,prompt,{','.join(names)},error\n")
    left, right = rows[0].scores["halves/left"], rows[0].scores["halves/right"]
    assert left is not None and right is not None
    assert rows[0].scores["halves"] == pytest.approx((left + right) / 2)
    assert list(rows[1].scores) == ["brightness", "halves"]  # nothing is known of its parts
    assert rows[2].scores["halves/right"] is None and rows[2].error is None
    assert list(score_files(images, rewards())[0].scores) == ["brightness", "halves"]


def test_rows_with_parts_do_not_go_behind_rows_without(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "t.jsonl", [folder / "0.png", folder / "2.png"]
    score_files(images[:1], rewards(), out=out, batch_size=1)
    before = out.read_bytes()
    for several in (images, images[:1]):  # also where no row is missing
        with pytest.raises(RewardError, match="made with no --parts, now with"):
            score_files(several, rewards(), out=out, batch_size=1, parts=True)
    assert out.read_bytes() == before
    record_of(out).unlink()  # as an older program left it
    with pytest.raises(RewardError, match="its rows hold no sub-scores, and --parts asks") as no:
        score_files(images, rewards(), out=out, batch_size=1, parts=True)
    assert "leave --parts out" in str(no.value) and out.read_bytes() == before
    out.unlink()
    score_files(images[:1], rewards(), out=out, parts=True)
    with pytest.raises(RewardError, match="made with --parts, now without"):
        score_files(images, rewards(), out=out)
    record_of(out).unlink()
    with pytest.raises(RewardError, match="holds scores of brightness, halves, halves/left"):
        score_files(images, rewards(), out=out)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("finished", [True, False])
def test_a_result_is_not_continued_in_another_way(
    folder: Path, tmp_path: Path, ending: str, finished: bool
) -> None:
    out, images = tmp_path / f"t.{ending}", find_images([folder])

    def stop(done: int, total: int) -> None:
        if done and not finished:
            raise KeyboardInterrupt

    try:
        score_files(images[:2], rewards(), out=out, frames="all", batch_size=1, progress=stop)
    except KeyboardInterrupt:
        lines = out if ending == "jsonl" else journal_of(out)
        with lines.open("ab") as stream:  # a torn line goes only when the work goes on
            stream.write(b'{"path": "pictures/')
    before = everything(tmp_path)
    assert record_of(out).name in before
    for other, words in (
        ({"frames": "first"}, "made with --frames all, now first"),
        ({"frames": "all", "pool": "min"}, "made with --pool mean, now min"),
        ({"pool": "min"}, "--frames all, now uniform:8, and --pool mean, now min"),
    ):
        with pytest.raises(RewardError, match=words) as refused:
            score_files(images, rewards(), out=out, **other)  # type: ignore[arg-type]
        assert "name another file for the result, or remove this one" in str(refused.value)
        assert everything(tmp_path) == before
    score_files(images, rewards(), out=out, frames="all", batch_size=1)
    assert len(entries(out)) == 7
    out.unlink()  # what the refusal proposes; the record is written anew with the first row
    score_files(images, rewards(), out=out, frames="first")
    score_files(images, rewards(), out=out, frames="first")


def test_an_older_result_is_taken_as_it_is(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "t.jsonl", find_images([folder])
    score_files(images[:2], rewards(), out=out)
    record_of(out).unlink()
    score_files(images, rewards(), out=out, frames="first")
    assert len(entries(out)) == 7
    assert not record_of(out).exists()  # nobody knows how its first rows were made


@pytest.mark.parametrize("content", ["{}", "[1]", "no JSON", '{"frames": 1, "files": []}'])
def test_a_foreign_record_is_refused_and_left(folder: Path, tmp_path: Path, content: str) -> None:
    out, images = tmp_path / "t.jsonl", find_images([folder])
    score_files(images[:2], rewards(), out=out)
    record_of(out).write_text(content)
    before = everything(tmp_path)
    with pytest.raises(RewardError, match=r"t\.jsonl\.how\.json: does not say how t\.jsonl"):
        score_files(images, rewards(), out=out)
    assert everything(tmp_path) == before


@pytest.mark.parametrize("name", ["{run}", "{run}/reward.safetensors", "2*{run} + compressibility"])
def test_a_reward_trained_anew_at_the_same_path_is_another_one(tmp_path: Path, name: str) -> None:
    run, out = tmp_path / "run", tmp_path / "t.csv"
    run.mkdir()
    (run / "reward.safetensors").write_bytes(b"first")
    name = name.format(run=run)

    def once() -> Results:
        results = Results(out, [name])
        results.made_with(frames="all", pool="mean")
        return results

    results = once()
    results.add([ScoredFile("x", "", {name: 1.0})])
    results.close(complete=True)
    assert once().get("x", "") is not None
    before = everything(tmp_path)
    (run / "reward.safetensors").write_bytes(b"second")
    with pytest.raises(RewardError, match=r"made with an earlier .*run.*, which has changed since"):
        once()
    assert everything(tmp_path) == before


def test_names_with_slashes_are_not_taken_for_parts(tmp_path: Path) -> None:
    results = Results(tmp_path / "t.csv", ["a", "a/b"], parts=True)
    results.add([ScoredFile("x", "", {"a": 1.0, "a/c": 2.0, "a/b": 3.0, "a/b/d": 4.0})])
    results.close(complete=True)
    head = (tmp_path / "t.csv").read_text().splitlines()[0]
    assert head == "path,prompt,a,a/c,a/b,a/b/d,error"
    assert Results(tmp_path / "t.csv", ["a", "a/b"], parts=True).get("x", "") is not None


@pytest.mark.parametrize("ending", ENDINGS)
def test_odd_prompts_and_names_are_known_again(folder: Path, tmp_path: Path, ending: str) -> None:
    odd = folder / "odd\udcff.png"
    try:
        odd.write_bytes((folder / "0.png").read_bytes())
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    out, prompt = tmp_path / f"t.{ending}", 'a "cat",\u2028 猫\x85\r\n\ttab\r'
    for _ in range(2):
        score_files([odd, folder / "0.png"], rewards(), prompts=prompt, out=out)
    assert len(entries(out)) == 2
    assert {entry["prompt"] for entry in entries(out)} == {prompt}


def test_an_unknown_ending_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"t\.xlsx: scores are not written as \.xlsx") as caught:
        Results(tmp_path / "t.xlsx", ["r"])
    assert ".parquet" in str(caught.value)
    with pytest.raises(RewardError, match="a reward cannot be called 'prompt'"):
        Results(tmp_path / "t.csv", ["prompt"])
