"""The user's own rewards."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from reward_models.base import RewardError
from reward_models.catalogue import load
from reward_models.plugin import FunctionReward

SOURCE = """
import numpy as np, torch
import reward_models
LOADED = True

def brightness(images, prompts):
    return images.mean(dim=(1, 2, 3))

def detached(images, prompts):
    return images.mean(dim=(1, 2, 3)).detach().numpy()

def listed(images, prompts):
    return [len(p) for p in prompts]

def scalar(images, prompts):
    return images.mean()

def column(images, prompts):
    return images.mean(dim=(1, 2, 3))[:, None]

def words(images, prompts):
    return list(prompts)

def broken(images, prompts):
    raise KeyError("no such thing")

def declared(images, prompts):
    return images.mean(dim=(1, 2, 3))
declared.differentiable = True

class Good:
    def __init__(self, device="cpu"):
        self.device = device
        self.info = reward_models.RewardInfo("good", "image", True, "0..1", "mine", "here")
    def score(self, media, prompts, *, fps=None, metadata=None):
        return reward_models.Scores(media.mean(dim=(1, 2, 3)))

class WrongShape(Good):
    def score(self, media, prompts, *, fps=None, metadata=None):
        return reward_models.Scores(media.mean(dim=(2, 3)))

class NoInfo:
    def score(self, media, prompts): ...

class Plain(Good):
    def score(self, images, prompts):
        return reward_models.Scores(images.mean(dim=(1, 2, 3)))

class WithFps(Good):
    def score(self, images, prompts, fps=None):
        return reward_models.Scores(torch.full([len(images)], float(fps)))

class Open(Good):
    def score(self, images, prompts, **more):
        assert list(more) == ["fps", "metadata"]
        return reward_models.Scores(images.mean(dim=(1, 2, 3)))

class NoPrompts(Good):
    def score(self, images):
        return reward_models.Scores(images.mean(dim=(1, 2, 3)))

class More(Good):
    def score(self, images, prompts, temperature):
        return reward_models.Scores(images.mean(dim=(1, 2, 3)))

class Broken(Good):
    def score(self, images, prompts):
        raise KeyError("no such thing")

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "users_rewards.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield "users_rewards"
    sys.modules.pop("users_rewards", None)


IMAGES = torch.linspace(0, 1, 2 * 3 * 4 * 4).view(2, 3, 4, 4)


def test_the_module_is_named_before_it_runs(module: str) -> None:
    told: list[bool] = []
    load(f"{module}:brightness", notice=lambda text: told.append(module in sys.modules))
    assert told == [False]
    assert module in sys.modules


def test_the_default_notice_goes_to_stderr(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    load(f"{module}:brightness")
    assert "module users_rewards" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["brightness", "detached", "Good", "declared", "Plain", "Open"])
def test_functions_and_classes_score_alike(module: str, name: str) -> None:
    reward = load(f"{module}:{name}")
    values = reward.score(IMAGES, ["a", "b"]).values
    assert torch.allclose(values, IMAGES.mean(dim=(1, 2, 3)))
    assert values.dtype == torch.float32


def test_a_list_of_numbers_is_enough(module: str) -> None:
    assert load(f"{module}:listed").score(IMAGES, ["a", "bcd"]).values.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("scalar", r"shape \[\] for 2 images"),
        ("column", r"shape \[2, 1\]"),
        ("words", "no plain numbers"),
        ("WrongShape", r"shape \[2, 3\]"),
    ],
)
def test_wrong_answers_are_named(module: str, name: str, message: str) -> None:
    reward = load(f"{module}:{name}")
    with pytest.raises(RewardError, match=message):
        reward.score(IMAGES, ["a", "b"])


def test_the_gradient_of_a_function_is_found_by_trial(module: str) -> None:
    assert load(f"{module}:brightness", needs_gradient=True).info.differentiable
    assert load(f"{module}:Good", needs_gradient=True).info.differentiable
    with pytest.raises(RewardError, match="has no gradient"):
        load(f"{module}:listed", needs_gradient=True)
    with pytest.raises(RewardError, match="trial image: KeyError"):
        load(f"{module}:broken", needs_gradient=True)


def test_a_class_gets_the_device_it_names(module: str) -> None:
    reward = load(f"{module}:Good", device="cuda:7")
    assert reward.inner.device == "cuda:7"  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("users_rewards:Nothing", "has no Nothing"),
        ("no_such_module_here:fn", "cannot be imported"),
        (":fn", "not of the form"),
        ("users_rewards:", "not of the form"),
        ("users_rewards:NUMBER", "neither a class nor a function"),
        ("users_rewards:NoInfo", "has no `info`"),
    ],
)
def test_what_is_no_reward_is_refused(module: str, spec: str, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        load(spec)


def test_a_class_gets_only_what_its_score_names(module: str) -> None:
    reward = load(f"{module}:WithFps")
    assert reward.score(IMAGES, ["", ""], fps=8, metadata=[{}, {}]).values.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("NoPrompts", r"reward good: its signature is score\(images\): too many positional"),
        ("More", r"score\(images, prompts, temperature\): missing .*'temperature'"),
    ],
)
def test_a_score_that_cannot_be_called_is_refused_at_load(
    module: str, name: str, message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        load(f"{module}:{name}")


@pytest.mark.parametrize(
    ("source", "message", "line", "cause"),
    [
        ("x = 1\ndef f(:\n", "SyntaxError: invalid syntax", 2, SyntaxError),
        ("x = 1\n\ny = x / 0\n", "ZeroDivisionError: division by zero", 3, ZeroDivisionError),
        ("import no_such_thing\n", "No module named 'no_such_thing'", 1, ImportError),
        ("from math import nothing\n", "cannot import name 'nothing'", 1, ImportError),
        ("import json\njson.loads('{')\n", "JSONDecodeError", 2, ValueError),
        ("raise SystemExit(3)\n", "SystemExit: 3", 1, SystemExit),
    ],
)
def test_a_module_that_fails_is_named_with_its_line(
    module: str, tmp_path: Path, source: str, message: str, line: int, cause: type
) -> None:
    name = f"failing_{cause.__name__.lower()}_{abs(hash(source))}"
    (tmp_path / f"{name}.py").write_text(source)
    with pytest.raises(RewardError) as caught:
        load(f"{name}:fn")
    assert message in str(caught.value)
    assert f"{tmp_path / name}.py:{line}" in str(caught.value)
    assert isinstance(caught.value.__cause__, cause)


def test_nan_pictures_never_reach_the_function() -> None:
    seen: list[list[str]] = []

    def mean(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        assert images.isfinite().all()
        seen.append(list(prompts))
        return images.mean(dim=(1, 2, 3))

    reward = FunctionReward(mean, differentiable=True)
    images = torch.full((3, 3, 4, 4), 0.5)
    images[1, 0, 2, 2] = float("nan")
    images.requires_grad_()
    values = reward.score(images, ["a", "b", "c"]).values
    assert values.isnan().tolist() == [False, True, False]
    assert values[[0, 2]].tolist() == [0.5, 0.5]
    (gradient,) = torch.autograd.grad(values.nansum(), images)
    assert torch.equal(gradient[1], torch.zeros(3, 4, 4)) and gradient[0].sum() > 0
    lost = torch.full((2, 3, 4, 4), float("inf"))
    assert reward.score(lost, ["", ""]).values.isnan().all()
    assert seen == [["a", "c"]]


@pytest.mark.parametrize(("name", "said"), [("broken", "users_rewards:broken"), ("Broken", "good")])
def test_a_bug_in_the_users_code_stays_and_names_the_reward(
    module: str, name: str, said: str
) -> None:
    with pytest.raises(KeyError, match="no such thing") as caught:
        load(f"{module}:{name}").score(IMAGES, ["a", "b"])
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == [f"raised by the code of reward {said}"]


def test_a_function_object_becomes_a_reward() -> None:
    reward = FunctionReward(lambda images, prompts: images.amax(dim=(1, 2, 3)), name="peak")
    assert reward.info.name == "peak"
    assert reward.score(IMAGES, ["", ""]).values[1] == 1
