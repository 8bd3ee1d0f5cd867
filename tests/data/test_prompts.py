"""Prompt lists: what is read, and how each kind of bad file is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusion_align.data.prompts import ANIMALS, Prompt, load_prompts
from diffusion_align.errors import UserError

Write = Callable[..., Path]


@pytest.fixture
def file(tmp_path: Path) -> Write:
    def write(content: str | bytes, name: str = "prompts.txt") -> Path:
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
        return path

    return write


def texts(source: object) -> list[str]:
    return [prompt.text for prompt in load_prompts(source)]  # type: ignore[arg-type]


def refused(source: object) -> str:
    with pytest.raises(UserError) as caught:
        load_prompts(source)  # type: ignore[arg-type]
    return str(caught.value)


def test_text_files_hold_one_literal_prompt_per_line(file: Write) -> None:
    path = file("a cat\n\n  # not a comment  \r\nline\u2028inside\rold mac\n")
    assert texts(path) == ["a cat", "# not a comment", "line\u2028inside", "old mac"]
    assert texts(str(path)) == texts(path)


def test_a_byte_order_mark_is_no_part_of_the_first_prompt(file: Write) -> None:
    assert texts(file("\ufeffa cat\nein Bär\n")) == ["a cat", "ein Bär"]
    assert texts(file(b'\xef\xbb\xbf{"prompt": "a cat"}', "p.jsonl")) == ["a cat"]


def test_jsonl_rows_bring_negative_prompts_and_metadata(file: Write) -> None:
    rows = (
        '{"prompt": " a cat ", "negative_prompt": "blurry", "seed": 3, "tags": ["x"]}\n\n'
        '{"prompt": "a dog", "negative_prompt": null}\n'
    )
    first, second = load_prompts(file(rows, "p.jsonl"))
    assert first == Prompt("a cat", "blurry", {"seed": 3, "tags": ["x"]})
    assert second == Prompt("a dog")


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.text(st.characters(exclude_categories=["Cs", "Cc"]), min_size=1).filter(str.strip),
        min_size=1,
        max_size=8,
        unique_by=str.strip,
    )
)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[str]
) -> None:
    path = tmp_path_factory.mktemp("prompts") / "p.txt"
    path.write_bytes("\n".join(lines).encode("utf-8"))
    assert texts(path) == [line.strip() for line in lines]


def test_lists_may_mix_strings_and_prompts() -> None:
    assert load_prompts([" a cat ", Prompt("a dog", "blurry")]) == [
        Prompt("a cat"),
        Prompt("a dog", "blurry"),
    ]


def test_the_animals_are_the_45_of_the_ddpo_paper() -> None:
    assert texts("animals") == list(ANIMALS)
    assert len(set(ANIMALS)) == 45
    assert {"cat", "dog", "horse", "llama", "kangaroo"} <= set(ANIMALS)


def test_the_held_out_small_world_never_meets_the_training_split() -> None:
    train, heldout = set(texts("small-world:600")), set(texts("small-world:heldout:600"))
    assert len(train) == len(heldout) == 600
    assert not train & heldout


def test_small_world_lists_grow_without_changing_their_beginning() -> None:
    assert len(texts("small-world")) == 256
    assert len(texts("small-world:heldout")) == 128
    assert texts("small-world:heldout:40") == texts("small-world:heldout")[:40]


@pytest.mark.parametrize(
    "name", ["small-world:held-out", "small-world:0", "small-world:heldout:-1", "small-world:x:3"]
)
def test_unknown_small_world_lists_say_what_there_is(name: str) -> None:
    assert name in refused(name)


def test_a_missing_file_suggests_the_nearest_name(file: Write) -> None:
    path = file("a cat", "animals_mine.txt")
    message = refused(path.with_name("animal_mine.txt"))
    assert "no such prompt file or list" in message
    assert f"did you mean {path} ?" in message
    assert "did you mean animals ?" in refused("animal")
    assert "did you mean small-world" in refused("smallworld")


def test_a_prompt_in_the_place_of_a_file_is_explained() -> None:
    assert '["a red circle on the moon"]' in refused("a red circle on the moon")


@pytest.mark.parametrize("content", ["", "\n \n\t\n", "\ufeff"])
def test_empty_files_are_refused(file: Write, content: str) -> None:
    assert "prompts.txt: there is no prompt in it" in refused(file(content))
    assert "there is no prompt in it" in refused(file(content, "p.jsonl"))
    assert "there is no prompt in it" in refused([])


def test_bytes_that_are_not_utf8_are_named_with_offset_and_line(file: Write) -> None:
    message = refused(file("ein Hund\nein Bär\n".encode("latin-1")))
    assert "prompts.txt:2: byte 14 (0xe4) is not UTF-8" in message
    assert "Latin-1" in message


def test_utf16_files_are_recognised(file: Write) -> None:
    assert "UTF-16" in refused(file("a cat\n".encode("utf-16")))


def test_duplicates_are_refused_with_all_their_lines(file: Write) -> None:
    message = refused(file("cat\ndog\n cat\n\nbird\ndog\ncat\n"))
    assert "duplicate prompts (2)" in message
    assert "lines 3, 7 repeat line 1: 'cat'" in message
    assert "line 6 repeats line 2: 'dog'" in message
    assert "item 2 repeats item 1: 'a'" in refused(["a", "a "])


def test_all_malformed_rows_are_named_at_once(file: Write) -> None:
    rows = [
        '{"prompt": "fine"}',
        '{"prompt": "cut',
        '["a list"]',
        '{"promt": "a cat"}',
        '{"prompt": 3}',
        '{"prompt": "  "}',
        '{"prompt": "x", "negative_prompt": ["y"]}',
        '{"prompt": "fine"}',
        '{"prompt": "half \\ud83d"}',
        "[" * 100_000,
        '{"prompt": "n", "seed": ' + "9" * 5000 + "}",
    ]
    message = refused(file("\n".join(rows), "p.jsonl"))
    assert "malformed rows and duplicate prompts (10)" in message
    for expected in (
        "line 2: not JSON",
        "line 3: expected an object",
        "line 4: no key 'prompt'; did you mean it by 'promt' ?",
        "line 5: 'prompt' must be text, found a number",
        "line 6: 'prompt' is empty",
        "line 7: 'negative_prompt' must be text, found a list",
        "line 8 repeats line 1: 'fine'",
        "line 9: contains half of a character",
        "line 10: not",
        "line 11: not",
    ):
        assert expected in message


def test_a_long_list_of_problems_is_cut(file: Write) -> None:
    message = refused(file("{}\n" * 500, "p.jsonl"))
    assert "(500)" in message
    assert "... and 488 more" in message


@pytest.mark.parametrize("items", [["a", 3], ["a", ""], [None]])
def test_items_that_are_no_prompts_are_refused(items: list[object]) -> None:
    assert "malformed rows (1)" in refused(items)


def test_folders_and_other_endings_are_refused(file: Write, tmp_path: Path) -> None:
    assert "a folder, not a prompt file" in refused(tmp_path)
    assert "end in .txt or .jsonl, not in '.csv'" in refused(file("a,b", "p.csv"))
