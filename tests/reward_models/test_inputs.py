"""What to score: files, folders, patterns and tables, in a known order, each item once."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from reward_models.base import RewardError
from reward_models.inputs import Item, find_images, find_items, look, read_prompts, with_prompts

FILES = [
    "b.png",
    "a.JPG",
    "clip.mp4",
    "deep/er/c.webp",
    "deep/d.mov",
    "notes.txt",
    ".hidden.png",
    ".cache/e.png",
    "prompts.jsonl",
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty files, for nothing is opened here; the working folder is their parent."""
    for name in FILES:
        (tmp_path / "media" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "media" / name).write_text("")
    (tmp_path / "media" / "prompts.jsonl").write_text('{"path": "b.png", "prompt": "a bee"}\n')
    monkeypatch.chdir(tmp_path)
    return tmp_path / "media"


def named(items: list[Item]) -> list[str]:
    return [item.path.as_posix() for item in items]


def test_a_folder_gives_its_visible_media_in_the_order_of_names(folder: Path) -> None:
    names = ["a.JPG", "b.png", "clip.mp4", "deep/d.mov", "deep/er/c.webp"]
    assert named(find_items(["media"])) == [f"media/{name}" for name in names]
    images = [f"media/{name}" for name in ("a.JPG", "b.png", "deep/er/c.webp")]
    assert [path.as_posix() for path in find_images(["media"])] == images
    assert named(find_items(["media/.cache"])) == ["media/.cache/e.png"]


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("media/*.png", ["b.png"]),
        ("media/**/*.webp", ["deep/er/c.webp"]),
        ("media/[ab].*", ["a.JPG", "b.png"]),
        ("media/*", ["a.JPG", "b.png", "clip.mp4", "deep/d.mov", "deep/er/c.webp"]),
        ("media/**", ["a.JPG", "b.png", "clip.mp4", "deep/d.mov", "deep/er/c.webp"]),
        ("med?a/deep", ["deep/d.mov", "deep/er/c.webp"]),
    ],
)
def test_a_pattern_gives_the_media_that_it_matches(
    folder: Path, pattern: str, names: list[str]
) -> None:
    assert sorted(named(find_items([pattern]))) == sorted(f"media/{name}" for name in names)


def test_a_pattern_that_names_tables_gives_their_rows(folder: Path) -> None:
    assert find_items(["media/*.jsonl"]) == [
        Item(Path("media/b.png"), "a bee", "media/prompts.jsonl:1")
    ]


def test_a_file_whose_name_looks_like_a_pattern_is_a_file(folder: Path) -> None:
    (folder / "x[1].png").write_text("")
    assert named(find_items(["media/x[1].png"])) == ["media/x[1].png"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("media/gone.png", r"media/gone\.png: no such file or folder"),
        ("media/*.tif", r"media/\*\.tif: this pattern matches nothing"),
        ("media/*.txt", r"media/\*\.txt: this pattern matches no image or video"),
    ],
)
def test_what_is_not_there_is_named(folder: Path, given: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        find_items(["media/b.png", given])


def test_nothing_to_score_is_an_error(folder: Path) -> None:
    (folder / "empty").mkdir()
    with pytest.raises(RewardError, match="no images or videos") as caught:
        find_items([folder / "empty"])
    assert ".mp4" in str(caught.value) and ".png" in str(caught.value)
    with pytest.raises(RewardError, match="no images to score"):
        find_images([folder / "deep" / "d.mov", folder / "empty"][1:])


def test_each_item_comes_once_where_it_stood_first(folder: Path) -> None:
    items = find_items(["media/deep", "media/b.png", "media", "media/b.png"])
    names = ["deep/d.mov", "deep/er/c.webp", "b.png", "a.JPG", "clip.mp4"]
    assert named(items) == [f"media/{name}" for name in names]


def write_rows(path: Path, rows: list[dict[str, str | None]]) -> Path:
    """The same rows in the format that the path's ending names."""
    columns = list(rows[0])
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".csv":
        lines = [",".join(columns), *(",".join(v or "" for v in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        pyarrow.parquet.write_table(
            pyarrow.table({name: [row[name] for row in rows] for name in columns}), path
        )
    return path


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
@pytest.mark.parametrize("column", ["path", "file", "file_name", "image", "video"])
@pytest.mark.parametrize("text", ["prompt", "caption", "text"])
def test_a_table_gives_its_rows_with_their_prompts(
    folder: Path, ending: str, column: str, text: str
) -> None:
    rows: list[dict[str, str | None]] = [
        {column: "b.png", text: "one"},  # beside the table
        {column: "media/clip.mp4", text: None},  # from the working folder
        {column: "b.png", text: "two"},
        {column: "gone.png", text: "three"},
        {column: "b.png", text: "one"},
    ]
    table = write_rows(folder / f"t.{ending}", rows)
    first = 2 if ending == "csv" else 1
    items = find_items([f"media/{table.name}"])
    where = [f"media/{table.name}:{first + index}" for index in range(4)]
    assert items == [
        Item(Path("media/b.png"), "one", where[0]),
        Item(Path("media/clip.mp4"), None, where[1]),
        Item(Path("media/b.png"), "two", where[2]),
        Item(Path("gone.png"), "three", where[3]),
    ]
    assert [item.prompt for item in with_prompts(items, "all")] == ["one", "all", "two", "three"]


def test_every_bad_row_of_a_table_is_named(folder: Path) -> None:
    lines = ['{"path": "b.png"}', '{"prompt": "x"}', "no", '{"path": 3}', '{"path": " "}']
    (folder / "t.jsonl").write_text("\n".join(lines))
    with pytest.raises(RewardError, match=r"t\.jsonl: 4 rows cannot be used") as caught:
        find_items([folder / "t.jsonl"])
    said = str(caught.value)
    assert 't.jsonl:2: a line needs the text "path"' in said and "it has 'prompt'" in said
    assert "t.jsonl:3: is not JSON" in said
    assert 't.jsonl:4: a line needs texts, "path" is int' in said
    assert "t.jsonl:5: a line needs the text" in said
    assert "t.jsonl:1" not in said


def test_many_bad_rows_do_not_flood(folder: Path) -> None:
    (folder / "t.csv").write_text("name\n" + "x\n" * 1000)
    with pytest.raises(RewardError, match="1000 rows cannot be used") as caught:
        find_items([folder / "t.csv"])
    assert len(str(caught.value).splitlines()) < 30
    assert "and 980 more" in str(caught.value)


@pytest.mark.parametrize("content", ["", "path,prompt\n"])
def test_a_table_without_rows_is_named(folder: Path, content: str) -> None:
    (folder / "t.csv").write_text(content)
    with pytest.raises(RewardError, match=r"t\.csv: there is no row in this table"):
        find_items([folder / "t.csv"])


@pytest.mark.parametrize("ending", ["jsonl", "csv", "parquet"])
def test_prompts_come_from_every_kind_of_table(folder: Path, ending: str) -> None:
    rows: list[dict[str, str | None]] = [
        {"image": "b.png", "caption": "a bee"},
        {"image": "other.png", "caption": "elsewhere"},
    ]
    table = write_rows(folder / f"p.{ending}", rows)
    files = [Path("media/b.png"), Path("media/a.JPG")]
    assert read_prompts(table, files) == {Path("media/b.png"): "a bee"}


def test_prompts_that_contradict_each_other_are_all_named(folder: Path) -> None:
    rows = [{"path": "b.png", "prompt": f"number {index // 2}"} for index in range(6)]
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(RewardError, match="4 rows cannot be used") as caught:
        read_prompts(folder / "p.jsonl", [Path("media/b.png")])
    assert "p.jsonl:3: a second prompt for media/b.png" in str(caught.value)
    assert "p.jsonl:6: a second prompt" in str(caught.value)
    assert "by giving the table as PATH" in str(caught.value)


def test_files_of_other_endings_are_counted_by_their_endings(tmp_path: Path) -> None:
    for name in ("a.png", "b.AVIF", "n.txt", "m.TXT", "README", "t.jsonl", ".hidden.txt"):
        (tmp_path / name).write_bytes(b"")
    found = look([tmp_path])
    assert [item.path.name for item in found.items] == ["a.png", "b.AVIF"]
    assert found.left_out_in_words() == (
        "left out: 4 files that are no image or video by the ending (.txt 2, no ending 1, .jsonl 1)"
    )
    assert ".jsonl" not in found.left_out_in_words(but=[tmp_path / "t.jsonl", None])
    assert look([tmp_path / "a.png"]).left_out_in_words() == ""


def test_what_a_pattern_leaves_out_counts_once_and_what_is_asked_for_never(folder: Path) -> None:
    assert look(["media/**", "media", "media/*"]).left_out == [
        Path("media/notes.txt"),
        Path("media/prompts.jsonl"),
    ]
    assert look(["media", "media/prompts.jsonl"]).left_out == [Path("media/notes.txt")]
    given = ["media", "media/notes.txt"]
    assert look(given).left_out_in_words().startswith("left out: 1 file that is no image")
