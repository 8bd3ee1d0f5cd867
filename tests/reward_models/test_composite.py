"""Weighted sums of rewards: values, gradients, what could not be scored, what is said of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import reward_models
from reward_models.base import (
    Reward,
    RewardError,
    RewardInfo,
    Scores,
    finite_items,
    score_kept,
    spread,
)
from reward_models.composite import CompositeReward, load_composite
from reward_models.presets import Normalisation, normalisation

Judge = Callable[[Tensor], Tensor]


class Formula:
    """A reward whose score is a formula of the picture."""

    def __init__(self, name: str, judge: Judge, **info: Any) -> None:
        known = RewardInfo(name, "image", True, f"{name}'s range", f"{name}'s licence", "somewhere")
        self.info = replace(known, **info)
        self.judge = judge
        self.seen: list[Mapping[str, Any]] = []

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.seen.append({"fps": fps, "metadata": metadata, "prompts": list(prompts)})
        too_long = sum(len(prompt) > 5 for prompt in prompts)

        def judge(images: Tensor, prompts: list[str], kept: list[int]) -> Scores:
            values = self.judge(images)
            return Scores(values, {"half": values / 2}, too_long)

        return score_kept(media, prompts, self.info, judge)


def bright(images: Tensor) -> Tensor:
    return images.mean(dim=(1, 2, 3))


def energy(images: Tensor) -> Tensor:
    return images.square().mean(dim=(1, 2, 3))


def pictures(count: int = 3, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_the_value_is_the_weighted_sum_of_normalised_scores() -> None:
    half = Normalisation("mine", 10.0, -3.0)
    reward = CompositeReward([(0.7, None, Formula("a", bright)), (-2, half, Formula("b", energy))])
    x = pictures().double()
    expected = 0.7 * x.mean((1, 2, 3)) - 2 * (10 * (x * x).mean((1, 2, 3)) - 3)
    scores = reward.score(pictures(), [""] * 3)
    assert torch.allclose(scores.values, expected.float(), atol=1e-5)
    assert scores.values.dtype == torch.float32


def test_raw_scores_and_the_parts_below_them_are_kept() -> None:
    rule = Normalisation("mine", 10.0, -3.0)
    reward = CompositeReward([(0.7, rule, Formula("a", bright)), (1, None, Formula("b", energy))])
    x = pictures()
    parts = reward.score(x, [""] * 3).parts
    assert set(parts) == {"a", "a/half", "b", "b/half"}
    assert torch.allclose(parts["a"], x.mean((1, 2, 3)))
    assert torch.allclose(parts["b/half"], x.square().mean((1, 2, 3)) / 2)
    assert not reward.score(x.requires_grad_(), [""] * 3).parts["a"].requires_grad


def test_the_gradient_is_the_weighted_sum_of_gradients() -> None:
    rule = Normalisation("mine", 10.0, -3.0)
    reward = CompositeReward([(0.7, rule, Formula("a", bright)), (-2, None, Formula("b", energy))])
    x = pictures().requires_grad_()
    weights = torch.tensor([1.0, -2.0, 0.5])
    (reward.score(x, [""] * 3).values * weights).sum().backward()
    pixels = x[0].numel()
    expected = (0.7 * 10 / pixels - 2 * 2 * x.detach() / pixels) * weights.view(3, 1, 1, 1)
    assert x.grad is not None and torch.allclose(x.grad, expected, atol=1e-6)


def test_what_one_term_could_not_score_is_nan_and_nothing_else_is() -> None:
    class Picky(Formula):
        """Never looks at the second picture."""

        def score(self, media: Tensor, prompts: Sequence[str], **_: Any) -> Scores:
            keep = finite_items(media)
            keep[1] = False
            return Scores(spread(bright(media[keep]), keep))

    reward = CompositeReward([(1, None, Picky("a", bright)), (1, None, Formula("b", energy))])
    x = pictures().requires_grad_()
    scores = reward.score(x, [""] * 3)
    assert scores.values.isnan().tolist() == [False, True, False]
    assert scores.parts["a"].isnan().tolist() == [False, True, False]
    assert not scores.parts["b"].isnan().any()
    scores.values.nansum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[1].eq(0).all() and x.grad[0].ne(0).any()


def test_no_nan_of_a_broken_formula_enters_the_gradient() -> None:
    """log of a black picture: 0 comes back from the sum and meets an infinite slope."""

    def fragile(images: Tensor) -> Tensor:
        values = images.mean(dim=(1, 2, 3)).log()
        return torch.where(values.isfinite(), values, torch.nan)

    x = pictures()
    x[1] = 0
    alone = x.clone().requires_grad_()
    values = fragile(alone)
    values[~values.isnan()].sum().backward()
    assert alone.grad is not None and alone.grad[1].isnan().any()  # the danger is real
    x.requires_grad_()
    terms = [(1.0, None, Formula("a", fragile)), (2.0, None, Formula("b", energy))]
    values = CompositeReward(terms).score(x, [""] * 3).values
    assert values.isnan().tolist() == [False, True, False]
    values[~values.isnan()].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert x.grad[1].eq(0).all() and x.grad[0].ne(0).any()


def test_a_picture_with_nan_pixels_and_an_empty_batch() -> None:
    reward = CompositeReward([(1, None, Formula("a", bright)), (1, None, Formula("b", energy))])
    x = pictures()
    x[2, 0, 0, 0] = torch.nan
    x.requires_grad_()
    scores = reward.score(x, [""] * 3)
    assert scores.values.isnan().tolist() == [False, False, True]
    scores.values[:2].sum().backward()
    assert x.grad is not None and x.grad.isfinite().all()
    assert reward.score(x.detach()[:0], []).values.shape == (0,)
    assert reward.score(x.detach()[2:], [""]).values.isnan().all()


def test_cut_prompts_are_counted_once_and_all_is_passed_on() -> None:
    terms = [Formula("a", bright), Formula("b", energy)]
    reward = CompositeReward([(1, None, term) for term in terms])
    metadata = [{"key": 1}, {}, {}]
    scores = reward.score(pictures(), ["long prompt", "short", ""], fps=8.0, metadata=metadata)
    assert scores.truncated == 1
    for term in terms:
        assert term.seen[0]["fps"] == 8.0 and term.seen[0]["metadata"] is metadata
        assert term.seen[0]["prompts"][0] == "long prompt"


def test_the_info_is_true_of_the_whole() -> None:
    a = Formula("a", bright, licence="MIT", needs_prompt=True)
    b = Formula("b", energy, licence="MIT", scope="group")
    whole = CompositeReward([(0.5, None, a), (-1, Normalisation("mine", 2, 0), b)]).info
    assert whole.name == "0.5*a - mine(b)"
    assert whole.differentiable and whole.needs_prompt and whole.scope == "group"
    assert whole.licence == "MIT" and whole.source == "somewhere"
    assert "a's range" in whole.range and "b's range" in whole.range
    assert whole.components == ("a", "b") and whole.modality == "image"


def test_sums_of_sums_are_flattened_and_keep_their_parts() -> None:
    inner = CompositeReward([(2, None, Formula("a", bright)), (1, None, Formula("b", energy))])
    outer = CompositeReward([(0.5, None, inner), (3, None, Formula("c", bright))])
    assert outer.info.name == "0.5*(2*a + b) + 3*c"
    assert outer.info.components == ("a", "b", "c")
    parts = outer.score(pictures(), [""] * 3).parts
    assert {"2*a + b", "2*a + b/a", "2*a + b/a/half", "c"} <= set(parts)


def test_a_missing_gradient_is_traced_to_its_term() -> None:
    blind = Formula("b", energy, differentiable=False)
    reward = CompositeReward([(1, None, Formula("a", bright)), (1, None, blind)])
    assert not reward.info.differentiable
    assert reward.without_gradient == ("b",)
    with pytest.raises(RewardError, match="has no gradient"):
        reward_models.require_gradient(reward)


def test_a_sum_with_a_term_without_gradient_has_none_rather_than_a_part_of_it() -> None:
    terms = [(1.0, None, Formula("a", bright)), (2.0, None, Formula("b", energy))]
    blind = Formula("c", lambda images: energy(images.detach()), differentiable=False)
    sighted = CompositeReward(terms).score(pictures().requires_grad_(), [""] * 3).values
    assert sighted.requires_grad
    x = pictures().requires_grad_()
    values = CompositeReward([*terms, (1.0, None, blind)]).score(x, [""] * 3).values
    assert torch.allclose(values, sighted + energy(x), atol=1e-6)
    with pytest.raises(RuntimeError, match="does not require grad"):
        values.sum().backward()
    assert x.grad is None


def test_images_and_clips_are_not_added() -> None:
    clip = Formula("flickering", bright, modality="video")
    with pytest.raises(RewardError, match="a, c score images and flickering clips"):
        CompositeReward(
            [(1, None, Formula(name, bright)) for name in "ac"] + [(1, None, clip)]  # type: ignore[operator]
        )


@pytest.mark.parametrize("weight", [0.0, float("nan"), float("inf")])
def test_a_weight_that_makes_no_sense_is_refused(weight: float) -> None:
    with pytest.raises(RewardError, match="the weight of a is"):
        CompositeReward([(weight, None, Formula("a", bright))])


def test_no_term_and_a_reward_twice_are_refused() -> None:
    with pytest.raises(RewardError, match="has no terms"):
        CompositeReward([])
    with pytest.raises(RewardError, match="a is in it twice"):
        CompositeReward([(1, None, Formula("a", bright)), (2, None, Formula("a", energy))])


def test_a_term_that_breaks_the_contract_is_named() -> None:
    class Wrong(Formula):
        def score(self, media: Tensor, prompts: Sequence[str], **_: Any) -> Scores:
            return Scores(torch.zeros(7))

    reward = CompositeReward([(1, None, Formula("a", bright)), (1, None, Wrong("w", bright))])
    with pytest.raises(RewardError, match=r"reward w: values has shape \[7\]"):
        reward.score(pictures(), [""] * 3)


def test_an_expression_loads_its_rewards_by_name_with_their_presets() -> None:
    asked: list[str] = []

    def load(name: str) -> Reward:
        asked.append(name)
        return Formula(name, bright if name == "hpsv2.1" else energy)

    reward = load_composite("0.7*percent(HPSv2.1) - unit(aesthetic)", load)
    assert asked == ["hpsv2.1", "aesthetic"]
    assert reward.info.name == "0.7*percent(hpsv2.1) - unit(aesthetic)"
    x = pictures()
    expected = 70 * x.mean((1, 2, 3)) - (x.square().mean((1, 2, 3)) - 1) / 9
    assert torch.allclose(reward.score(x, [""] * 3).values, expected, atol=1e-5)
    assert reward.terms[1][1] == normalisation("unit", "aesthetic")


def test_the_catalogue_loads_expressions_and_two_scorers_share_one_tower() -> None:
    text = "0.5*unit(tiny-aesthetic) + 2*tiny-clip"
    reward = reward_models.load(text, needs_gradient=True)
    single = [reward_models.load(name) for name in ("tiny-aesthetic", "tiny-clip")]
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    prompts = ["a red circle", "a blue square"]

    def run(score: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor, int]:
        images, forwards = x.clone().requires_grad_(), []
        visual = single[0].tower.model.visual  # type: ignore[attr-defined]
        handle = visual.register_forward_hook(lambda *_: forwards.append(1))
        values = score(images)
        handle.remove()
        (gradient,) = torch.autograd.grad(values.sum(), images)
        return values.detach(), gradient, len(forwards)

    both, both_gradient, forwards = run(lambda images: reward.score(images, prompts).values)
    first, first_gradient, _ = run(lambda images: single[0].score(images, prompts).values)
    second, second_gradient, _ = run(lambda images: single[1].score(images, prompts).values)
    assert forwards == 1
    assert torch.allclose(both, 0.5 * (first - 1) / 9 + 2 * second, atol=1e-5)
    expected = 0.5 / 9 * first_gradient + 2 * second_gradient
    assert (both_gradient - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_a_mistake_in_an_expression_is_found_before_anything_is_loaded() -> None:
    with pytest.raises(RewardError, match="did you mean tiny-clip"):
        reward_models.load("0.5*tiny-aesthetic + tiny-clipp")
    with pytest.raises(RewardError, match="has no gradient"):
        reward_models.load("tiny-aesthetic - 0.01*incompressibility", needs_gradient=True)
