"""Several processes make the run of one, and end together. Two processes, gloo, on the CPU.

The processes are forked from a server that has imported the libraries once.
"""

from __future__ import annotations

import json
import multiprocessing
import runpy
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_align.algorithms.base import Alone
from diffusion_align.algorithms.sharing import Share
from diffusion_align.errors import OptionError, UserError
from diffusion_align.training.launchers import check_launcher
from diffusion_align.training.options import TrainOptions

RANKS = Path(__file__).with_name("ranks.py")
PATIENCE = 60.0
FAILING_PICTURES: dict[str, Any] = {"reward": {"limit": 0.6}}
AVERAGED: dict[str, Any] = {**FAILING_PICTURES, "train": {"ema_decay": 0.6}}


@dataclass(frozen=True)
class Ended:
    """What a group of processes left."""

    folder: Path
    codes: list[int | None]
    seconds: float

    def weights(self, rank: int = 0) -> list[torch.Tensor]:
        return list(torch.load(self.folder / f"weights-{rank}.pt"))

    def error(self, rank: int) -> str:
        path = self.folder / f"error-{rank}.txt"
        return path.read_text() if path.exists() else ""

    def rows(self) -> list[dict[str, Any]]:
        lines = (self.folder / "run" / "metrics.jsonl").read_text().splitlines()
        clock = ("seconds", "time/", "memory/")
        return [
            {name: value for name, value in json.loads(line).items() if not name.startswith(clock)}
            for line in lines
        ]


def start(
    folder: Path,
    work: str,
    size: int = 2,
    *,
    as_launcher: bool = False,
    patience: float = PATIENCE,
    **settings: Any,
) -> Ended:
    """Let `size` processes do `work` of ranks.py; none may take longer than `patience`.

    as_launcher: when one has failed, the others are killed, almost at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["diffusion_align.training.loop", "diffusion_align.algorithms.ddpo"]
    )
    # The store that they meet in is kept here, as a launcher does: it chooses a free port itself.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    processes = []
    for rank in range(size):
        environment = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "OMP_NUM_THREADS": "1",
        }
        scope = {
            "ENVIRONMENT": environment,
            "WORK": work,
            "FOLDER": str(folder),
            "SETTINGS": settings,
        }
        process = context.Process(
            target=runpy.run_path, args=(str(RANKS),), kwargs={"init_globals": scope}
        )
        process.start()
        processes.append(process)
    while as_launcher and not any(process.exitcode for process in processes):
        assert time.monotonic() - began < patience
        time.sleep(0.01)
    for process in processes:
        process.join(1.0 if as_launcher else max(0.0, began + patience - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    assert as_launcher or None not in codes, f"still running after {patience} s"
    return Ended(folder, codes, time.monotonic() - began)


@pytest.fixture(scope="session")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Ended]:
    """The run of one process, made once for each method."""
    known: dict[str, Ended] = {}
    ranks = SimpleNamespace(**runpy.run_path(str(RANKS)))

    def make(**settings: Any) -> Ended:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            folder = tmp_path_factory.mktemp("alone")
            ranks.run(folder, **settings)
            known[key] = Ended(folder, [0], 0.0)
        return known[key]

    return make


def close(first: list[torch.Tensor], second: list[torch.Tensor]) -> None:
    for one, other in zip(first, second, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def same_rows(first: Ended, second: Ended) -> None:
    for one, other in zip(first.rows(), second.rows(), strict=True):
        assert one == pytest.approx(other, abs=1e-5, rel=1e-4)


# --- the result of one process -----------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["ddp", "fsdp2"])
def test_two_processes_make_the_run_of_one(
    alone: Callable[..., Ended], tmp_path: Path, distribution: str
) -> None:
    """Inner epochs, accumulation, per-prompt statistics, failed rewards, 9 samples on 2 ranks."""
    one = alone(**AVERAGED)
    two = start(
        tmp_path,
        "run",
        train={"distribution": distribution, "ema_decay": 0.6},
        losses="tell_kinds",
        probe="Look",
        **FAILING_PICTURES,
    )
    assert two.codes == [0, 0]
    assert any(row["reward/invalid"] > 0 for row in one.rows())
    start_weights = runpy.run_path(str(RANKS.parent.parent / "algorithms" / "toy.py"))
    untouched = list(start_weights["ToyPolicy"]().bare.parameters())
    assert any((a - b).abs().max() > 1e-3 for a, b in zip(one.weights(), untouched, strict=True))
    for rank in (0, 1):
        close(two.weights(rank), one.weights())
        kind = (tmp_path / f"kinds-{rank}.txt").read_text()
        assert kind == ("DTensor" if distribution == "fsdp2" else "Tensor")
    rows = [row for row in two.rows() if row["step"] > 0]
    for row in rows:
        assert row.pop("heldout/constant", 0.5) == 0.5
    for row, other in zip(rows, one.rows(), strict=True):
        assert row == pytest.approx(other, abs=1e-5, rel=1e-4)
    # Whatever lies in the run folder is the main process's, and whole.
    pictures = list((tmp_path / "run" / "samples").rglob("picture.txt"))
    assert pictures and {path.read_text() for path in pictures} == {"rank 0"}
    final = torch.load(tmp_path / "run" / "final" / "weights.pt")
    close(list(final.values()), one.weights())


def test_reward_weighted_regression_is_shared_as_well(
    alone: Callable[..., Ended], tmp_path: Path
) -> None:
    two = start(tmp_path, "run", method="rwr", **FAILING_PICTURES)
    assert two.codes == [0, 0]
    one = alone(method="rwr", **FAILING_PICTURES)
    close(two.weights(), one.weights())
    same_rows(two, one)


@pytest.mark.parametrize("distribution", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_chain_of_losses_is_shared_as_well(
    alone: Callable[..., Ended], tmp_path: Path, distribution: str
) -> None:
    settings: dict[str, Any] = {"method": "draft", **FAILING_PICTURES}
    train = {"accumulation": 3, "steps": 3}
    two = start(tmp_path, "run", **settings, train={**train, "distribution": distribution})
    assert two.codes == [0, 0], two.error(0)
    one = alone(**settings, train=train)
    close(two.weights(), one.weights())
    same_rows(two, one)


def test_windows_of_noise_are_those_of_the_items_that_a_rank_holds(
    alone: Callable[..., Ended], tmp_path: Path
) -> None:
    settings = {"noise_window": 2, "shared_noise": True, "step_weights": "prediction"}
    two = start(tmp_path, "run", algorithm=settings)
    assert two.codes == [0, 0]
    one = alone(algorithm=settings)
    close(two.weights(), one.weights())
    same_rows(two, one)


@pytest.mark.parametrize(
    "settings",
    [
        {"prompts_per_iteration": 1, "samples_per_prompt": 6},
        pytest.param({"prompts_per_iteration": 2}, marks=pytest.mark.slow),
    ],
)
def test_fewer_prompts_than_processes_are_shared_as_well(
    alone: Callable[..., Ended], tmp_path: Path, settings: Any
) -> None:
    """A rank that has samples, but no whole prompt to measure pictures of."""
    size = 1 + settings["prompts_per_iteration"]
    two = start(tmp_path, "run", size=size, algorithm=settings)
    assert two.codes == [0] * size
    one = alone(algorithm=settings)
    close(two.weights(size - 1), one.weights())
    same_rows(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", "fsdp2"])
def test_a_reward_of_whole_groups_sees_whole_groups(
    alone: Callable[..., Ended], tmp_path: Path, distribution: str
) -> None:
    settings: dict[str, Any] = {"reward": {"scope": "group"}, "algorithm": {"advantages": "group"}}
    two = start(tmp_path, "run", size=3, train={"distribution": distribution}, **settings)
    assert two.codes == [0, 0, 0]
    one = alone(**settings)
    close(two.weights(2), one.weights())
    same_rows(two, one)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["ddp", "fsdp2"])
def test_a_real_unet_on_two_processes_is_that_of_one(
    alone: Callable[..., Ended], tmp_path: Path, distribution: str
) -> None:
    """AdamW divides by the gradient's size: a larger epsilon keeps rounding from being blown up."""
    settings: dict[str, Any] = {"learning_rate": 1e-3, "adam_epsilon": 1e-3, "accumulation": 1}
    one = alone(method="real", train=settings)
    sharded = {**settings, "distribution": distribution}
    two = start(tmp_path, "run", patience=300.0, method="real", train=sharded, losses="tell_kinds")
    assert two.codes == [0, 0]
    kind = (tmp_path / "kinds-1.txt").read_text()
    assert kind == ("DTensor" if distribution == "fsdp2" else "Tensor")
    same_rows(two, one)
    # LoRA's second matrices [out, rank] begin at zero: what they are is what was learnt.
    learnt = [float(w.abs().max()) for w in one.weights() if w.shape[1] == 4]
    assert len(learnt) == len(one.weights()) / 2 and min(learnt) > 1e-5
    print(f"each learnt tensor's largest element: {min(learnt):.1e} to {max(learnt):.1e}")
    for rank in (0, 1):
        pairs = list(zip(two.weights(rank), one.weights(), strict=True))
        far = max(float((a - b).abs().max()) for a, b in pairs)
        print(f"{distribution}, process {rank}: parameters differ by {far:.1e} at most")
        assert far < min(1e-5, 1e-4 * max(learnt))


@pytest.mark.slow
def test_ranks_without_a_row_of_a_minibatch_take_part(
    alone: Callable[..., Ended], tmp_path: Path
) -> None:
    """Minibatches of one sample: each is worked on by one rank, and the other one waits for it."""
    settings: dict[str, Any] = {"algorithm": {"train_batch_size": 1}, "train": {"accumulation": 3}}
    two = start(tmp_path, "run", **settings)
    assert two.codes == [0, 0]
    close(two.weights(), alone(**settings).weights())


def test_items_are_dealt_evenly_and_each_once() -> None:
    order = torch.tensor([4, 0, 6, 3, 1, 5, 2])
    ranks = [Share.of(order, Alone(rank=rank, size=3)) for rank in range(3)]
    held = [share.places.tolist() for share in ranks]
    assert sorted([*held[0], *held[1], *held[2]]) == list(range(7))
    for minibatch in order.split(3):
        counts = [len(share.held(minibatch)[0]) for share in ranks]
        assert sum(counts) == len(minibatch) and max(counts) <= 1
    places, rows = ranks[1].held(torch.tensor([1, 5, 0, 2]))
    assert [held[1][row] for row in rows.tolist()] == places.tolist()
    assert places.tolist() == [place for place in (1, 5, 0, 2) if place in held[1]]


def test_fewer_samples_than_processes_are_refused() -> None:
    with pytest.raises(UserError, match="3 processes, but an iteration has only 2 samples"):
        Share.of(torch.arange(2), Alone(size=3))


def test_what_ranks_tell_each_other(tmp_path: Path) -> None:
    assert start(tmp_path, "gathers", size=3).codes == [0, 0, 0]
    answers = [json.loads((tmp_path / f"answers-{rank}.json").read_text()) for rank in range(3)]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0] == {
        "unequal": [[1.0] * 3] * 2 + [[2.0] * 3] * 4,
        "none": [0, 2],
        "integers": [2**40, 2**40 + 1, 2**40 + 2],
        "plain": [{"rank": rank, "text": "x" * rank * 100} for rank in range(3)],
        "any": [True, False],
        "main": "made by 0",
        "mean": {"a": 1.0, "b_max": 2.0},
    }


def test_one_plan_of_memory_is_made_where_the_least_is_free(tmp_path: Path) -> None:
    assert start(tmp_path, "settles").codes == [0, 0]
    chosen = [json.loads((tmp_path / f"chosen-{rank}.json").read_text()) for rank in (0, 1)]
    assert chosen[0] and chosen[0] == chosen[1]


# --- ending together ---------------------------------------------------------------------------


def test_a_rank_that_fails_in_a_collection_ends_all_with_its_message(tmp_path: Path) -> None:
    ended = start(tmp_path, "run", reward={"fail_on_rank": 1})
    assert ended.codes == [1, 1]
    assert "the reward is out of order" in ended.error(1)
    assert "process 1 failed" in ended.error(0)
    assert "the reward is out of order" in ended.error(0)
    # What was learnt before is saved: the first iteration's three steps.
    assert (tmp_path / "run" / "checkpoints" / "step_000003" / "manifest.json").exists()


def test_a_rank_that_fails_in_an_update_ends_all(tmp_path: Path) -> None:
    ended = start(tmp_path, "run", losses="fail_on_rank_1")
    assert ended.codes == [1, 1]
    assert "one rank cannot divide" in ended.error(1)
    assert ended.error(0)


def test_a_parameter_that_differs_between_ranks_is_named(tmp_path: Path) -> None:
    ended = start(tmp_path, "run", losses="drift_on_rank_1")
    assert ended.codes == [1, 1]
    for rank in (0, 1):
        assert "1 of 2 trained parameters differ" in ended.error(rank)
        assert "(first: bias, processes 0 and 1)" in ended.error(rank)


def test_a_slow_main_process_hears_of_a_failure_and_saves(tmp_path: Path) -> None:
    """It is busy for longer than ranks linger, and hears between two chunks of its collection."""
    reward = {"fail_on_rank": 1, "slow_on_rank": 0}
    ended = start(tmp_path, "run", as_launcher=True, reward=reward, linger=0.2)
    assert "the reward is out of order" in ended.error(1)
    assert "process 1 failed" in ended.error(0)
    assert (tmp_path / "run" / "checkpoints" / "step_000003" / "manifest.json").exists()
    asked = int((tmp_path / "asked-0.txt").read_text())
    assert asked < 6  # three chunks in each of two iterations


@pytest.mark.parametrize("distribution", ["ddp", "fsdp2"])
def test_the_main_process_alone_judges_a_look(tmp_path: Path, distribution: str) -> None:
    """Keeping the best weights is work of all ranks, so all must see it as the main one does."""
    train = {"distribution": distribution, "sample_every": 3}
    ended = start(tmp_path, "run", train=train, probe="Judging")
    assert ended.codes == [0, 0]
    best = torch.load(tmp_path / "run" / "best" / "step_000006" / "weights.pt")
    close(list(best.values()), ended.weights())


# --- resuming ----------------------------------------------------------------------------------


@pytest.mark.parametrize("distribution", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_a_run_goes_on_with_as_many_or_as_few_processes(
    alone: Callable[..., Ended], tmp_path: Path, distribution: str
) -> None:
    """Three of six steps on two processes; the rest on two, and on one."""
    train = {"distribution": distribution, "steps": 3, "ema_decay": 0.6}
    begun = tmp_path / "two"
    assert start(begun, "run", train=train, **FAILING_PICTURES).codes == [0, 0]
    rest: dict[str, Any] = {"train": {**train, "steps": 6}, "resume": True, **FAILING_PICTURES}
    one = alone(**AVERAGED)
    shutil.copytree(begun, tmp_path / "one")
    two = start(begun, "run", **rest)
    assert two.codes == [0, 0]
    fewer = start(tmp_path / "one", "run", size=1, **rest)
    assert fewer.codes == [0]
    for ended in (two, fewer):
        close(ended.weights(), one.weights())
        same_rows(ended, one)


@pytest.mark.parametrize(
    "options", [{"mixed_precision": "fp16"}, {"optimizer": "adamw8bit"}], ids=["fp16", "8 bits"]
)
def test_what_cannot_be_sharded_is_refused(options: Any) -> None:
    with pytest.raises(OptionError, match="fsdp2"):
        TrainOptions(distribution="fsdp2", **options)
    TrainOptions(distribution="ddp", **options)


# --- launchers ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ('{"zero_optimization": {"stage": 0}}', "train.distribution=ddp"),
        ('{"zero_optimization": {"stage": 2}}', "train.distribution=fsdp2"),
        ('{"zero_optimization": {"stage": 3}}', "train.distribution=fsdp2"),
        ('{"zero_optimization": {"stage": 4}}', "is 4, not one of 0 to 3"),
        ('{"zero_optimization": [3]}', "is None, not one of 0 to 3"),
        ("zero: 2", "cannot be read"),
    ],
)
def test_a_deepspeed_config_is_read_and_answered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str, said: str
) -> None:
    file = tmp_path / "ds.json"
    file.write_text(config)
    check_launcher()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    with pytest.raises(UserError) as refused:
        check_launcher()
    assert said in str(refused.value) and "ds.json" in str(refused.value)


def test_settings_of_accelerates_fsdp_are_not_ignored_in_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match=r"set train\.distribution=fsdp2"):
        check_launcher()
