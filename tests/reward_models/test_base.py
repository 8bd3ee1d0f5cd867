"""The contract: shapes, ranges and the NaN rule."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from reward_models.base import (
    RewardError,
    RewardInfo,
    Scores,
    check_images,
    check_scores,
    finite_items,
    require_gradient,
    spread,
)

INFO = RewardInfo("mine", "image", False, "0 to 1", "none", "here")


def test_an_error_says_where_what_and_what_to_do() -> None:
    error = RewardError("is cut off", where="a.pth", fix="fetch it\nor give another")
    assert str(error) == "a.pth: is cut off\n    fetch it\n    or give another"
    assert str(RewardError("plain")) == "plain"


def test_right_scores_pass_and_become_float32() -> None:
    given = Scores(torch.tensor([1.0, float("nan")], dtype=torch.float64), {"a": torch.ones(2)})
    checked = check_scores(given, 2, "mine")
    assert checked.values.dtype == torch.float32
    assert checked.values[0] == 1 and checked.values[1].isnan()
    assert checked.parts["a"].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (torch.ones(2), "not reward_models.Scores"),
        (Scores(torch.ones(2, 1)), r"shape \[2, 1\]"),
        (Scores(torch.tensor(1.0)), r"shape \[\]"),
        (Scores(torch.ones(3)), r"shape \[3\] for 2 images"),
        (Scores(torch.ones(2, dtype=torch.long)), "dtype torch.int64"),
        (Scores([1.0, 2.0]), "values is list"),  # type: ignore[arg-type]
        (Scores(torch.tensor([1.0, float("inf")])), "infinite"),
        (Scores(torch.ones(2), {"sub": torch.ones(1)}), r"parts\['sub'\] has shape"),
    ],
)
def test_wrong_scores_are_refused_by_name(wrong: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message) as caught:
        check_scores(wrong, 2, "mine")
    assert "reward mine" in str(caught.value)


@pytest.mark.parametrize(
    ("media", "prompts", "message"),
    [
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["", ""], "uint8"),
        (torch.zeros(3, 4, 4), [""], r"shape \[3, 4, 4\]"),
        (torch.zeros(2, 1, 4, 4), ["", ""], r"shape \[2, 1, 4, 4\]"),
        (torch.zeros(2, 3, 4, 4), [""], "1 prompts for 2 images"),
        (torch.zeros(2, 3, 4, 4), "ab", "one string"),
        (torch.full((1, 3, 4, 4), 255.0), [""], "from 255 to 255"),
        (torch.full((1, 3, 4, 4), -1.0), [""], "from -1 to -1"),
        ([[0.0]], [""], "list"),
        (torch.zeros(1, 3, 4, 4), [None], "prompt 0 is NoneType, not a string"),
        (torch.zeros(2, 3, 4, 4), ["a", b"b"], "prompt 1 is bytes"),
        (torch.zeros(1, 3, 4, 4), None, "NoneType for 1 images"),
    ],
)
def test_wrong_images_are_refused(media: Any, prompts: Any, message: str) -> None:
    with pytest.raises(RewardError, match=message):
        check_images(media, prompts, INFO)


def test_rounding_overshoot_and_nan_are_allowed() -> None:
    media = torch.tensor([-0.005, 1.005, float("nan"), float("inf")]).view(4, 1, 1, 1)
    check_images(media.expand(4, 3, 2, 2), [""] * 4, INFO)


def test_a_blank_prompt_is_a_prompt() -> None:
    check_images(torch.zeros(2, 3, 4, 4), ("", "  "), INFO)


def test_no_nan_enters_scores_or_gradients_of_whole_items() -> None:
    media = torch.rand(4, 3, 2, 2)
    media[1, 0, 0, 0] = float("nan")
    media[3, 2, 1, 1] = float("inf")
    media.requires_grad_()
    keep = finite_items(media)
    assert keep.tolist() == [True, False, True, False]
    values = spread(media[keep].mean(dim=(1, 2, 3)), keep)
    assert values.isnan().tolist() == [False, True, False, True]
    values[keep].sum().backward()
    assert media.grad is not None
    assert torch.equal(media.grad[0], torch.full((3, 2, 2), 1 / 12))
    assert media.grad[1].abs().sum() == 0 and media.grad[3].abs().sum() == 0


def test_nothing_left_to_score_is_all_nan() -> None:
    assert spread(torch.empty(0), torch.zeros(2, dtype=torch.bool)).isnan().all()


def test_a_reward_without_gradient_is_refused_at_start_up() -> None:
    class Blind:
        info = INFO

        def score(self, media: Any, prompts: Any, *, fps: Any = None, metadata: Any = None) -> Any:
            raise AssertionError("not called")

    with pytest.raises(RewardError, match="has no gradient"):
        require_gradient(Blind())
