"""`train reward_NAME` from the command line: a run, what it prints, what comes after it."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from diffusion_align.config import changes_on_resume, load_config
from diffusion_align.errors import UserError

Call = Callable[..., Any]
SMALL = (
    "data.limit=24",
    "data.validation_limit=16",
    "algorithm.batch_size=8",
    "algorithm.validate_every=2",
    "train.checkpoint_every=2",
)


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_a_run_ends_with_a_table_a_reward_and_the_line_that_uses_it(
    call: Call, tmp_path: Path
) -> None:
    run = ("train", "reward_small_world_mps", *SMALL, "output=runs/mine")
    done = call(*run, "train.steps=4")
    assert done.exit_code == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split("\t") == ["iteration", "accuracy"]
    assert [line.split("\t")[0] for line in lines[1:4]] == ["0", "2", "4"]
    assert sum(line.endswith("kept") for line in lines) == 1
    assert "runs/mine/final/reward.safetensors" in done.stdout
    assert lines[-1].endswith("diffusion-align score PICTURES --reward runs/mine")
    record = json.loads(Path("runs/mine/run.json").read_text())
    assert record["trained_on"] == ["small-world:mps"]

    Image.new("RGB", (64, 64), "white").save("white.png")
    scored = call("score", "white.png", "--reward", "runs/mine", "--prompt", "a red circle")
    assert scored.exit_code == 0, scored.stderr
    row = json.loads(Path("scores.jsonl").read_text().splitlines()[0])
    assert list(row["scores"]) == ["runs/mine"] and row["error"] is None

    where = ("--prompts", "animals", "--reward", "verifier", "--out", "cmp")
    compared = call("compare", "tiny-sd", "--tuned", "runs/mine", *where)
    assert compared.exit_code == 2
    assert "this run trained a reward" in compared.stderr

    again = call(*run, "train.steps=4")
    assert again.exit_code == 2 and "--resume" in again.stderr and "--new" in again.stderr
    nothing_left = call(*run, "train.steps=4", "--resume")
    assert nothing_left.exit_code == 0, nothing_left.stderr
    assert nothing_left.stdout == done.stdout
    before = load_file("runs/mine/checkpoints/step_000004/parameters.safetensors")
    longer = call(*run, "train.steps=6", "--resume")
    assert longer.exit_code == 0, longer.stderr
    assert "resumed at step 4" in longer.stderr
    assert [line.split("\t")[0] for line in longer.stdout.splitlines()[1:5]] == ["0", "2", "4", "6"]
    other = call(*run, "train.steps=6", "data.limit=25", "--resume")
    assert other.exit_code == 2 and "data.limit" in other.stderr
    anew = call(*run, "train.steps=4", "--new")
    assert anew.exit_code == 0 and Path("runs/mine.old-1").is_dir()
    after = load_file("runs/mine/checkpoints/step_000004/parameters.safetensors")
    assert all((before[key] == after[key]).all() for key in before)


def test_a_run_without_validation_says_so(call: Call) -> None:
    words = ("data.validation_share=0", "train.steps=2", "output=runs/plain")
    done = call("train", "reward_small_world_aesthetic", *SMALL, *words)
    assert done.exit_code == 0, done.stderr
    assert "nothing was held out" in done.stdout


def test_data_that_is_not_there_is_answered_before_anything_is_made(call: Call) -> None:
    done = call("train", "reward_hpsv2", "output=runs/hps")
    assert done.exit_code == 2
    assert "data.source: no such file: HPDv2/train.json" in done.stderr
    assert not Path("runs").exists()


def test_ratings_of_a_csv_file_with_named_attributes(call: Call, tmp_path: Path) -> None:
    rows = ["path,rating.light,rating.colour"]
    for number in range(12):
        name = f"{number}.png"
        Image.new("RGB", (64, 64), (number * 20, 99, 0)).save(name)
        rows.append(f"{name},{number},{'' if number % 2 else 12 - number}")
    Path("rated.csv").write_text("\n".join(rows))
    done = call(
        "train",
        "reward_small_world_aesthetic",
        *SMALL,
        "data.source=rated.csv",
        "data.kind=ratings",
        "data.validation_share=0.3",
        "train.steps=2",
        "output=runs/named",
    )
    assert done.exit_code == 0, done.stderr
    # 12 rows, of which 8 are learnt from; every other one has no colour.
    (line,) = [line for line in done.stderr.splitlines() if "held out" in line]
    learnt = int(re.search(r"(\d+) ratings", line)[1])  # type: ignore[index]
    missing = int(re.search(r"(\d+) labels missing and masked", line)[1])  # type: ignore[index]
    assert learnt < 12 and 6 - (12 - learnt) <= missing <= 6
    assert "light/correlation" in done.stdout.splitlines()[0]
    from reward_models import load, read_image

    scores = load("runs/named").score(read_image(tmp_path / "3.png")[None], [""])
    assert set(scores.parts) == {"light", "colour"}


def noise(path: Path, number: int) -> str:
    """A small picture as a file, and its name."""
    pixels = np.random.default_rng(number).integers(0, 256, (48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path.name


def test_the_shipped_recipe_of_ava_runs_on_files_of_its_layout(call: Call) -> None:
    Path("AVA/images").mkdir(parents=True)
    lines = []
    for number in range(40):
        noise(Path(f"AVA/images/{900 + number}.jpg"), number)
        counts = [0] * 10
        counts[number % 10] = 5
        lines.append(f"{number + 1} {900 + number} {' '.join(map(str, counts))} 0 0 1")
    Path("AVA/AVA.txt").write_text("\n".join(lines))
    small = ("reward.start=tiny-clip", "train.steps=2", "data.validation_share=0.3")
    done = call("train", "reward_ava_linear", *small)
    assert done.exit_code == 0, done.stderr
    from reward_models import load

    head = load("runs/reward_ava_linear").head  # type: ignore[attr-defined]
    widths = [layer.out_features for layer in head.layers if hasattr(layer, "out_features")]
    assert widths == [1024, 128, 64, 16, 1]


def test_the_shipped_recipe_of_hpsv2_runs_on_files_of_its_layout(call: Call) -> None:
    for side in ("train", "test"):
        Path("HPDv2", side).mkdir(parents=True)
    train = [
        {
            "prompt": f"prompt {number}",
            "file_path": [noise(Path(f"HPDv2/train/{number}_{k}.jpg"), number + k) for k in (0, 9)],
            "human_preference": [number % 2, 1 - number % 2],
        }
        for number in range(8)
    ]
    test = [
        {
            "prompt": f"other {number}",
            "image_path": [noise(Path(f"HPDv2/test/{number}_{k}.jpg"), 50 + k) for k in range(3)],
            "rank": [2, 1, 3],
        }
        for number in range(2)
    ]
    Path("HPDv2/train.json").write_text(json.dumps(train))
    Path("HPDv2/test.json").write_text(json.dumps(test))
    done = call(
        "train",
        "reward_hpsv2",
        "reward.start=tiny-clip",
        "reward.image_blocks=2",
        "reward.text_blocks=1",
        "train.steps=2",
        "train.accumulation=2",
        "algorithm.batch_size=2",
        "algorithm.batches_per_iteration=2",
    )
    assert done.exit_code == 0, done.stderr
    assert "8 pairs" in done.stderr and "6 held out" in done.stderr
    from reward_models import load

    assert load("runs/reward_hpsv2").framing == "letterbox"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "change",
    ["algorithm.loss=soft-label", "algorithm.batch_size=4", "algorithm.batches_per_iteration=2"],
)
def test_a_resumed_run_keeps_its_loss_and_its_batches(change: str) -> None:
    before = load_config("reward_small_world_mps")
    with pytest.raises(UserError) as caught:
        changes_on_resume(before, load_config("reward_small_world_mps", [change]))
    assert change.partition("=")[0] in str(caught.value)


def test_an_interrupted_run_saves_its_best_without_another_validation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from diffusion_align.algorithms.reward_training import RewardTraining
    from diffusion_align.assemble import train_reward

    learn = RewardTraining.losses

    def interrupted(self: RewardTraining, minibatch: Any, scale: float) -> Any:
        if self._iterations == 3:  # the third, which falls between two validations
            signal.raise_signal(signal.SIGINT)
        yield from learn(self, minibatch, scale)

    monkeypatch.setattr(RewardTraining, "losses", interrupted)
    words = [*SMALL, "train.steps=9", "output=runs/cut"]
    run = train_reward(load_config("reward_small_world_mps", words))
    assert run.result.interrupted and run.result.steps == 3
    assert [entry["iteration"] for entry in run.training.history] == [0, 2]
    assert run.file.is_file() and run.training.best is not None


LINES = [
    (page.name, line.partition("#")[0])
    for page in sorted((Path(__file__).parents[2] / "docs").glob("*.md"))
    for line in page.read_text().splitlines()
    if line.startswith("diffusion-align train ")
    and not line.startswith("diffusion-align train CONFIG")
]


@pytest.mark.parametrize(("page", "line"), LINES, ids=[line for _, line in LINES])
def test_the_keys_of_a_documented_command_are_known(page: str, line: str) -> None:
    """Files and modules of a person's own need not be there; every key must."""
    words = [word for word in shlex.split(line)[2:] if not word.startswith("--")]
    own = [word for word in words if word.startswith("reward=") and ".py" not in word]
    module = [word for word in own if re.fullmatch(r"reward=\w+:\w+", word)]
    chosen = load_config(words[0], [word for word in words[1:] if word not in module])
    assert chosen.output


def test_there_are_documented_commands() -> None:
    assert any("reward_ava_linear" in line for _, line in LINES)
