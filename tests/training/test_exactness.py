"""A resumed run says why it may not be bit for bit what it would have been."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_align.errors import UserError
from diffusion_align.evaluation.probe import Probe
from diffusion_align.reporting.console import Quiet
from diffusion_align.training import random_state
from diffusion_align.training.exactness import reservations
from diffusion_align.training.loop import train
from diffusion_align.training.options import TrainOptions
from reward_models import FunctionReward
from reward_models.base import RewardInfo
from reward_models.composite import CompositeReward

SURE = RewardInfo("sure", "image", False, "-", "-", "-")


class Saying(Quiet):
    def __init__(self) -> None:
        self.said: list[str] = []

    def message(self, text: str) -> None:
        self.said.append(text)


def run(algorithm: Any, folder: Path, steps: int, *, resume: bool = False) -> list[str]:
    saying = Saying()
    options = TrainOptions(steps=steps, checkpoint_every=1, learning_rate=1e-2)
    train(algorithm, options=options, output=folder, resume=resume, reporter=saying)
    return [line for line in saying.said if line.startswith("not bit for bit")]


@pytest.mark.parametrize("deterministic", [True, False])
def test_a_reward_that_may_answer_differently_is_named(
    deterministic: bool, regression: ModuleType, tmp_path: Path
) -> None:
    def made() -> Any:
        algorithm = regression.Regression()
        info = replace(SURE, deterministic=deterministic)
        algorithm.reward = SimpleNamespace(info=info)
        return algorithm

    assert run(made(), tmp_path / "run", 4) == []  # nothing is claimed of a run that begins
    said = run(made(), tmp_path / "run", 8, resume=True)
    asked = "not bit for bit the run without a stop: reward sure is asked again, and may answer"
    assert [line.startswith(asked) for line in said] == ([] if deterministic else [True])


def test_a_sum_is_as_sure_as_its_least_sure_term() -> None:
    sure = FunctionReward(lambda images, prompts: images.mean(), name="sure")
    unsure = FunctionReward(lambda images, prompts: images.mean(), name="u", deterministic=False)
    assert sure.info.deterministic and not unsure.info.deterministic
    assert CompositeReward([(1.0, None, sure)]).info.deterministic
    assert not CompositeReward([(1.0, None, sure), (1.0, None, unsure)]).info.deterministic


def test_another_environment_is_named(regression: ModuleType, tmp_path: Path) -> None:
    run(regression.Regression(), tmp_path / "run", 4)
    record = tmp_path / "run" / "env.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    content["packages"]["torch"], content["threads"] = "1.0", 77
    record.write_text(json.dumps(content), encoding="utf-8")
    said = run(regression.Regression(), tmp_path / "run", 8, resume=True)
    assert [line.partition("environment, ")[2].partition(" -> ")[0] for line in said] == [
        "threads: 77",
        "torch: 1.0",
    ]


def test_another_number_of_processes_is_named_and_another_name_of_a_device_is_not(
    regression: ModuleType, tmp_path: Path
) -> None:
    run(regression.Regression(), tmp_path / "run", 4)
    record = tmp_path / "run" / "env.json"
    content = json.loads(record.read_text(encoding="utf-8"))
    assert content["processes"] == 1 and content["device"] == "cpu"
    record.write_text(json.dumps({**content, "device": "cpu:0"}), encoding="utf-8")
    assert run(regression.Regression(), tmp_path / "run", 8, resume=True) == []
    record.write_text(json.dumps({**content, "device": "cuda:0", "processes": 4}))
    said = run(regression.Regression(), tmp_path / "run", 12, resume=True)
    assert [line.partition("environment, ")[2] for line in said] == [
        "device: cuda -> cpu",
        "processes: 4 -> 1",
    ]


def test_a_heldout_reward_that_may_answer_differently_is_named(
    regression: ModuleType, tmp_path: Path
) -> None:
    made = {
        name: FunctionReward(lambda images, prompts: images.mean(), name=name, deterministic=sure)
        for name, sure in (("sure", True), ("dice", False), ("trained", False))
    }
    probe = Probe(Any, ["a"], rewards=made)  # type: ignore[arg-type]
    algorithm = SimpleNamespace(reward=made["trained"])
    folder = SimpleNamespace(path=tmp_path)
    said = reservations(algorithm, folder, [], device="cpu", probe=probe)  # type: ignore[arg-type]
    assert [line.partition("stop: ")[2] for line in said] == [
        "reward trained is asked again, and may answer differently",
        "held-out reward dice is asked again, and may answer differently",
    ]


def test_another_record_is_refused_before_anything_is_cut(
    regression: ModuleType, tmp_path: Path
) -> None:
    """In Python there is no config to hold against the old one, but run.json."""
    run(regression.Regression(), tmp_path / "run", 4)
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()

    class Other(regression.Regression):  # type: ignore[name-defined,misc]
        def record(self) -> dict[str, Any]:
            return {"trained_on": ["distance"], "prompts": [], "new": 1}

    with pytest.raises(UserError, match="another record: trained_on"):
        run(Other(), tmp_path / "run", 8, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_random_state_that_finds_no_device_is_told() -> None:
    state = random_state.capture()
    here = torch.cuda.device_count() if torch.cuda.is_available() else 0
    assert random_state.restore(state) == []
    state["cuda"] = [torch.get_rng_state()] * (here + 1)
    assert random_state.restore(state) == [
        f"random state of {here + 1} CUDA devices was kept, here are {here}"
    ]


def test_every_global_generator_goes_on_where_it_was() -> None:
    import random

    import numpy as np

    def draws() -> list[float]:
        normal = float(np.random.standard_normal())  # keeps a second one back: has_gauss
        gauss = random.gauss(0, 1)  # and so does Python's
        return [random.random(), gauss, normal, float(torch.rand(())), float(torch.randn(()))]

    with random_state.borrowed(3):
        draws()
        state = random_state.capture()
        expected = [draws(), draws()]
        random_state.restore(state)
        assert [draws(), draws()] == expected
