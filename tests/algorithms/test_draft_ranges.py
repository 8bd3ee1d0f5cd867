"""Scores that are broken, or outside the range that their reward states."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.reward_gradient import stated_range
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions
from reward_models.base import RewardInfo, Scores
from reward_models.composite import CompositeReward

UNREAD = ["aesthetic-relu", "motion"]


def make(world: ModuleType, reward: Any, **options: Any) -> Draft:
    return Draft(
        world.GuidedPolicy("ddim", torch.float32),
        reward,
        ["a", "bb"],
        options=DraftOptions(
            preset="vader", prompts_per_iteration=2, train_batch_size=2, **options
        ),
        sampling=SamplingOptions(steps=6, guidance_scale=3.0),
        seed=1,
    )


def refused(call: Any) -> UserError:
    with pytest.raises(UserError) as caught:
        call()
    return caught.value


class Broken:
    """A reward with one fault."""

    def __init__(self, fault: str, stated: str = "0 to 1") -> None:
        self.info = RewardInfo("broken", "image", True, stated, "-", "-")
        self._fault = fault

    def score(
        self, media: Tensor, prompts: Any, *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        mean = media.flatten(1).mean(1)
        return Scores(
            {
                "detached": mean.detach(),
                "elsewhere": torch.ones(len(media), requires_grad=True) * 1.0,
                "rounds": media.mul(255).round().flatten(1).mean(1) / 255,
                "root": (media - media.detach()).flatten(1).norm(dim=1).sqrt() + mean,
                "far": mean + 3.0,
                "beyond": mean + 0.9,
                "all NaN": mean * math.nan,
            }[self._fault]
        )


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("detached", "do not depend on the pixels differentiably"),
        ("elsewhere", "no gradient of its scores reaches the pixels"),
        ("rounds", "the chain breaks at the reward"),
        ("root", "is not finite"),
        ("far", "outside its range 0 to 1"),
        ("all NaN", "gave no score to any"),
    ],
)
def test_a_broken_reward_is_named(world: ModuleType, fault: str, said: str) -> None:
    error = refused(lambda: make(world, Broken(fault)).collect(0))
    assert said in error.what and "reward broken" in error.where and error.fix


def test_scores_out_of_range_may_be_let_through(world: ModuleType) -> None:
    said: list[str] = []
    draft = make(world, Broken("far"), range_check="warn")
    draft.listener = type(
        "L", (), {"progress": lambda *_: None, "message": lambda _, t: said.append(t)}
    )()
    draft.collect(0), draft.collect(1)
    assert len([text for text in said if "outside its range" in text]) == 1


def test_a_range_that_is_only_observed_is_left_by_more_than_its_width(world: ModuleType) -> None:
    """Training goes beyond what photographs score; a score of another scale is a fault."""
    make(world, Broken("beyond", "about 0 to 1 (photographs)")).collect(0)
    draft = make(world, Broken("beyond", "0 to 1 (share)"))
    assert "outside its range 0 to 1" in refused(lambda: draft.collect(0)).what
    draft = make(world, Broken("far", "about 0 to 1 (photographs)"))
    error = refused(lambda: draft.collect(0))
    assert "outside its range about 0 to 1, by more than its width" in error.what
    make(world, Broken("far", "about 0 to 1"), range_check="off").collect(0)


def test_every_term_of_a_sum_stays_in_its_own_range(world: ModuleType) -> None:
    good = world.Smooth()
    for word, fault in (("0 to 1", "far"), ("about 0 to 1", "far"), ("about 0 to 1", "beyond")):
        total = CompositeReward([(0.5, None, good), (0.1, None, Broken(fault, word))])
        draft = make(world, total)
        if fault == "beyond":
            draft.collect(0)
            continue
        error = refused(lambda draft=draft: draft.collect(0))
        assert f"outside its range {word}" in error.what and "reward broken" in error.where


@pytest.mark.parametrize(
    ("words", "limits"),
    [
        ("0 to 1 (share of the caption's claims that hold)", (-0.01, 1.01)),
        ("1 to 10 (ratings of small-world pictures)", (0.91, 10.09)),
        ("about 4 to 7 (photographs)", (1.0, 10.0)),
        ("about -2 to 2", (-6.0, 6.0)),
        ("about 0.2 to 0.33 (cosine); mean over frames uniform:2", (0.07, 0.46)),
        ("-300 to -20 at 512 x 512 (minus kilobytes)", None),
        ("0 and up; diagonals per second", None),
        ("weighted sum; a: 0 to 1", None),
    ],
)
def test_a_range_binds_as_it_is_worded(words: str, limits: tuple[float, float] | None) -> None:
    found = stated_range(words)
    assert (found and found.limits) == (limits and pytest.approx(limits))


def test_every_differentiable_reward_of_the_catalogue_states_a_range_that_is_read() -> None:
    from reward_models.table import ROWS

    unread = [
        name
        for name, row in ROWS.items()
        if row.info.differentiable and stated_range(row.info.range) is None
    ]
    # One states the ratings that it was fitted to, one has no upper end.
    assert sorted(unread) == UNREAD
