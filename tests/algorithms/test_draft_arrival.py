"""A gradient that is lost on the way from the reward to the adapter stops the first update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.draft import Draft
from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import SamplingOptions
from reward_models.base import RewardInfo, Scores

PROMPTS = ["a", "bb", "cccc", "ddddddd"]
BREAKS = {"reward": "reward detached", "VAE": "VAE", "denoiser": "denoiser"}
NONE, ALL = slice(0), slice(None)


class Detached:
    """A reward that looks at a copy of the pixels, and says that it has a gradient."""

    info = RewardInfo("detached", "image", True, "about 0 to 1", "-", "-")

    def score(
        self, media: Tensor, prompts: Any, *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        return Scores(media.detach().flatten(1).mean(1))


class Adapter(torch.nn.Module):
    """A network with an adapter that is on and comes to nothing, where `broken`."""

    def __init__(self, inner: torch.nn.Module, *, broken: bool) -> None:
        super().__init__()
        self.inner, self.broken = inner.requires_grad_(False), broken
        self.spare = torch.nn.Parameter(torch.zeros(18))

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        added = (0.0 * self.spare if self.broken else self.spare).view(x.shape[1:])
        return self.inner(x, timestep, text) + added


def make(
    world: ModuleType, place: str = "", *, adapted: bool = False, supervised: Any = None, **o: Any
) -> Draft:
    """A draft whose chain breaks at `place`."""
    policy = world.GuidedPolicy("ddim", torch.float32)
    if place == "VAE":
        policy.decode_gradient = lambda x, g, chunk=None, frames=None: torch.zeros_like(x)
    if adapted or place == "denoiser":
        policy.denoiser = Adapter(policy.denoiser, broken=place == "denoiser")
        spare = policy.denoiser.spare
        policy.trainable_parameters = lambda: [spare]
    options = {"preset": "draft-lv", "prompts_per_iteration": 4, "train_batch_size": 4, **o}
    return Draft(
        policy,
        Detached() if place == "reward" else world.Smooth(),
        PROMPTS,
        options=DraftOptions(**options),
        sampling=SamplingOptions(steps=6, guidance_scale=3.0, batch_size=4),
        seed=1,
        supervised=supervised,
    )


def update(draft: Draft, batch: Any = None, iteration: int = 0) -> None:
    """One update, as the loop makes it: every loss back-propagated before the next."""
    for parameter in draft.policy.trainable_parameters():
        parameter.grad = None
    for minibatch in draft.minibatches(draft.collect(iteration) if batch is None else batch):
        for loss, _ in draft.losses(minibatch, 1 / draft.minibatch_count()):
            loss.backward()


def without(batch: Any, *, main: Any = NONE, copies: Any = NONE) -> Any:
    """A batch whose items at these rows have no gradient of the sample, or of the copies."""
    judged = batch.judged
    gradient, others = judged.gradient.clone(), judged.copy_gradients.clone()
    gradient[main], others[copies] = 0.0, 0.0
    return replace(batch, judged=replace(judged, gradient=gradient, copy_gradients=others))


@pytest.mark.parametrize("copies", [0, 2])
@pytest.mark.parametrize("size", [4, 2])
@pytest.mark.parametrize("place", BREAKS)
def test_where_the_chain_breaks_is_said(
    world: ModuleType, place: str, size: int, copies: int
) -> None:
    draft = make(world, place, train_batch_size=size, lv_copies=copies)
    with pytest.raises(UserError) as caught:
        update(draft)
    where, what = caught.value.where, caught.value.what
    assert BREAKS[place] in where and f"the chain breaks at the {place}" in what
    update(make(world, adapted=True, train_batch_size=size, lv_copies=copies))


@pytest.mark.parametrize("engine", ["replay", "autograd"])
@pytest.mark.parametrize(
    "rows",
    [
        {"main": ALL},  # the copies alone teach
        {"copies": ALL},
    ],
)
def test_any_gradient_that_is_owed_is_looked_for(
    world: ModuleType, rows: dict[str, Any], engine: str
) -> None:
    for size in (1, 2, 4):
        options: dict[str, Any] = {"train_batch_size": size, "engine": engine}
        draft = make(world, "denoiser", **options)
        with pytest.raises(UserError, match="breaks at the denoiser"):
            update(draft, without(draft.collect(0), **rows))
        draft = make(world, adapted=True, **options)
        update(draft, without(draft.collect(0), **rows))


def test_one_item_is_enough_in_whichever_minibatch_it_comes(world: ModuleType) -> None:
    """Nothing is missed before the last minibatch has had its turn."""
    for kept in range(4):
        others = [row for row in range(4) if row != kept]
        for rows in ({"main": others, "copies": ALL}, {"main": ALL, "copies": others}):
            draft = make(world, adapted=True, train_batch_size=1)
            update(draft, without(draft.collect(0), **rows))
            draft = make(world, "denoiser", train_batch_size=1)
            with pytest.raises(UserError, match="breaks at the denoiser"):
                update(draft, without(draft.collect(0), **rows))


def test_an_update_in_which_nothing_was_owed_proves_nothing(world: ModuleType) -> None:
    draft = make(world, "denoiser", train_batch_size=2)
    update(draft, without(draft.collect(0), main=ALL, copies=ALL))
    with pytest.raises(UserError, match="breaks at the denoiser"):
        update(draft, iteration=1)


def test_it_is_looked_for_once(world: ModuleType) -> None:
    draft = make(world, adapted=True)
    update(draft)
    network: Any = draft.policy.denoiser
    network.broken = True  # what was found is not doubted again
    update(draft, iteration=1)


@pytest.mark.parametrize("idle", [False, True])
@pytest.mark.parametrize("place", ["denoiser", ""])
def test_ranks_together_find_it(world: ModuleType, place: str, idle: bool) -> None:
    """Also where all that teaches is on the other rank."""

    def work(group: Any) -> bool:
        draft = make(world, place, adapted=True, train_batch_size=2)
        draft.group = group
        batch = draft.collect(0)
        if idle:
            teaches = torch.zeros(4, dtype=torch.bool)
            teaches[batch.judged.collection.share.places_of(0)[:1]] = True
            batch = replace(batch, judged=replace(batch.judged, teaches=teaches))
            counts = [minibatch.count for minibatch in draft.minibatches(batch)]
            assert counts == [1 - group.rank]
        update(draft, batch)
        return True

    for found in world.on_ranks(work):
        if place:
            assert isinstance(found, UserError) and "breaks at the denoiser" in found.what
        else:
            assert found is True


class Pulling:
    """A supervised step whose gradient reaches the adapter, whatever becomes of the reward's."""

    calls = 7

    def __init__(self) -> None:
        self.parameter: Any = None
        self.taken = 0

    def due(self, iteration: int) -> bool:
        return True

    def losses(self, iteration: int, scale: float, group: Any) -> Iterator[Any]:
        self.taken += 1
        loss = self.parameter.sum() * 0.5
        yield loss, {"supervised/loss": loss.detach()}

    def loss_count(self, group: Any) -> int:
        return 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_supervised_step_does_not_hide_it(world: ModuleType, ranks: int) -> None:
    def work(group: Any) -> None:
        draft = make(world, "denoiser", supervised=(pulling := Pulling()))
        pulling.parameter = draft.policy.denoiser.spare
        draft.group = group
        update(draft)

    for found in world.on_ranks(work, ranks):
        assert isinstance(found, UserError) and "breaks at the denoiser" in found.what


def test_shards_are_looked_at_once_they_are_put_together(world: ModuleType) -> None:
    """In lockstep a gradient is there after the last loss only, the supervised one's among it."""
    for place, taken in (("", True), ("denoiser", False)):
        draft = make(world, place, adapted=True, supervised=(pulling := Pulling()))
        spare = draft.policy.denoiser.spare
        pulling.parameter = spare
        draft.group = SimpleNamespace(rank=0, size=1, lockstep=True, gather=lambda v: v)
        (minibatch,) = draft.minibatches(draft.collect(0))
        losses = [loss for loss, _ in _late(draft, minibatch, spare)]
        assert len(losses) == draft.loss_count(minibatch)
        if taken:
            continue
        # It cannot be told from the other's, so it is not taken for found: the next that is
        # without a supervised step is looked at.
        pulling.due = lambda iteration: False  # type: ignore[method-assign]
        with pytest.raises(UserError, match="breaks at the denoiser"):
            update(draft, iteration=1)


def _late(draft: Draft, minibatch: Any, parameter: Any) -> Iterator[Any]:
    """Losses whose gradients appear with the last of them."""
    kept = torch.zeros_like(parameter)
    count = draft.loss_count(minibatch)
    for number, (loss, metrics) in enumerate(draft.losses(minibatch, 1.0), start=1):
        loss.backward()
        kept += parameter.grad
        parameter.grad = kept if number == count else None
        yield loss, metrics
