"""Scoring beside sampling gives the same numbers; a reward that hangs or raises is named."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import reward_models
from diffusion_align.algorithms import scoring
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.algorithms.plan import Item
from diffusion_align.algorithms.scoring import ChunkScorer, gains_by_overlap
from diffusion_align.data.prompts import Prompt
from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Quiet
from diffusion_align.sampling.options import SamplingOptions
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from reward_models.base import RewardError, Scores

ROOT = Path(__file__).resolve().parents[2]
PICTURES = torch.rand(11, 3, 64, 64, generator=torch.Generator().manual_seed(0))
ITEMS = [Item(Prompt(f"prompt {n // 3}"), n // 3, n % 3) for n in range(11)]
INFO = reward_models.RewardInfo("odd", "image", False, "-", "-", "-")


class Odd:
    """A reward that does what the test says."""

    def __init__(self, does: Callable[[torch.Tensor], Any], **info: Any) -> None:
        self.info, self.does = replace(INFO, **info), does

    def score(self, media: torch.Tensor, prompts: Any, **more: Any) -> Any:
        return self.does(media)


def scored(reward: Any, size: int, **options: Any) -> Scores:
    with ChunkScorer(reward, 5, **options) as scorer:
        for start in range(0, len(ITEMS), size):
            scorer.add(PICTURES[start : start + size], ITEMS[start : start + size])
        return scorer.finish()


@pytest.mark.parametrize("name", ["tiny-aesthetic", "incompressibility"])
@pytest.mark.parametrize("options", [{"overlap": True}, {"timeout": 60.0}])
def test_a_thread_changes_no_bit(name: str, options: dict[str, Any]) -> None:
    reward = reward_models.load(name)
    plain, threaded = scored(reward, 4), scored(reward, 4, **options)
    assert torch.equal(plain.values, threaded.values)
    assert plain.parts.keys() == threaded.parts.keys()
    assert all(torch.equal(plain.parts[part], threaded.parts[part]) for part in plain.parts)
    expected = reward.score(PICTURES, [item.prompt.text for item in ITEMS]).values
    torch.testing.assert_close(plain.values, expected, rtol=1e-4, atol=1e-4)


def test_an_iteration_of_ddpo_is_the_same_with_and_without(toy: ModuleType) -> None:
    def batch(overlap: bool) -> Any:
        ddpo = DDPO(
            toy.ToyPolicy(),
            toy.Brightness(),
            ["a", "bb", "ccc"],
            options=DDPOOptions(
                prompts_per_iteration=3,
                samples_per_prompt=3,
                train_batch_size=3,
                clip_range=0.1,
                reward_overlap=overlap,
            ),
            sampling=SamplingOptions(steps=4, guidance_scale=1.0, batch_size=2),
        )
        return ddpo.collect(0)

    plain, beside = batch(False), batch(True)
    assert torch.equal(plain.advantages, beside.advantages)
    assert torch.equal(plain.trajectory.latents, beside.trajectory.latents)
    assert plain.metrics == beside.metrics


def test_scoring_really_runs_beside_the_caller() -> None:
    """The reward waits for something that the caller does only after `add`."""
    sampled = threading.Event()
    threads: list[str] = []

    def waiting(media: torch.Tensor) -> Scores:
        threads.append(threading.current_thread().name)
        assert not torch.is_grad_enabled()
        assert sampled.wait(20), "the caller was not let go"
        return Scores(media.mean(dim=(1, 2, 3)))

    with ChunkScorer(Odd(waiting), 0, overlap=True) as scorer:
        scorer.add(PICTURES[:4], ITEMS[:4])
        sampled.set()
        values = scorer.finish().values
    assert threads == ["reward odd"]
    torch.testing.assert_close(values, PICTURES[:4].mean(dim=(1, 2, 3)))


def test_one_chunk_is_scored_at_a_time_and_in_order() -> None:
    running: list[int] = []
    most: list[int] = []
    seen: list[float] = []

    def counting(media: torch.Tensor) -> Scores:
        running.append(1)
        most.append(len(running))
        seen.extend(media.mean(dim=(1, 2, 3)).tolist())
        running.pop()
        return Scores(media.mean(dim=(1, 2, 3)))

    values = scored(Odd(counting), 2, overlap=True).values
    assert max(most) == 1 and len(most) == 6
    assert seen == values.tolist()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("size", [2, 5, 11])
def test_a_judge_of_groups_sees_whole_prompts(size: int, overlap: bool) -> None:
    sizes: list[int] = []

    def ranking(media: torch.Tensor) -> Scores:
        sizes.append(len(media))
        order = media.mean(dim=(1, 2, 3)).argsort().argsort()
        return Scores(order.float(), {"size": torch.full((len(media),), float(len(media)))})

    scores = scored(Odd(ranking, scope="group"), size, overlap=overlap)
    assert sizes == [3, 3, 3, 2]
    brightness = PICTURES.mean(dim=(1, 2, 3))
    expected = torch.cat([part.argsort().argsort() for part in brightness.split(3)]).float()
    assert torch.equal(scores.values, expected)
    assert scores.parts["size"].tolist() == [3.0] * 9 + [2.0] * 2


@pytest.fixture
def hang() -> Iterator[threading.Event]:
    """What a hanging reward waits for; set at the end, so that its thread goes away."""
    event = threading.Event()
    yield event
    event.set()


@pytest.mark.parametrize("overlap", [False, True])
def test_a_reward_that_hangs_is_named(overlap: bool, hang: threading.Event) -> None:
    def hanging(media: torch.Tensor) -> Scores:
        hang.wait(60)
        return Scores(media.mean(dim=(1, 2, 3)))

    with pytest.raises(UserError, match=r"no answer within 0\.1 s") as found:
        scored(Odd(hanging), 4, overlap=overlap, timeout=0.1)
    assert found.value.where == "reward odd, iteration 5"
    assert "algorithm.reward_timeout" in found.value.fix


def test_the_time_allowed_is_that_of_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four prompts that take 0.6 of the limit each are no hang, though together they take 2.4."""
    now = [0.0]
    monkeypatch.setattr(scoring, "time", SimpleNamespace(monotonic=lambda: now[0]))

    def slow(media: torch.Tensor) -> Scores:
        now[0] += 6.0
        return Scores(media.mean(dim=(1, 2, 3)))

    reward = Odd(slow, scope="group")
    assert len(scored(reward, 11, timeout=10.0).values) == 11
    assert now[0] == 24.0


def test_a_process_ends_although_its_reward_hangs() -> None:
    code = (
        "import threading, torch\n"
        "from types import SimpleNamespace\n"
        "from diffusion_align.algorithms.scoring import ChunkScorer\n"
        "from diffusion_align.algorithms.plan import Item\n"
        "from diffusion_align.data.prompts import Prompt\n"
        "reward = SimpleNamespace(info=SimpleNamespace(name='stuck', scope='item'),\n"
        "    score=lambda *a, **k: threading.Event().wait())\n"
        "scorer = ChunkScorer(reward, 0, timeout=0.1)\n"
        "scorer.add(torch.zeros(1, 3, 8, 8), [Item(Prompt('a'), 0, 0)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1
    assert "reward stuck, iteration 0: gave no answer within 0.1 s" in done.stderr


@pytest.mark.parametrize("overlap", [False, True])
def test_what_a_reward_raises_is_told_with_its_name_iteration_and_line(overlap: bool) -> None:
    def broken(media: torch.Tensor) -> Scores:
        raise KeyError("no such thing")

    with pytest.raises(UserError, match="raised KeyError: 'no such thing'") as found:
        scored(Odd(broken), 4, overlap=overlap)
    assert found.value.where == "reward odd, iteration 5"
    assert f"{__file__}:" in found.value.fix and "in broken" in found.value.fix
    assert isinstance(found.value.__cause__, KeyError)


def test_advice_of_a_reward_is_kept(toy: ModuleType) -> None:
    def refusing(media: torch.Tensor) -> Scores:
        raise RewardError("has no key", where="reward odd", fix="export ODD_KEY")

    with pytest.raises(UserError, match="has no key") as found:
        scored(Odd(refusing), 4)
    assert (found.value.where, found.value.fix) == ("reward odd, iteration 5", "export ODD_KEY")


def test_a_wrong_answer_is_a_fault_of_the_reward() -> None:
    with pytest.raises(UserError, match="returned list"):
        scored(Odd(lambda media: [0.0] * len(media)), 4)


def test_overlap_is_chosen_only_where_a_reward_computes_elsewhere(toy: ModuleType) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    plain = toy.Brightness()
    assert not gains_by_overlap(plain, cpu) and not gains_by_overlap(plain, gpu)
    plain.device = "cpu"
    assert not gains_by_overlap(plain, cpu) and gains_by_overlap(plain, gpu)
    plain.overlaps = False
    assert not gains_by_overlap(plain, gpu)
    remote = toy.Brightness()
    remote.overlaps = True
    assert gains_by_overlap(remote, cpu)
    assert gains_by_overlap(SimpleNamespace(terms=[(1.0, None, remote)] * 2), cpu)

    def asks_a_server(images: torch.Tensor, prompts: Any) -> Any:
        return [0.0] * len(images)

    assert not gains_by_overlap(reward_models.FunctionReward(asks_a_server), cpu)
    asks_a_server.overlaps = True  # type: ignore[attr-defined]
    assert gains_by_overlap(reward_models.FunctionReward(asks_a_server), cpu)
    both = SimpleNamespace(terms=[(1.0, None, remote), (1.0, None, toy.Brightness())])
    assert not gains_by_overlap(both, cpu)
    # A shipped scorer is where its tower is; cuda without a number may be the policy's own.
    shipped = reward_models.load("tiny-aesthetic")
    assert gains_by_overlap(shipped, gpu) and not gains_by_overlap(shipped, cpu)
    plain = toy.Brightness()
    plain.device = "cuda"
    assert not gains_by_overlap(plain, gpu)
    plain.device = "cuda:1"
    assert gains_by_overlap(plain, gpu)


@pytest.mark.parametrize("fault", ["raises", "hangs"])
def test_a_run_whose_reward_fails_keeps_what_it_learnt(
    toy: ModuleType, tmp_path: Path, hang: threading.Event, fault: str
) -> None:
    """It stops with the reward's name, and a resumed run ends where one without a fault does."""

    def run(folder: str, steps: int, failing: bool, resume: bool = False) -> dict[str, Any]:
        asked = [0]

        def fragile(images: torch.Tensor, prompts: Any) -> torch.Tensor:
            asked[0] += 1
            if failing and asked[0] == 6:  # the second chunk of iteration 2
                if fault == "raises":
                    raise ValueError("out of order")
                hang.wait(60)
            return images.mean(dim=(1, 2, 3))

        policy = toy.ToyPolicy()
        ddpo = DDPO(
            policy,
            fragile,
            ["a", "bb", "ccc"],
            options=DDPOOptions(
                prompts_per_iteration=2,
                samples_per_prompt=2,
                train_batch_size=4,
                advantages="global",
                clip_range=0.1,
                reward_overlap=True,
                reward_timeout=0.5 if fault == "hangs" else 0.0,
            ),
            sampling=SamplingOptions(steps=3, guidance_scale=1.0, batch_size=2),
        )
        options = TrainOptions(steps=steps, checkpoint_every=0)
        train(ddpo, options=options, output=tmp_path / folder, resume=resume, reporter=Quiet())
        return {name: p.detach().clone() for name, p in policy.bare.named_parameters()}

    said = "raised ValueError: out of order" if fault == "raises" else "no answer within 0.5 s"
    with pytest.raises(UserError, match=said) as found:
        run("run", 4, failing=True)
    assert "fragile, iteration 2" in found.value.where
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("step_*")]
    resumed = run("run", 4, failing=False, resume=True)
    whole = run("whole", 4, failing=False)
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
