"""Tables: what is written reads back, others' files are understood, every bad row is named."""

from __future__ import annotations

import builtins
import csv
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from reward_models.base import RewardError
from reward_models.table_files import TableRow, read_table, write_table, write_whole

ODD = 'a "cat", at\r\nnight;\tor\rso\u2028 猫 \x85'
COLUMNS = ["path", "prompt", "a", "b/part", "error"]
ROWS: list[dict[str, Any]] = [
    {"path": "0.png", "prompt": ODD, "a": 0.1 + 0.2, "b/part": -1e-300, "error": None},
    {"path": "1.png", "prompt": "", "a": None, "error": "cut\n    off"},
]


def written(path: Path) -> list[dict[str, Any]]:
    write_table(path, COLUMNS, {"a", "b/part"}, ROWS)
    return [dict(row.values) for row in read_table(path)]


def test_parquet_is_what_pyarrow_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    written(path)
    table = pyarrow.parquet.read_table(path)
    assert table.column_names == COLUMNS
    assert [str(table.schema.field(name).type) for name in ("a", "error")] == ["double", "string"]
    assert table.to_pylist() == [{**dict.fromkeys(COLUMNS), **row} for row in ROWS]


def test_csv_is_what_pythons_own_reader_reads(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    written(path)
    with path.open(newline="", encoding="utf-8") as stream:
        head, *rows = csv.reader(stream)
    assert head == COLUMNS
    assert rows[0] == ["0.png", ODD, "0.30000000000000004", "-1e-300", ""]
    assert rows[1] == ["1.png", "", "", "", "cut\n    off"]
    assert path.read_bytes().startswith(b"path,prompt,a,b/part,error\n")


def test_a_table_of_others_is_read(tmp_path: Path) -> None:
    (tmp_path / "excel.csv").write_bytes(
        '\ufeffpath,"prompt"\r\n\r\n"0,1.png","a\r\nb"\r\nx,\r\n'.encode()
    )
    assert list(read_table(tmp_path / "excel.csv")) == [
        TableRow(f"{tmp_path}/excel.csv:3", {"path": "0,1.png", "prompt": "a\r\nb"}),
        TableRow(f"{tmp_path}/excel.csv:5", {"path": "x", "prompt": None}),
    ]
    (tmp_path / "t.JSONL").write_text('\ufeff{"path": "a"}\r\n\n{"path": "b"}')
    assert [(row.where[-2:], row.values) for row in read_table(tmp_path / "t.JSONL")] == [
        (":1", {"path": "a"}),
        (":3", {"path": "b"}),
    ]


def test_of_parquet_only_the_wanted_columns_are_read(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"path": ["a", "b"], "bytes": [b"x", b"y"]}), path)
    rows = list(read_table(path, ["path", "prompt"]))
    assert rows == [TableRow(f"{path}:1", {"path": "a"}), TableRow(f"{path}:2", {"path": "b"})]
    without = list(read_table(path, ["file"]))
    assert [row.where for row in without] == [f"{path}:1", f"{path}:2"]


@pytest.mark.parametrize(
    ("name", "content", "problems"),
    [
        (
            "t.jsonl",
            b'{"a": 1}\nno\n[1]\n{"a": 2}\n',
            {2: "is not JSON", 3: "is not a JSON object"},
        ),
        ("t.jsonl", b"[" * 100_000, {1: "is not JSON"}),
        ("t.csv", b'a,b\n1,2\n3\n"4\n5",6\n7,8,9\n', {3: "has 1 cells", 6: "has 3 cells under 2"}),
    ],
)
def test_every_malformed_row_is_named_and_the_others_are_read(
    tmp_path: Path, name: str, content: bytes, problems: dict[int, str]
) -> None:
    (tmp_path / name).write_bytes(content)
    rows = list(read_table(tmp_path / name))
    found = {int(row.where.rpartition(":")[2]): row.problem for row in rows if row.problem}
    assert set(found) == set(problems)
    assert all(words in found[line] for line, words in problems.items())
    assert all(row.values for row in rows if not row.problem)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.csv", b'a,b\n1,2\n"3,4\n', r"t\.csv:3: is not CSV"),
        ("t.csv", b"a,a\n1,2\n", r"t\.csv:1: two columns are called 'a'"),
        ("t.csv", b"path;prompt\nx;y\n", r"t\.csv:1: cells are not separated by commas"),
        ("t.csv", b"a\nb\n\xff\n", r"t\.csv:3: is not UTF-8 \(byte 4\)"),
        ("t.jsonl", b'{"a": 1}\n"\xff"\n', r"t\.jsonl:2: is not UTF-8"),
        ("t.parquet", b"PAR1 nothing PAR1", r"t\.parquet: is not a parquet file"),
        ("t.parquet", b"", r"t\.parquet: is not a parquet file"),
    ],
)
def test_what_is_no_table_is_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RewardError, match=message):
        list(read_table(tmp_path / name))


@pytest.mark.parametrize("name", ["none.csv", "none.jsonl", "none.parquet"])
def test_a_missing_table_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(RewardError, match=f"{name}: cannot be read"):
        list(read_table(tmp_path / name))


def test_without_pyarrow_the_message_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any, **options: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError("No module named 'pyarrow'")
        return real(name, *rest, **options)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(RewardError, match="parquet files need pyarrow") as caught:
        list(read_table(tmp_path / "t.parquet"))
    assert "pip install pyarrow" in str(caught.value)


def test_a_file_is_replaced_whole_and_stays_what_it_was(tmp_path: Path) -> None:
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    target.write_text("old")
    target.chmod(0o640)
    link.symlink_to(target)
    write_whole(link, b"new")
    assert link.is_symlink() and target.read_text() == "new"
    assert target.stat().st_mode & 0o777 == 0o640
    (tmp_path / "folder").mkdir()
    with pytest.raises(RewardError, match="folder: cannot be written"):
        write_whole(tmp_path / "folder", b"new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "link.csv", "target.csv"]


def test_a_long_cell_is_read(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text(f"path,prompt\na,{'x' * 200_000}\n")
    assert [len(row.values["prompt"]) for row in read_table(path)] == [200_000]


def test_a_name_that_is_not_utf8_can_be_written_in_every_format(tmp_path: Path) -> None:
    rows = [{"path": "odd\udcff.png"}]
    for name in ("t.csv", "t.parquet"):
        write_table(tmp_path / name, ["path"], (), rows)
        assert [row.values["path"] for row in read_table(tmp_path / name)] == ["odd\\udcff.png"]
    assert json.loads('"odd\\udcff.png"') == rows[0]["path"]
