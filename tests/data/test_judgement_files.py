"""Readers of pairs and ratings: every layout, and how each kind of bad file is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from diffusion_align.data.judgement_files import read_pairs, read_ratings
from diffusion_align.data.judgements import Judgements, Pair, Rating
from diffusion_align.errors import UserError

Write = Callable[..., Path]
PICTURES = [f"{name}.png" for name in "abcdef"]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    """Writes a file beside six picture files (whose content no reader looks at)."""
    for name in PICTURES:
        (tmp_path / name).write_bytes(b"")

    def write(content: str | bytes | list[object], name: str = "rows.jsonl") -> Path:
        path = tmp_path / name
        if isinstance(content, list):
            content = "\n".join(json.dumps(row) for row in content)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def pairs(judgements: Judgements) -> list[tuple[str, str, str, dict[str, float]]]:
    rows = [row for row in judgements.rows if isinstance(row, Pair)]
    return [
        (row.prompt, *(p.name for p in row.pictures if isinstance(p, Path)), dict(row.preferred))  # type: ignore[misc]
        for row in rows
    ]


def refused(read: Callable[[Path], Judgements], path: Path) -> str:
    with pytest.raises(UserError) as caught:
        read(path)
    return str(caught.value)


CHOSEN = {"prompt": "a cat", "chosen": "a.png", "rejected": "b.png"}


def test_chosen_and_rejected_prefer_the_chosen(file: Write) -> None:
    read = read_pairs(file([CHOSEN, {**CHOSEN, "weight": 0.5, "user": 7}]))
    assert pairs(read) == [("a cat", "a.png", "b.png", {"overall": 1.0})] * 2
    assert read.weights().tolist() == [1.0, 0.5] and read.notes == ()
    assert read.rows[1].where.endswith("rows.jsonl:2")


@pytest.mark.parametrize(
    ("preferred", "labels"),
    [
        (0.7, {"overall": 0.7}),
        (1, {"overall": 1.0}),
        ("first", {"overall": 1.0}),
        ("Second", {"overall": 0.0}),
        ("tie", {"overall": 0.5}),
        ({"vq": "second", "ta": None, "mq": 0.25}, {"vq": 0.0, "mq": 0.25}),
    ],
)
def test_preferred_is_a_number_a_word_or_one_for_each_attribute(
    file: Write, preferred: object, labels: dict[str, float]
) -> None:
    row = {"prompt": "p", "first": "a.png", "second": "b.png", "preferred": preferred}
    assert pairs(read_pairs(file([row]))) == [("p", "a.png", "b.png", labels)]


def hpd(files: list[str], **labels: object) -> dict[str, object]:
    return {"prompt": "p", "file_path": files, "user_hash": "x", **labels}


@pytest.mark.parametrize("layout", ["list", "one line", "lines"])
def test_hpd_v2_training_files_are_read_whatever_their_line_breaks(
    file: Write, layout: str
) -> None:
    rows = [
        hpd(["a.png", "b.png"], human_preference=[1, 0]),
        hpd(["a.png", "b.png"], human_preference=[0, 1]),
        hpd(["c.png", "d.png"], human_preference=[0.5, 0.5]),
        hpd(["a.png", "b.png", "c.png"], human_preference=[0, 1, 0]),
        hpd(["d.png", "e.png"], human_preference=1),
    ]
    text = {
        "list": json.dumps(rows, indent=2),
        "one line": json.dumps(rows),
        "lines": "\n".join(map(json.dumps, rows)),
    }[layout]
    read = read_pairs(file(text, "train.json"))
    assert pairs(read) == [
        ("p", "a.png", "b.png", {"overall": 1.0}),
        ("p", "a.png", "b.png", {"overall": 0.0}),
        ("p", "c.png", "d.png", {"overall": 0.5}),
        # Of three, the preferred one beats both; nothing is known of the other two.
        ("p", "b.png", "a.png", {"overall": 1.0}),
        ("p", "b.png", "c.png", {"overall": 1.0}),
        ("p", "d.png", "e.png", {"overall": 0.0}),
    ]
    starts = [int(row.where.rpartition(":")[2]) for row in read.rows]
    lines = text.split("\n")
    assert all("prompt" in lines[n - 1] + lines[min(n, len(lines) - 1)] for n in starts)
    assert starts == sorted(starts)


def test_ranks_make_every_pair_and_the_lower_rank_wins(file: Write) -> None:
    row = {"prompt": "p", "image_path": ["a.png", "b.png", "c.png"], "rank": [2, 1, 2]}
    assert pairs(read_pairs(file([row], "test.json"))) == [
        ("p", "a.png", "b.png", {"overall": 0.0}),
        ("p", "a.png", "c.png", {"overall": 0.5}),
        ("p", "b.png", "c.png", {"overall": 1.0}),
    ]


def test_csv_has_a_column_for_each_attribute_and_empty_cells_are_unlabelled(file: Write) -> None:
    text = (
        "prompt,first,second,preferred.vq,preferred.ta,weight\r\n"
        '"a cat,\nsitting",a.png,b.png,first,,2\n'
        "a dog,c.png,d.png,0.25,tie,\n"
    )
    read = read_pairs(file(text, "rows.csv"))
    assert pairs(read) == [
        ("a cat,\nsitting", "a.png", "b.png", {"vq": 1.0}),
        ("a dog", "c.png", "d.png", {"vq": 0.25, "ta": 0.5}),
    ]
    assert [row.where.rpartition(":")[2] for row in read.rows] == ["2", "4"]
    assert read.weights().tolist() == [2.0, 1.0]
    plain = read_pairs(file("prompt,chosen,rejected\np,a.png,b.png\n", "plain.csv"))
    assert pairs(plain) == [("p", "a.png", "b.png", {"overall": 1.0})]


def test_ratings_come_with_or_without_a_prompt(file: Write) -> None:
    rows: list[object] = [
        {"path": "a.png", "rating": 5},
        {"path": "b.png", "prompt": "a dog", "rating": {"sharp": 2.5, "colour": None}},
    ]
    read = read_ratings(file(rows))
    assert read.kind == "ratings" and read.attributes == ("overall", "sharp")
    found = [row for row in read.rows if isinstance(row, Rating)]
    assert [(row.prompt, dict(row.ratings)) for row in found] == [
        ("", {"overall": 5.0}),
        ("a dog", {"sharp": 2.5}),
    ]
    table = read_ratings(file("path,rating\na.png,3.5\n", "r.csv"))
    assert table.labels().tolist() == [[3.5]] and table.prompts == [""]


def test_pictures_lie_beside_the_file_or_in_the_folder_given(file: Write, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "images" / name).write_bytes(b"")
    path = file([CHOSEN])
    beside = read_pairs(path).rows[0].pictures[0]
    inside = read_pairs(path, folder=tmp_path / "images").rows[0].pictures[0]
    assert (beside, inside) == (tmp_path / "a.png", tmp_path / "images" / "a.png")
    absolute = {**CHOSEN, "chosen": str(tmp_path / "c.png")}
    assert read_pairs(file([absolute]), folder=tmp_path / "images").rows[0].pictures[0] == (
        tmp_path / "c.png"
    )


BAD_PAIRS: list[tuple[object, str]] = [
    ([1, 2], "expected an object, found a list"),
    ({"prompt": "p", "chosen": "a.png"}, "no key 'rejected'"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "prefered": 1}, "by 'prefered'"),
    ({**CHOSEN, "prompt": 3}, "'prompt' must be text, found a number"),
    ({**CHOSEN, "prompt": "\ud800"}, "half of a character"),
    ({**CHOSEN, "chosen": ""}, "'chosen' must be the path"),
    ({**CHOSEN, "rejected": "a.png"}, "compared with itself"),
    ({**CHOSEN, "weight": 0}, "weight"),
    ({**CHOSEN, "weight": "much"}, "'weight' must be a number, not text"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "preferred": 1.5}, "is 1.5"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "preferred": True}, "true or false"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "preferred": 10**400}, "401 digits"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "preferred": "frist"}, "mean 'first'"),
    ({"prompt": "p", "first": "a.png", "second": "b.png", "preferred": None}, "no attribute"),
    (hpd(["a.png"], human_preference=[1]), "at least two paths"),
    (hpd(["a.png", "b.png"], human_preference=[1]), "must be 2 numbers"),
    (hpd(["a.png", "b.png"], human_preference=[0, 0]), "add up to 1"),
    (hpd(["a.png", "b.png"], human_preference=[2, -1]), "add up to 1"),
    (hpd(["a.png", "b.png", "c.png"], human_preference=[0.5, 0.5, 0]), "exactly one"),
    (hpd(["a.png", "b.png"], human_preference=2), "must be 2 numbers"),
    (hpd(["a.png", "a.png"], human_preference=[0, 1]), "compared with itself"),
]


@pytest.mark.parametrize(("row", "message"), BAD_PAIRS)
def test_a_damaged_row_is_named_with_its_line(file: Write, row: object, message: str) -> None:
    path = file([CHOSEN, row])
    text = refused(read_pairs, path)
    assert text.startswith(f"{path}:2: damaged rows (1)\n    line 2: ")
    assert message in text


def test_all_damaged_rows_are_reported_at_once_or_left_out_aloud(file: Write) -> None:
    path = file('{"prompt": 1\n\n' + json.dumps(CHOSEN) + "\n[]\n" + "{}\n" * 20)
    text = refused(read_pairs, path)
    assert "damaged rows (22)" in text and "line 1: not JSON" in text and "line 4: " in text
    assert "and 10 more" in text
    read = read_pairs(path, damaged="skip")
    assert len(read) == 1
    assert read.notes == (f"left out 22 damaged rows of {path}, the first on line 1",)
    with pytest.raises(UserError, match="refuse or skip"):
        read_pairs(path, damaged="ignore")  # type: ignore[arg-type]


def test_items_of_a_json_list_are_counted_because_lines_say_little(file: Write) -> None:
    rows = [hpd(["a.png", "b.png"], human_preference=[1, 0])] * 3
    text = json.dumps([*rows, hpd(["a.png", "b.png"], human_preference=[0, 0])])
    assert "line 1: item 4: 'human_preference'" in refused(read_pairs, file(text, "train.json"))
    cut = json.dumps(rows, indent=1)[:-40]
    assert f"line {cut.count(chr(10)) + 1}: not JSON" in refused(read_pairs, file(cut, "t.json"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt,chosen,chosen\np,a.png,b.png\n", "line 1: two columns have one name"),
        ("prompt,first,second,preferred,preferred.x\np,a.png,b.png,1,1\n", "not both"),
        ("prompt,chosen,rejected\np,a.png\n", "line 2: 2 cells under 3 columns"),
        ('prompt,chosen,rejected\n"p,a.png,b.png\n', "line 2: not CSV"),
        ("prompt,chosen\np,a.png\n", "line 2: no key 'rejected'"),
    ],
)
def test_damaged_csv_is_refused(file: Write, text: str, message: str) -> None:
    assert message in refused(read_pairs, file(text, "rows.csv"))


def test_missing_pictures_are_reported_together_and_skipped_only_when_asked(file: Write) -> None:
    rows = [CHOSEN] + [{**CHOSEN, "rejected": f"gone{n}.png"} for n in range(8)]
    rows.append({**CHOSEN, "rejected": "x" * 5000})  # longer than any file system allows
    path = file([*rows])
    text = refused(read_pairs, path)
    assert f"{path}: 9 of 11 picture files are not there" in text
    assert "gone0.png" in text and "and 4 more" in text and "gone7.png" not in text
    read = read_pairs(path, missing="skip")
    assert len(read) == 1
    assert read.notes == (f"left out 9 of 10 judgements of {path}: 9 picture files are not there",)
    with pytest.raises(UserError, match="no judgement in it"):
        read_pairs(file([rows[1]]), missing="skip")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"path": "a.png"}, "no key 'rating'"),
        ({"path": "a.png", "ratng": 3}, "by 'ratng'"),
        ({"path": "a.png", "rating": "good"}, "must be a number, not text"),
        ({"path": "a.png", "rating": {"": 3}}, "no name"),
        ({"path": 5, "rating": 3}, "'path' must be the path"),
    ],
)
def test_a_damaged_rating_is_named(file: Write, row: object, message: str) -> None:
    assert message in refused(read_ratings, file([row]))


def test_nan_in_json_is_no_rating(file: Write) -> None:
    assert "is nan" in refused(read_ratings, file('{"path": "a.png", "rating": NaN}'))


def test_files_that_cannot_hold_rows_are_refused(file: Write, tmp_path: Path) -> None:
    assert "no such file" in refused(read_pairs, tmp_path / "none.jsonl")
    assert "a folder" in refused(read_pairs, tmp_path)
    assert "not '.txt'" in refused(read_pairs, file("x", "rows.txt"))
    assert "no judgement in it" in refused(read_pairs, file("\n\n"))
    assert "no judgement in it" in refused(read_pairs, file("[]", "empty.json"))
    assert "not UTF-8" in refused(read_pairs, file(b'{"prompt": "caf\xe9"}'))
