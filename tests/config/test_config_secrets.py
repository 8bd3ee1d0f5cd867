"""Secrets in a config: taken from the environment, warned about, never written, never guessed."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from diffusion_align.config import (
    ConfigError,
    changes_on_resume,
    differences,
    load_config,
    to_yaml,
)

TOKEN = "hf_cAnaryAbcdefghiJ0123456789"
SMALLEST = """\
model: {id: tiny-sd}
prompts:
  source: [a cat, a dog]
  negative: NEGATIVE
reward: compressibility
algorithm: {name: ddpo}
"""


def written(folder: Path, negative: str, name: str = "mine.yaml") -> Path:
    path = folder / name
    path.write_text(SMALLEST.replace("NEGATIVE", negative), encoding="utf-8")
    return path


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_TOKEN", "x8Kf02mq7Z")
    monkeypatch.setenv("MY_WORDS", "blurry and dark")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("${MY_TOKEN}", "x8Kf02mq7Z"),
        ("https://me:${MY_TOKEN}@host", "https://me:x8Kf02mq7Z@host"),
        ("${MY_WORDS}, ${MY_WORDS}", "blurry and dark, blurry and dark"),
        ("$${MY_TOKEN}", "${MY_TOKEN}"),
        ("$MY_TOKEN costs $5 {x}", "$MY_TOKEN costs $5 {x}"),
        ("${lower}", "${lower}"),
    ],
)
def test_a_reference_takes_its_text_from_the_environment_and_says_nothing(
    text: str, value: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        config = load_config(written(tmp_path, f"'{text}'"))
    assert config.prompts.negative == value


def test_references_work_in_lists_and_overrides(tmp_path: Path) -> None:
    overrides = ["prompts.source=['a ${MY_WORDS} cat', a dog]", "output=${MY_WORDS}"]
    config = load_config(written(tmp_path, "x"), overrides)
    assert config.prompts.source == ["a blurry and dark cat", "a dog"]
    assert config.output == "blurry and dark"


def test_a_variable_that_is_not_set_is_a_problem_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, "'a ${NO_SUCH_THING}'"))
    assert "mine.yaml:4  prompts.negative  the environment variable NO_SUCH_THING" in str(
        caught.value
    )
    assert "export NO_SUCH_THING=" in str(caught.value)


@pytest.mark.parametrize(
    "text", [TOKEN, "see https://me:pw12345@host", "https://h/?token=abc", "x8Kf02mq7Z"]
)
def test_a_value_that_looks_like_a_secret_is_warned_about_without_repeating_it(
    text: str, tmp_path: Path
) -> None:
    with pytest.warns(UserWarning, match="take it from the environment") as warned:
        load_config(written(tmp_path, text))
    (one,) = warned
    assert str(one.message).startswith(f"{tmp_path / 'mine.yaml'}:4  prompts.negative")
    assert text not in str(one.message)


def test_the_record_of_a_run_names_variables_and_loads_back_to_the_same(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, "'by ${MY_TOKEN} in $${MY_TOKEN}'"))
    record = to_yaml(config)
    assert "negative: by ${MY_TOKEN} in $${MY_TOKEN}" in record and "x8Kf02mq7Z" not in record
    path = tmp_path / "record.yaml"
    path.write_text(record, encoding="utf-8")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = load_config(path, [f"output={config.output}"])
    assert again == config


@pytest.mark.filterwarnings("ignore:.*looks like a secret")
def test_a_secret_that_came_from_nowhere_is_not_written_and_its_record_is_refused(
    tmp_path: Path,
) -> None:
    config = load_config(written(tmp_path, f"a {TOKEN}"))
    assert TOKEN not in to_yaml(config)
    path = tmp_path / "record.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "a secret stood here (huggingface-token)" in str(caught.value)
    assert "${MY_SECRET}" in str(caught.value)


def test_an_error_about_a_value_does_not_repeat_a_secret(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught, pytest.warns(UserWarning):
        load_config(written(tmp_path, "x"), [f"train.steps={TOKEN}", f"train.stepz={TOKEN}"])
    assert "***huggingface-token***" in str(caught.value) and TOKEN not in str(caught.value)


@pytest.mark.filterwarnings("ignore:.*looks like a secret")
def test_resuming_compares_what_is_written_so_a_new_password_is_no_change(tmp_path: Path) -> None:
    begun = load_config(written(tmp_path, "at https://me:old-pw@host"), ["output=x"])
    path = tmp_path / "record.yaml"
    path.write_text(to_yaml(begun), encoding="utf-8")
    before = load_config(path, stored=True)
    same = load_config(written(tmp_path, "at https://me:new-pw@host"), ["output=x"])
    assert changes_on_resume(before, same) == []
    other = load_config(written(tmp_path, "at https://me:old-pw@elsewhere"), ["output=x"])
    (change,) = differences(before, other)
    assert change.startswith("prompts.negative: ") and "old-pw" not in change


def test_a_masterpiece_between_asterisks_is_no_lost_secret(tmp_path: Path) -> None:
    text = "'***masterpiece***, ***best-quality***'"
    assert load_config(written(tmp_path, text)).prompts.negative == text.strip("'")
