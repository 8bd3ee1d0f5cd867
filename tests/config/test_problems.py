"""Every mistake is answered: all at once, with its place, and what was probably meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffusion_align.config import ConfigError, copy_config, load_config
from diffusion_align.errors import UserError

SMALLEST = """\
model:
  id: tiny-sd
prompts:
  source: animals
reward: compressibility
algorithm:
  name: ddpo
"""


def report(folder: Path, text: str | bytes, *overrides: str, name: str = "mine.yaml") -> str:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def test_all_problems_are_told_at_once_in_the_order_of_the_file(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        "model:\n  id: tinysd\n"
        "prompts:\n  source: animals\n"
        "reward: compresibility\n"
        "algorithm:\n  name: ddpo\n  clip_unit: meen\n  train_batch_sise: 4\n"
        "train:\n  learning_rte: 1e-4\n  steps: many\n"
        "evaluation:\n  seeds: 0\n  batch_size: 0\n  rewards: [tast]\n"
        "sede: 1\n",
    )
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    found = [re.findall(r":(\d+)  (\S+)", head)[0] for head in heads[:-1]]
    assert found == [
        ("2", "model.id"),
        ("5", "reward"),
        ("8", "algorithm.clip_unit"),
        ("9", "algorithm.train_batch_sise"),
        ("11", "train.learning_rte"),
        ("12", "train.steps"),
        ("14", "evaluation.seeds"),
        ("15", "evaluation.batch_size"),
        ("16", "evaluation.rewards"),
        ("17", "sede"),
    ]
    assert heads[-1].startswith("10 problems found, nothing was loaded.")
    for meant in ("tiny-sd", "compressibility", "mean", "train.learning_rate", "taste", "seed"):
        assert re.search(rf"did you mean +{meant} ?\?", text), meant


def test_the_hint_gives_type_and_default(tmp_path: Path) -> None:
    text = report(tmp_path, f"{SMALLEST}train:\n  learning_rte: 1e-4\n")
    assert "mine.yaml:9  train.learning_rte  unknown key" in text
    assert "did you mean  train.learning_rate ?   (number, default 0.0003)" in text
    assert "1 problem found" in text


def test_a_key_in_the_wrong_place_is_shown_its_own(tmp_path: Path) -> None:
    text = report(tmp_path, f"{SMALLEST}rank: 4\ntrain:\n  clip_range: 1\n")
    assert "did you mean  lora.rank ?" in text
    assert "did you mean  algorithm.clip_range ?" in text


def test_a_mistyped_section_is_one_problem(tmp_path: Path) -> None:
    text = report(tmp_path, SMALLEST.replace("prompts:", "promts:"))
    assert "did you mean  prompts ?" in text
    assert "1 problem found" in text


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    text = report(tmp_path, "seed: 1\n")
    for section in ("model", "prompts", "reward", "algorithm"):
        assert re.search(rf"^mine\.yaml.*  {section}  missing|  {section}  missing", text), section
    assert "prompts.source" in report(tmp_path, SMALLEST.replace("source: animals", "negative: x"))
    unnamed = report(tmp_path, SMALLEST.replace("name: ddpo", "inner_epochs: 1"))
    assert "algorithm.name  missing" in unnamed


def test_an_unknown_algorithm_hides_no_other_typo(tmp_path: Path) -> None:
    text = report(tmp_path, SMALLEST.replace("name: ddpo", "name: dppo\n  clip_rnge: 1"))
    assert "unknown algorithm 'dppo'" in text
    assert "did you mean  ddpo ?" in text
    assert "did you mean  algorithm.clip_range ?" in text


def test_batches_that_do_not_divide_show_the_arithmetic_and_the_nearest_that_do() -> None:
    overrides = ["prompts_per_iteration=8", "samples_per_prompt=4", "train_batch_size=12"]
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"algorithm.{word}" for word in overrides])
    text = str(caught.value)
    assert "32 samples do not split into batches of 12" in text
    assert "8, 16" in text
    assert "1 problem found" in text


def test_minibatches_that_do_not_split_into_updates_show_the_arithmetic() -> None:
    overrides = [
        "algorithm.prompts_per_iteration=8",
        "algorithm.samples_per_prompt=4",
        "algorithm.train_batch_size=8",
        "algorithm.inner_epochs=2",
        "train.accumulation=3",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    text = str(caught.value)
    assert "train.accumulation" in text
    assert "= 8 minibatches do not split into updates of 3" in text
    assert "2, 4" in text


@pytest.mark.parametrize(
    "typo", ["algorithm.train_batch_size=twelve", "algorithm.train_batch_sise=12"]
)
def test_a_typo_drags_no_phantom_arithmetic_behind_it(typo: str) -> None:
    # With the default batch size of 8, 3 x 3 samples would not divide; but that was not said.
    overrides = ["algorithm.prompts_per_iteration=3", "algorithm.samples_per_prompt=3", typo]
    with pytest.raises(ConfigError) as caught:
        load_config("demo", overrides)
    assert "do not split" not in str(caught.value)


@pytest.mark.parametrize(
    "typo",
    [
        "algorithm.prompts_per_iteration=three",
        "algorithm.samples_per_promt=3",
        "algorithm.buffer_sise=8",
        "algorithm.clip_unit=natts",
    ],
)
def test_a_typo_drags_no_rule_over_several_keys_behind_it(typo: str) -> None:
    overrides = [
        "algorithm.train_batch_size=5",
        "algorithm.buffer_min_count=64",
        "algorithm.clip_range=1.5",
    ]
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [typo, *overrides])
    found = {problem.key for problem in caught.value.problems}
    independent = {
        "prompts": "algorithm.train_batch_size",
        "samples": "algorithm.train_batch_size",
        "buffer": "algorithm.buffer_min_count",
        "clip": "algorithm.clip_range",
    }
    spoilt = next(key for word, key in independent.items() if f".{word}" in typo)
    assert found == {typo.partition("=")[0], *independent.values()} - {spoilt}


def test_values_out_of_range_are_told_with_their_lines_and_once(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        f"{SMALLEST}  train_batch_size: 5\n  kl_weight: -1\n  inner_epochs: 0\n"
        "train:\n  learning_rate: -1e-4\n  accumulation: 3\n"
        "lora:\n  rank: 0\n",
    )
    lines = text.replace(f"{tmp_path}/", "").splitlines()
    heads = [line for line in lines if not line.startswith(" ")]
    assert heads[:-1] == [
        "mine.yaml:8  algorithm.train_batch_size  8 prompts x 4 samples = 32 samples do not split "
        "into batches of 5",
        "mine.yaml:9  algorithm.kl_weight  must be at least 0, not -1.0",
        "mine.yaml:10  algorithm.inner_epochs  must be at least 1, not 0",
        "mine.yaml:12  train.learning_rate  must be above 0, not -0.0001",
        "mine.yaml:15  lora.rank  must be at least 1, not 0",
    ]


def test_python_and_a_config_get_the_same_sentence() -> None:
    from diffusion_align.algorithms.options import DDPOOptions
    from diffusion_align.errors import OptionError

    with pytest.raises(OptionError) as written:
        DDPOOptions(prompts_per_iteration=8, samples_per_prompt=4, train_batch_size=12)
    keys = {"prompts_per_iteration": 8, "samples_per_prompt": 4, "train_batch_size": 12}
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"algorithm.{key}={value}" for key, value in keys.items()])
    (problem,) = caught.value.problems
    assert problem.key == f"algorithm.{written.value.where}"
    assert (problem.what, problem.hint) == (written.value.what, written.value.fix)


@pytest.mark.parametrize("value", ["0", "-4"])
@pytest.mark.parametrize(
    "key",
    [
        "algorithm.train_batch_size",
        "algorithm.prompts_per_iteration",
        "algorithm.samples_per_prompt",
        "algorithm.inner_epochs",
        "train.accumulation",
        "train.steps",
        "sampling.batch_size",
        "evaluation.seeds",
    ],
)
def test_counts_below_one_are_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        load_config("demo", [f"{key}={value}"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.steps", "is not an override"),
        ("=3", "is not an override"),
        ("train..steps=3", "is not an override"),
        ("--train.steps=3", "overrides have no dashes: train.steps=3"),
        ("train.steps=", "no value after '='"),
        ("train.steps=[1, 2", "not YAML"),
        ("train.steps=*anchor", "not YAML"),
        ("train.steps=!!python/name:os.system", "tag"),
        ("train=3", "is a section"),
        ("seed.x=3", "is not a whole number"),
        ("model.id.x=3", "a mapping is not text"),
        ("base=demo", "unknown key"),
    ],
)
def test_a_bad_override_is_answered_on_the_command_line(override: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [override])
    text = str(caught.value)
    assert text.startswith("command line  ")
    assert said in text


def test_overrides_are_answered_in_their_order() -> None:
    with pytest.raises(ConfigError) as caught:
        load_config("demo", ["b=1", "train.steps=x", "a=1"])
    heads = [line for line in str(caught.value).splitlines() if line.startswith("command line")]
    assert [head.split()[2] for head in heads] == ["b", "train.steps", "a"]


def test_a_key_written_twice_names_both_lines(tmp_path: Path) -> None:
    text = report(tmp_path, f"{SMALLEST}seed: 1\ntrain:\n  steps: 1\n  steps: 2\nseed: 2\n")
    assert "mine.yaml:11  train.steps  written twice, first on line 10" in text
    assert "mine.yaml:12  seed  written twice, first on line 8" in text


def test_bytes_that_are_not_utf8_are_named_with_their_line(tmp_path: Path) -> None:
    text = report(tmp_path, SMALLEST.encode() + b"output: caf\xe9\n")
    assert re.search(r"mine\.yaml:8  byte \d+ \(0xe9\) is not UTF-8", text)


def test_a_byte_order_mark_is_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load_config(path).model.id == "tiny-sd"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "the file is empty"),
        ("# only a comment\n", "the file is empty"),
        ("just words\n", "a config is made of"),
        ("- a\n- b\n", "a config is made of"),
        ("model: [\n", "not YAML"),
        ("a: 1\n b: 2\n", "not YAML"),
        ("a: 1\n---\nb: 2\n", "not YAML"),
        ("\tmodel: x\n", "not YAML"),
        ("\x00", "not YAML"),
        ("model: &m\n  id: tiny-sd\nlora: *m\n", "anchors"),
        ("model: &m [*m]\n", "anchors"),
        ("? [a, b]\n: 1\n", "a key must be a plain word"),
        ("model: !!python/object/apply:os.system [ls]\n", "tag"),
        ("model: " + "[" * 1500, "not YAML|nested too deeply"),
    ],
)
def test_a_file_that_is_no_config_is_a_problem_not_a_crash(
    tmp_path: Path, text: str, said: str
) -> None:
    found = report(tmp_path, text)
    assert re.search(said, found)
    assert "nothing was loaded" in found


def test_a_missing_file_or_name_is_shown_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean  demo \?"):
        load_config("dmeo")
    with pytest.raises(ConfigError, match="no such config"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="this is a folder"):
        load_config(tmp_path)


def test_prompt_files_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat\na dog\na cat\n", encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config("demo", [f"prompts.source={prompts}", "evaluation.prompts=absent.txt"])
    text = str(caught.value)
    assert "prompts.source" in text
    assert "line 3 repeats line 1: 'a cat'" in text
    assert "evaluation.prompts  absent.txt: no such prompt file or list" in text


def test_a_user_s_own_reward_is_believed() -> None:
    assert load_config("demo", ["reward=my_package.module:Mine"]).reward.endswith(":Mine")


def test_a_base_is_inherited_and_its_problems_keep_their_place(tmp_path: Path) -> None:
    (tmp_path / "parent.yaml").write_text(f"{SMALLEST}train:\n  steps: 7\n  log_every: 3\n")
    child = tmp_path / "child.yaml"
    child.write_text("base: parent.yaml\ntrain:\n  steps: 8\n")
    config = load_config(child)
    assert (config.train.steps, config.train.log_every) == (8, 3)
    (tmp_path / "parent.yaml").write_text(f"{SMALLEST}train:\n  stps: 7\n")
    text = report(tmp_path, "base: parent.yaml\nsede: 8\n", name="child.yaml")
    assert "parent.yaml:9  train.stps" in text
    assert "child.yaml:2  sede" in text


def test_a_base_may_be_a_name_of_configs(tmp_path: Path) -> None:
    child = tmp_path / "child.yaml"
    child.write_text("base: demo\nseed: 3\n")
    assert load_config(child).model.id == "tiny-sd"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("base: child.yaml\n", "inherits from itself"),
        ("base: dmeo\n", "did you mean  demo"),
        ("base: [demo]\n", "names one config"),
    ],
)
def test_a_bad_base_is_told_on_its_line(tmp_path: Path, text: str, said: str) -> None:
    found = report(tmp_path, text, name="child.yaml")
    assert "child.yaml:1  base" in found
    assert said in found


def test_copying_never_overwrites(tmp_path: Path) -> None:
    target = copy_config("demo", tmp_path / "mine.yaml")
    assert load_config(target).model.id == "tiny-sd"
    target.write_text("mine", encoding="utf-8")
    with pytest.raises(UserError, match="exists already"):
        copy_config("demo", target)
    assert target.read_text(encoding="utf-8") == "mine"
    assert copy_config("demo", tmp_path) == tmp_path / "demo.yaml"
    with pytest.raises(UserError, match="cannot be written"):
        copy_config("demo", tmp_path / "absent" / "mine.yaml")


def test_dropout_is_refused_where_likelihoods_are_trained_on(tmp_path: Path) -> None:
    text = report(tmp_path, SMALLEST + "lora:\n  dropout: 0.1\n")
    assert re.search(r":9  lora\.dropout  ddpo trains on exact likelihoods", text)
