"""Files to rows: in order, restartable, and one damaged image costs one row."""

from __future__ import annotations

import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models import scoring
from reward_models.base import Reward, RewardError, RewardInfo, Scores
from reward_models.catalogue import ROWS, load
from reward_models.clip_score import CosineReward
from reward_models.clip_tower import ClipTower
from reward_models.composite import CompositeReward
from reward_models.inputs import Item, find_images, find_items, read_prompts
from reward_models.media import read_picture
from reward_models.pixels import Picture
from reward_models.plugin import FunctionReward
from reward_models.read_ahead import Reserve
from reward_models.scoring import score_files


@pytest.fixture
def folder(tmp_path: Path, photo) -> Path:  # type: ignore[no-untyped-def]
    """Seven pictures of two sizes, one damaged, and a text file."""
    pictures = tmp_path / "pictures"
    (pictures / "below").mkdir(parents=True)
    for index in range(6):
        size = (24, 32) if index % 2 else (16, 16)
        Image.fromarray(photo(*size, seed=index)).save(pictures / f"{index}.png")
    content = (pictures / "5.png").read_bytes()
    (pictures / "5.png").write_bytes(content[: len(content) // 2])
    Image.fromarray(photo(16, 16, seed=9)).save(pictures / "below" / "9.JPG", format="JPEG")
    (pictures / "notes.txt").write_text("no picture")
    return pictures


def rewards() -> dict[str, Reward]:
    return {
        "compressibility": load("compressibility"),
        "brightness": FunctionReward(lambda images, prompts: images.mean(dim=(1, 2, 3))),
    }


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


class Interrupted(Exception):
    pass


def test_rows_have_the_documented_shape_and_order(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "scores.jsonl"
    images = find_images([folder / "3.png", folder])
    scored = score_files(images, rewards(), prompts="a cat", out=out, batch_size=4)
    rows = rows_of(out)
    names = ["3.png", "0.png", "1.png", "2.png", "4.png", "5.png", "9.JPG"]
    assert [Path(row["path"]).name for row in rows] == names
    assert [row.path for row in scored] == [row["path"] for row in rows]
    for row in rows:
        assert list(row) == ["path", "prompt", "scores", "error"]
        assert list(row["scores"]) == ["compressibility", "brightness"]
        assert row["prompt"] == "a cat"
    whole = [row for row in rows if row["error"] is None]
    assert len(whole) == 6
    for row in whole:
        pixels = np.asarray(Image.open(row["path"]).convert("RGB"))
        assert row["scores"]["brightness"] == pytest.approx(pixels.mean() / 255, abs=1e-5)


def test_a_damaged_image_costs_one_row(folder: Path, tmp_path: Path) -> None:
    rows = score_files(find_images([folder]), rewards(), out=tmp_path / "s.jsonl")
    damaged = [row for row in rows if row.error]
    assert [Path(row.path).name for row in damaged] == ["5.png"]
    assert "damaged or cut off" in (damaged[0].error or "")
    assert dict(damaged[0].scores) == {"compressibility": None, "brightness": None}


def test_a_nan_score_is_null_and_says_whose(folder: Path) -> None:
    def half_blind(images: Tensor, prompts: Sequence[str]) -> list[float]:
        return [float("nan")] * len(images)

    table = {"blind": FunctionReward(half_blind), "compressibility": load("compressibility")}
    row = score_files([folder / "0.png"], table)[0]
    assert row.scores["blind"] is None and row.scores["compressibility"] is not None
    assert row.error == "could not be scored by blind"


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("kept", range(7))
@pytest.mark.parametrize("tail", ["", '{"path": "pictures/0.p', "}\0{"])
def test_a_killed_run_goes_on_to_the_same_file(
    folder: Path, tmp_path: Path, batch_size: int, kept: int, tail: str
) -> None:
    images, whole, part = find_images([folder]), tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    score_files(images, rewards(), out=whole, batch_size=batch_size)
    lines = whole.read_text().splitlines(keepends=True)
    part.write_text("".join(lines[:kept]) + (tail if kept or tail.startswith("{") else ""))
    again = score_files(images, rewards(), out=part, batch_size=batch_size)
    assert part.read_bytes() == whole.read_bytes()
    assert [row.as_json() + "\n" for row in again] == lines


def test_an_interrupted_run_keeps_its_rows_and_scores_none_twice(
    folder: Path, tmp_path: Path
) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    seen: list[int] = []

    def counted(media: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(len(media))
        return media.mean(dim=(1, 2, 3))

    def stop(done: int, total: int) -> None:
        if done >= 4:
            raise Interrupted

    table = {"counted": FunctionReward(counted)}
    with pytest.raises(Interrupted):
        score_files(images, table, out=out, batch_size=2, progress=stop)
    assert len(rows_of(out)) == 4
    score_files(images, table, out=out, batch_size=2)
    assert len(rows_of(out)) == 7 and sum(seen) == 6  # the seventh is damaged
    score_files(images, table, out=out, batch_size=2)
    assert sum(seen) == 6


def test_a_result_of_other_rewards_is_left_alone(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    score_files(images, rewards(), out=out)
    before = out.read_bytes()
    with pytest.raises(RewardError, match=r"out.jsonl:1: holds scores of brightness, comp"):
        score_files(images, {"compressibility": load("compressibility")}, out=out)
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not json\n", "out.jsonl:1: is not JSON"),
        (b"[1]\n", "out.jsonl:1: is not a JSON object"),
        (b'{"path": "a", "prompt": "", "scores": [], "error": null}\n', "not a row of scores"),
        (b'{"path": ["a"], "prompt": "", "scores": {}}\n', "not a row of scores"),
        (b"\xff\xfe\n", "is not UTF-8"),
    ],
)
def test_a_foreign_file_is_not_continued(
    folder: Path, tmp_path: Path, content: bytes, message: str
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(content)
    with pytest.raises(RewardError, match=message):
        score_files(find_images([folder]), rewards(), out=out)
    assert out.read_bytes() == content


PNG = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR\0\0"
FOREIGN_ROW = b'{"path": "a.png", "prompt": "a", "scores": {"hps": 1.0}, "error": null}'


@pytest.mark.parametrize("rows", [0, 2])
@pytest.mark.parametrize(
    "foreign",
    [
        b'{"my": "data"}',
        b'{"path": "0.png", "prompt": "a list of prompts"}',
        FOREIGN_ROW,
        FOREIGN_ROW + b"\n" + FOREIGN_ROW[:20],
        b"first line\nlast line",
        b"[1, 2]",
        b'{"my": "da\nta"',
        PNG,
    ],
)
def test_a_foreign_file_keeps_every_byte(
    folder: Path, tmp_path: Path, foreign: bytes, rows: int
) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    score_files(images[:rows], rewards(), out=out)
    content = (out.read_bytes() if rows else b"") + foreign
    out.write_bytes(content)
    with pytest.raises(RewardError, match=r"out\.jsonl(:\d)?: "):
        score_files(images, rewards(), out=out)
    assert out.read_bytes() == content


@pytest.mark.parametrize("foreign", [b"one line", b"\x89PNG", b'{"my": "da', b"{"])
def test_an_unfinished_line_alone_must_begin_like_a_row(
    folder: Path, tmp_path: Path, foreign: bytes
) -> None:
    out = tmp_path / "out.jsonl"
    out.write_bytes(foreign)
    with pytest.raises(RewardError, match="not a row of scores") as caught:
        score_files(find_images([folder]), rewards(), out=out)
    assert "another file" in str(caught.value)
    assert out.read_bytes() == foreign


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_a_repaired_image_gets_its_score_in_its_old_place(
    folder: Path, tmp_path: Path, batch_size: int
) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    table = {"brightness": rewards()["brightness"]}
    score_files(images, table, out=out, batch_size=batch_size)
    before = out.read_bytes()
    again = score_files(images, table, out=out, batch_size=batch_size)
    assert out.read_bytes() == before and sum(bool(row.error) for row in again) == 1
    (folder / "5.png").write_bytes((folder / "1.png").read_bytes())
    repaired = score_files(images, table, out=out, batch_size=batch_size)
    assert all(row.error is None for row in repaired)
    lines, old = out.read_bytes().splitlines(), before.splitlines()
    assert [index for index in range(7) if lines[index] != old[index]] == [5]
    whole = tmp_path / "whole.jsonl"
    score_files(images, table, out=whole, batch_size=batch_size)
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out.jsonl",
        "out.jsonl.how.json",
        "pictures",
        "whole.jsonl",
        "whole.jsonl.how.json",
    ]


def test_a_row_without_a_score_is_tried_again(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out.jsonl", [folder / "0.png", folder / "1.png"]

    def blind(media: Tensor, prompts: Sequence[str]) -> list[float]:
        return [float("nan") if prompt == "dark" else 1.0 for prompt in prompts]

    prompts = {images[0]: "dark", images[1]: "light"}
    for _ in range(2):
        rows = score_files(images, {"r": FunctionReward(blind)}, prompts=prompts, out=out)
        assert [row.error for row in rows] == ["could not be scored by r", None]
        assert len(rows_of(out)) == 2
    seeing = FunctionReward(lambda media, texts: [2.0] * len(texts))
    score_files(images, {"r": seeing}, prompts=prompts, out=out)
    assert [row["scores"]["r"] for row in rows_of(out)] == [2.0, 1.0]


def test_an_interrupted_run_keeps_what_was_repaired(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    score_files(images, rewards(), out=out, batch_size=1)
    (folder / "5.png").write_bytes((folder / "1.png").read_bytes())

    def stop(done: int, total: int) -> None:
        if done == 6:
            raise Interrupted

    with pytest.raises(Interrupted):
        score_files(images, rewards(), out=out, batch_size=1, progress=stop)
    assert [row["error"] for row in rows_of(out)] == [None] * 7


def test_odd_prompts_survive_the_file(folder: Path, tmp_path: Path) -> None:
    """Line separators inside a prompt must not cut its row in two."""
    out, prompt = tmp_path / "out.jsonl", 'a "cat"\u2028 猫\x85\n\ttab'
    for _ in range(2):
        score_files([folder / "0.png", folder / "1.png"], rewards(), prompts=prompt, out=out)
    lines = out.read_bytes().decode().strip("\n").split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == [prompt, prompt]


def test_a_file_name_that_is_not_utf8_survives(folder: Path, tmp_path: Path) -> None:
    odd = folder / "odd\udcff.png"
    try:
        odd.write_bytes((folder / "0.png").read_bytes())
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system takes UTF-8 names only")
    out = tmp_path / "out.jsonl"
    first = score_files([odd], rewards(), out=out)
    assert score_files([odd], rewards(), out=out) == first
    assert len(rows_of(out)) == 1 and rows_of(out)[0]["error"] is None


def test_prompts_are_found_from_either_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    images = find_images(["pictures"])
    beside = folder / "prompts.jsonl"
    beside.write_text('{"path": "0.png", "prompt": "zero"}\n\n{"path": "x.png", "prompt": "?"}\n')
    here = tmp_path / "prompts.jsonl"
    here.write_text('{"path": "pictures/1.png", "prompt": "one"}\r\n', newline="")
    assert read_prompts(beside, images) == {Path("pictures/0.png"): "zero"}
    assert read_prompts(here, images) == {Path("pictures/1.png"): "one"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"path": "0.png"}', r"p.jsonl:1: a line needs"),
        ('{"path": "0.png", "prompt": "a"}\n{"path": "0.png", "prompt": "b"}', r"p.jsonl:2: a sec"),
        ("nonsense", r"p.jsonl:1: is not JSON"),
    ],
)
def test_bad_prompt_files_are_named_by_line(folder: Path, content: str, message: str) -> None:
    (folder / "p.jsonl").write_text(content)
    with pytest.raises(RewardError, match=message):
        read_prompts(folder / "p.jsonl", find_images([folder]))
    with pytest.raises(RewardError, match=r"none.jsonl: cannot be read"):
        read_prompts(folder / "none.jsonl", find_images([folder]))


def test_a_reward_that_needs_prompts_says_so_before_any_work(folder: Path, tmp_path: Path) -> None:
    out, images = tmp_path / "out.jsonl", find_images([folder])
    table = {"compressibility": load("compressibility"), "verifier": load("verifier")}
    with pytest.raises(RewardError, match=r"verifier needs a prompt .* and 4 more"):
        score_files(images, table, out=out)
    with pytest.raises(RewardError, match="verifier needs a prompt"):
        score_files(images, table, prompts={images[0]: "a"}, out=out)
    assert not out.exists()


def test_a_prompt_reaches_its_own_picture(folder: Path) -> None:
    images = find_images([folder])
    prompts = {image: str(index) for index, image in enumerate(images)}
    number = FunctionReward(lambda media, texts: [float(text) for text in texts])
    rows = score_files(images, {"number": number}, prompts=prompts, batch_size=5)
    assert [row.scores["number"] for row in rows] == [0, 1, 2, 3, 4, None, 6]


def test_a_reward_of_the_wrong_shape_is_named_and_rows_stay(folder: Path, tmp_path: Path) -> None:
    class Tall:
        info = RewardInfo("tall", "image", False, "", "", "")

        def score(
            self,
            media: Tensor,
            prompts: Sequence[str],
            *,
            fps: float | None = None,
            metadata: Sequence[Mapping[str, Any]] | None = None,
        ) -> Scores:
            wrong = media.shape[-1] == 32
            return Scores(torch.zeros(len(media), 1) if wrong else torch.zeros(len(media)))

    out = tmp_path / "out.jsonl"
    with pytest.raises(RewardError, match=r"reward tall: values has shape \[1, 1\]"):
        score_files(find_images([folder]), {"tall": Tall()}, out=out, batch_size=1)
    assert len(rows_of(out)) == 1


def test_what_cannot_be_scored_is_refused_at_once(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no such file or folder"):
        find_images([folder, tmp_path / "none"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(RewardError, match="no images to score"):
        find_images([tmp_path / "empty"])
    with pytest.raises(RewardError, match="batch size 0"):
        score_files([folder / "0.png"], rewards(), batch_size=0)
    with pytest.raises(RewardError, match="cannot be written"):
        score_files([folder / "0.png"], rewards(), out=folder / "0.png" / "out.jsonl")


def test_a_file_is_read_once_for_all_rewards_and_prompts(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads: list[str] = []

    def counted(path: Path, reserve: Reserve) -> Picture:
        reads.append(path.name)
        return read_picture(path, reserve)

    monkeypatch.setattr(scoring, "read_picture", counted)
    items = [Item(path, text) for path in find_images([folder]) for text in ("a", "b")]
    rows = score_files(items, rewards(), batch_size=14)
    assert [(row.path, row.prompt) for row in rows] == [(str(i.path), i.prompt) for i in items]
    assert sorted(reads) == sorted(path.name for path in find_images([folder]))


@pytest.mark.parametrize("size", [16, 3])
def test_rewards_on_one_tower_embed_every_picture_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    forwards: list[int] = []
    real = ClipTower.image_features

    def counted(tower: ClipTower, pixels: Tensor) -> Tensor:
        forwards.append(len(pixels))
        return real(tower, pixels)

    open_clip = pytest.importorskip("open_clip")
    texts = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    eyes = {"image_size": 32, "layers": 1, "width": 64, "head_width": 32, "patch_size": 16}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tower = ClipTower(open_clip.CLIP(24, eyes, texts))
    once = CosineReward(ROWS["clip"].info, tower)
    twice = CosineReward(ROWS["pickscore"].info, tower, scale=2.0)
    table: dict[str, Reward] = {"once": once, "twice": twice}
    table["sum"] = CompositeReward([(0.5, None, once), (2.0, None, twice)])
    monkeypatch.setattr(ClipTower, "image_features", counted)
    images = find_images([folder])
    alone = score_files(images, {"once": once}, prompts="a cat", batch_size=size)
    groups = list(forwards)
    assert sum(groups) == 6  # the seventh is damaged
    forwards.clear()
    rows = score_files(images, table, prompts="a cat", batch_size=size)
    assert forwards == groups
    for row, single in zip(rows, alone, strict=True):
        if row.error is None:
            cosine = single.scores["once"]
            assert cosine is not None
            known = {"once": cosine, "twice": 2 * cosine, "sum": 4.5 * cosine}
            assert row.scores == pytest.approx(known, rel=1e-5)


def test_the_next_batch_is_read_while_this_one_is_scored(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scorer of the first batch waits for the second to be read: else it would never end."""
    second = threading.Event()

    def watched(path: Path, reserve: Reserve) -> Picture:
        if path.name == "2.png":
            second.set()
        return read_picture(path, reserve)

    monkeypatch.setattr(scoring, "read_picture", watched)
    waiting = FunctionReward(lambda media, prompts: [float(second.wait(5))] * len(media))
    rows = score_files([folder / f"{n}.png" for n in (0, 2)], {"r": waiting}, batch_size=1)
    assert [row.scores["r"] for row in rows] == [1.0, 1.0]


def test_large_pictures_are_scored_in_bounded_groups_with_the_same_scores(
    folder: Path, tmp_path: Path, photo, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    for number in range(10):
        size = (120, 90) if number % 3 else (40, 50)
        Image.fromarray(photo(*size, seed=number)).save(folder / f"large{number}.png")
    seen: list[int] = []

    def brightness(media: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(media.numel() * media.element_size())
        return media.mean(dim=(1, 2, 3))

    images = find_images([folder])
    table: dict[str, Reward] = {"r": FunctionReward(brightness)}
    single = [row.scores for row in score_files(images, table, batch_size=1)]
    seen.clear()
    bound = 2 * 120 * 90 * 3 * 4
    monkeypatch.setattr(scoring, "LARGEST_GROUP", bound)
    monkeypatch.setattr(scoring, "READ_AHEAD", bound)
    whole = score_files(images, table, out=tmp_path / "whole.jsonl", batch_size=16)
    assert max(seen) == bound  # two of the large ones, never three
    for row, alone in zip(whole, single, strict=True):
        if alone["r"] is not None:
            assert row.scores["r"] == pytest.approx(alone["r"], abs=1e-6)
    # Where a run was cut changes nothing: the groups are those of the sizes alone.
    lines = (tmp_path / "whole.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "cut.jsonl").write_text("".join(lines[:5]))
    score_files(images, table, out=tmp_path / "cut.jsonl", batch_size=16)
    assert (tmp_path / "cut.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_missing_file_is_named_with_the_line_of_its_table(folder: Path) -> None:
    (folder / "t.jsonl").write_text('{"path": "0.png"}\n{"path": "gone.png"}\n')
    rows = score_files(find_items([folder / "t.jsonl"]), rewards())
    assert [row.error for row in rows] == [
        None,
        f"gone.png: no such file (named in {folder}/t.jsonl:2)",
    ]


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    def mixed(media: Tensor, prompts: Sequence[str]) -> Tensor:
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return media.std(dim=(1, 2, 3)) * lengths

    table = {"compressibility": load("compressibility"), "mixed": FunctionReward(mixed)}
    items = [Item(path, "x" * n) for n, path in enumerate(find_images([folder]), start=1)]
    alone = score_files(items, table, batch_size=1)
    for batch_size in (2, 3, 16):
        together = score_files(items, table, batch_size=batch_size)
        for one, other in zip(alone, together, strict=True):
            assert one.error == other.error
            if not one.error:
                assert one.scores == pytest.approx(other.scores, rel=1e-5)


def test_a_judge_of_groups_is_refused(folder: Path) -> None:
    class Judge:
        info = RewardInfo("judge", "image", False, "", "", "", scope="group")

        def score(self, media: Tensor, prompts: Sequence[str], **unused: Any) -> Scores:
            raise AssertionError("never asked")

    with pytest.raises(RewardError, match="reward judge: judges all samples of one prompt"):
        score_files([folder / "0.png"], {"judge": Judge()})
