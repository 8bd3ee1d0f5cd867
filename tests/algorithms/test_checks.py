"""What DDPO is given: rewards, prompts and sampling that fit, or a word on what to give instead."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from diffusion_align.algorithms.checks import as_reward, check_sampling
from diffusion_align.algorithms.ddpo import DDPO
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import ResolvedSampling, SamplingOptions


def make(toy: ModuleType, reward: Any, prompts: Any) -> DDPO:
    return DDPO(
        toy.ToyPolicy(),
        reward,
        prompts,
        options=DDPOOptions(prompts_per_iteration=2, samples_per_prompt=4, clip_range=0.1),
        sampling=SamplingOptions(steps=3, guidance_scale=1.0),
    )


def test_a_plain_function_is_a_reward(toy: ModuleType) -> None:
    def redness(images: torch.Tensor, prompts: Any) -> torch.Tensor:
        assert images.shape[1:] == (3, 2, 2) and len(prompts) == len(images)
        return images[:, 0].mean((1, 2))

    ddpo = make(toy, redness, ["a", "b"])
    assert ddpo.record()["trained_on"] == [ddpo.reward.info.name]
    assert "redness" in ddpo.reward.info.name
    assert ddpo.collect(0).metrics["reward/std"] > 0


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("aesthetic", "reward_models.load('aesthetic')"),
        (SimpleNamespace, "SimpleNamespace(...)"),
        (SimpleNamespace(score=lambda *a: None), "lacks `info` or `score`"),
        (SimpleNamespace(info=None, score=3), "lacks `info` or `score`"),
        (None, "reward_models.load"),
        (3.0, "float is no reward"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(toy: ModuleType, given: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        make(toy, given, ["a"])
    assert caught.value.where == "reward" and said in str(caught.value)


def test_a_reward_stays_what_it_is(toy: ModuleType) -> None:
    reward = toy.Brightness()
    assert as_reward(reward) is reward


def test_prompts_may_be_a_list_name_or_a_file(toy: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "p.txt"
    file.write_text("one\ntwo\nthree\n", encoding="utf-8")
    reward = toy.Brightness()
    assert make(toy, reward, file).record()["prompts"] == ["one", "two", "three"]
    assert make(toy, reward, str(file)).record()["prompts"] == ["one", "two", "three"]
    assert len(make(toy, reward, "animals").record()["prompts"]) == 45
    assert make(toy, reward, ("x", "y")).record()["prompts"] == ["x", "y"]
    with pytest.raises(UserError, match="no such prompt file or list"):
        make(toy, reward, "a red circle")


@pytest.mark.parametrize(
    ("family", "changes", "where", "fix"),
    [
        ("ddim", {"eta": 0.0}, "sampling.eta", "set sampling.eta=1"),
        ("ddim", {"eta": 1.0, "steps": 1}, "sampling.steps", "use 2 steps or more"),
        ("flow", {"flow_kind": "ode"}, "sampling.flow_kind", "set sampling.flow_kind=sde"),
        ("flow", {"flow_kind": "sde", "eta": 0.0}, "sampling.steps", "use 2 steps or more"),
    ],
)
def test_sampling_without_noise_names_what_to_change(
    family: Any, changes: dict[str, Any], where: str, fix: str
) -> None:
    plain: dict[str, Any] = {"steps": 4, "guidance_scale": 1.0, "height": 8, "width": 8}
    sampling = ResolvedSampling(**{**plain, **changes})
    with pytest.raises(UserError, match="no step of this schedule has noise") as caught:
        check_sampling(DDPOOptions(), sampling, family, 0)
    assert (caught.value.where, caught.value.fix) == (where, fix)
