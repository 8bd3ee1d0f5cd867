"""Configs of reward training: their sections, their mistakes, what a resumed run may change."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from diffusion_align.algorithms.reward_options import RewardOptions, RewardStart
from diffusion_align.config import (
    ConfigError,
    RewardRunConfig,
    RunConfig,
    changes_on_resume,
    load_config,
    to_yaml,
)
from diffusion_align.data.judgement_options import JudgementOptions
from diffusion_align.errors import OptionError, UserError

SMALLEST = "data:\n  source: small-world:hps\nalgorithm:\n  name: reward\n"
SHIPPED = [
    "reward_ava_linear",
    "reward_hpsv2",
    "reward_small_world_aesthetic",
    "reward_small_world_hps",
    "reward_small_world_mps",
]


def report(folder: Path, text: str, *overrides: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return str(caught.value)


def told(*overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config("reward_small_world_hps", overrides)
    return str(caught.value)


def test_the_algorithm_decides_which_sections_a_config_has(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SMALLEST)
    config = load_config(path)
    assert isinstance(config, RewardRunConfig)
    assert config.reward == RewardStart()
    assert config.data == JudgementOptions("small-world:hps")
    assert config.algorithm.options == RewardOptions()
    assert config.output == "runs/mine"
    assert isinstance(load_config("demo"), RunConfig)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shown_config_loads_back_to_itself(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "shown.yaml").write_text(to_yaml(config))
    assert load_config(tmp_path / "shown.yaml") == config


def test_the_published_figures_stand_in_the_recipes() -> None:
    hps = load_config("reward_hpsv2")
    assert (hps.train.learning_rate, hps.train.weight_decay) == (3.3e-6, 0.35)
    assert (hps.train.warmup_steps, hps.train.schedule, hps.train.steps) == (500, "cosine", 4000)
    # Of their 20 unlocked image groups one is the projection, which trains with any block.
    assert (hps.reward.image_blocks, hps.reward.text_blocks) == (19, 11)
    assert (hps.reward.framing, hps.algorithm.options.loss) == ("letterbox", "soft-label")
    ava = load_config("reward_ava_linear")
    assert (ava.train.learning_rate, ava.algorithm.options.batch_size) == (1e-3, 256)
    assert (ava.reward.head, ava.reward.layers) == ("regression", "linear-mse")
    assert (ava.reward.trains, ava.data.judged) == ("head", "ratings")
    rows = round(255_530 * (1 - ava.data.validation_share))
    assert ava.train.steps == pytest.approx(50 * rows / 256, rel=0.01)  # 50 epochs


def test_every_mistake_is_told_at_once_with_what_was_meant(tmp_path: Path) -> None:
    text = report(
        tmp_path,
        "reward:\n  strat: tiny-clip\n  head: cosin\n  cross_layers: 0\n"
        "data:\n  source: small-world:hpz\n  validation_share: 2\n"
        "algorithm:\n  name: rewards\n  batchsize: 3\n  loss: sof-label\n"
        "train:\n  warmup: 3\n"
        "model:\n  id: tiny-sd\n",
    )
    heads = [line for line in text.splitlines() if not line.startswith(" ")]
    assert [re.findall(r":(\d+)  (\S+)", head)[0] for head in heads[:-1]] == [
        ("2", "reward.strat"),
        ("3", "reward.head"),
        ("4", "reward.cross_layers"),
        ("6", "data.source"),
        ("7", "data.validation_share"),
        ("9", "algorithm.name"),
        ("10", "algorithm.batchsize"),
        ("11", "algorithm.loss"),
        ("13", "train.warmup"),
        ("14", "model"),
    ]
    for meant in ("reward.start", "cosine", "reward", "algorithm.batch_size", "soft-label"):
        assert re.search(rf"did you mean +{meant} ?\?", text), meant
    assert "did you mean  small-world:hps ?" in text
    assert "did you mean  train.warmup_steps ?" in text


def test_what_is_missing_is_told(tmp_path: Path) -> None:
    assert "data  missing section" in report(tmp_path, "algorithm:\n  name: reward\n")
    without = SMALLEST.replace("source: small-world:hps", "limit: 3")
    assert "data.source  missing" in report(tmp_path, without)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["reward.start=tiny-clp"], "did you mean tiny-clip ?"),
        (["reward.start=tiny-hbs"], "unknown reward"),
        (["reward.start=runs/none.safetensors"], "no such reward file"),
        (["algorithm.loss=regression"], "regression does not learn from pairs"),
        (["data.source=small-world:aesthetic"], "soft-label does not learn from ratings"),
        (
            ["data.source=small-world:aesthetic", "algorithm.loss=regression"],
            "a cosine head gives no ratings",
        ),
        (["data.source=AVA.txt", "algorithm.loss=null"], "AVA.txt names pictures by number"),
        (["data.validation=held.json"], "makes its own held-out judgements"),
        (["reward.trains=head"], "set trains: blocks"),
        (["reward.trains=head", "reward.image_blocks=0"], "reward.text_blocks"),
        (["train.accumulation=3"], "1 batches an iteration = 1 minibatches do not split"),
        (["seed=-1"], "must lie in [0, 2**63 - 1]"),
        (["algorithm.tie_constant=1"], "must be above 1, not 1.0"),
        (["train.schedule=cosin"], "did you mean  cosine ?"),
        (["evaluation.report=false"], "unknown key"),
    ],
)
def test_values_that_do_not_fit_together_are_told(overrides: list[str], said: str) -> None:
    text = told(*overrides)
    assert said in text
    assert "1 problem found" in text


def test_a_typo_drags_no_phantom_behind_it() -> None:
    text = told("data.sourc=small-world:aesthetic", "algorithm.loss=regression")
    assert "does not learn" not in text


def test_python_and_a_config_get_the_same_sentence() -> None:
    with pytest.raises(OptionError) as written:
        RewardStart("tiny-clip", head="cross", attributes=("a", "b"))
    with pytest.raises(ConfigError) as caught:
        load_config("reward_small_world_mps", ["reward.attributes=a,b"])
    (problem,) = caught.value.problems
    assert (problem.key, problem.what) == ("reward.attributes", written.value.what)
    with pytest.raises(OptionError, match="did you mean regression"):
        RewardStart("tiny-clip", head="regresion")  # type: ignore[arg-type]
    with pytest.raises(OptionError, match="did you mean soft-label"):
        RewardOptions(loss="soft-labl")  # type: ignore[arg-type]


def test_a_resumed_run_keeps_its_reward_and_its_data() -> None:
    before = load_config("reward_small_world_hps")
    longer = load_config("reward_small_world_hps", ["train.steps=500", "reward.device=cpu"])
    assert [change.partition(":")[0] for change in changes_on_resume(before, longer)] == [
        "reward.device",
        "train.steps",
    ]
    for barred in ("reward.start=clip-l", "data.limit=3", "seed=1"):
        with pytest.raises(UserError, match="cannot go on") as caught:
            changes_on_resume(before, load_config("reward_small_world_hps", [barred]))
        assert barred.partition("=")[0] in str(caught.value)
    with pytest.raises(UserError, match="cannot go on"):
        changes_on_resume(load_config("demo"), before)


def test_missing_files_are_told_together_before_anything_is_read() -> None:
    options = JudgementOptions("no/train.json", pictures="no/train", validation="no/test.json")
    with pytest.raises(UserError) as caught:
        options.check_files()
    for part in ("data.source: no such file", "data.validation: no such file", "no such folder"):
        assert part in str(caught.value)
    JudgementOptions("small-world:hps").check_files()


def test_reading_a_config_imports_no_torch() -> None:
    code = (
        "import sys\nfrom diffusion_align.config import load_config\n"
        "load_config('reward_small_world_mps')\n"
        "print([m for m in ('torch', 'numpy', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("data.kind=pairs", "data.kind"),
        ("data.missing=skip", "data.missing"),
        ("data.damaged=skip", "data.damaged"),
        ("data.pictures=.", "data.pictures"),
        ("algorithm.tie_constant=3", "algorithm.tie_constant"),
        ("reward.cross_layers=2", "reward.cross_layers"),
    ],
)
def test_what_nothing_would_read_is_refused(override: str, key: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(key)):
        load_config("reward_small_world_hps", [override])


def test_a_folder_of_held_out_pictures_needs_a_held_out_file() -> None:
    with pytest.raises(ConfigError, match=r"data\.validation_pictures"):
        load_config("reward_hpsv2", ["data.validation=null", "data.validation_pictures=."])
