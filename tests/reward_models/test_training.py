"""What trains, that nothing else moves, and that training and scoring are the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import reward_models
from reward_models import RewardError
from reward_models.backbones import load_tower
from reward_models.plan import RewardPlan
from reward_models.table import ROWS
from reward_models.towers import TOWERS
from reward_models.training import TrainableReward

PROMPTS = ["a red circle", "a small blue square above a cross", "a red circle", "green"]
CROSS = {"head": "cross", "cross_layers": 1, "cross_heads": 2, "cross_head_dim": 8, "cross_ff": 1}
SMALL = {"head": "regression", "layers": "relu", "hidden": (16, 8, 8, 4)}
PLANS: dict[str, dict[str, Any]] = {
    "cosine": {},
    "cosine in a letterbox": {"framing": "letterbox", "trains": "blocks", "image_blocks": 1},
    "cosine, text only": {"trains": "blocks", "text_blocks": 2},
    "cosine, all": {"trains": "all"},
    "cross": CROSS,
    "cross, image blocks": {**CROSS, "trains": "blocks", "image_blocks": 1},
    "cross, all": {**CROSS, "trains": "all"},
    "regression": {"head": "regression"},
    "regression, five layers": {**SMALL, "layers": "linear-mse", "trains": "all"},
    "attributes": {**SMALL, "attributes": ("colour", "shape")},
}


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 48, 72, generator=torch.Generator().manual_seed(0))


def trainable(**plan: Any) -> TrainableReward:
    return TrainableReward(RewardPlan("tiny-clip", **plan), seed=3)


@torch.no_grad()
def disturb(reward: TrainableReward) -> None:
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(1)
    for parameter in reward.trained().values():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.add_(0.02 * noise * parameter.abs().mean().clamp(min=0.1))


def outputs(reward: TrainableReward, images: Tensor, prompts: list[str] = PROMPTS) -> Tensor:
    pixels = reward.prepare(images)
    found: Tensor = reward.network(reward.image_inputs(pixels), reward.text_inputs(prompts))
    return found


@pytest.mark.parametrize("name", PLANS)
def test_the_network_the_scorer_and_the_loaded_file_give_one_score(
    name: str, images: Tensor, tmp_path: Path
) -> None:
    reward = trainable(**PLANS[name])
    disturb(reward)
    reward.network.eval()
    with torch.no_grad():
        trained = reward.scores(outputs(reward, images)).mean(dim=1)
        scored = reward.scorer().score(images, PROMPTS)
        loaded = reward_models.load(str(reward.save(tmp_path))).score(images, PROMPTS)
    size = trained.abs().max().item()
    torch.testing.assert_close(scored.values, trained, rtol=0, atol=1e-6 * max(1, size))
    assert torch.equal(loaded.values, scored.values)
    assert set(loaded.parts) == set(PLANS[name].get("attributes", ()))


@pytest.mark.parametrize("name", PLANS)
def test_exactly_what_trains_has_a_gradient(name: str, images: Tensor) -> None:
    reward = trainable(**PLANS[name])
    disturb(reward)  # a new cross head begins at zero, where most gradients vanish
    reward.network.eval()
    weights = torch.arange(1.0, 5.0)[:, None]
    (outputs(reward, images) * weights).sum().backward()
    trained = {id(parameter) for parameter in reward.trained().values()}
    for key, parameter in reward.trained().items():
        assert parameter.grad is not None and parameter.grad.abs().max() > 0, key
    for key, parameter in reward.network.named_parameters():
        assert (parameter.grad is not None) == (id(parameter) in trained), key
        assert parameter.requires_grad == (id(parameter) in trained), key


@pytest.mark.parametrize(
    ("plan", "expected"),
    [
        ({}, {"visual.proj", "text_projection", "logit_scale"}),
        (
            {"trains": "blocks", "image_blocks": 2},
            {"visual.transformer.resblocks.2", "visual.transformer.resblocks.3"}
            | {"visual.ln_post", "visual.proj", "text_projection", "logit_scale"},
        ),
        (
            {"trains": "blocks", "text_blocks": 1},
            {"transformer.resblocks.2", "ln_final", "text_projection", "visual.proj"}
            | {"logit_scale"},
        ),
        (CROSS, {"logit_scale", "head"}),
        (
            {**CROSS, "trains": "blocks", "image_blocks": 1},  # it reads the tokens before ln_post
            {"visual.transformer.resblocks.3", "visual.proj", "logit_scale", "head"},
        ),
        ({"head": "regression"}, {"head"}),
        (
            {"head": "regression", "trains": "blocks", "image_blocks": 1},
            {"visual.transformer.resblocks.3", "visual.ln_post", "visual.proj", "head"},
        ),
    ],
)
def test_only_what_was_asked_for_trains(plan: dict[str, Any], expected: set[str]) -> None:
    found = trainable(**plan).trained()
    groups = set()
    for key in found:
        plain = key.removeprefix("tower.")
        if key.startswith("head."):
            groups.add("head")
        elif "resblocks" in plain:
            head, _, rest = plain.partition("resblocks.")
            groups.add(f"{head}resblocks.{rest.partition('.')[0]}")
        else:
            groups.add(plain.removesuffix(".weight").removesuffix(".bias"))
    assert groups == expected


def test_all_of_a_cosine_is_every_tensor_of_the_tower() -> None:
    tower = load_tower("tiny-clip")
    assert set(trainable(trains="all").trained()) == {
        f"tower.{key}" for key in tower.model.state_dict()
    }


@pytest.mark.parametrize("name", ["cosine in a letterbox", "cross, all", "attributes"])
def test_the_shared_tower_is_untouched_and_its_other_tensors_are_shared(name: str) -> None:
    base = load_tower("tiny-clip").model.state_dict()
    before = {key: value.clone() for key, value in base.items()}
    reward = trainable(**PLANS[name])
    disturb(reward)
    assert all(torch.equal(base[key], value) for key, value in before.items())
    own = reward.network.model.state_dict()
    trained = {key.removeprefix("tower.") for key in reward.trained()}
    for key, value in own.items():
        assert (value.data_ptr() == base[key].data_ptr()) == (key not in trained), key


def test_dropout_is_on_in_training_only(images: Tensor) -> None:
    reward = trainable(head="regression", layers="linear-mse")
    torch.manual_seed(0)
    reward.network.train()
    assert not torch.equal(outputs(reward, images), outputs(reward, images))
    assert not reward.network.model.training  # the tower never is
    reward.network.eval()
    assert torch.equal(outputs(reward, images), outputs(reward, images))


def test_a_new_head_depends_on_the_seed_alone() -> None:
    def head(seed: int) -> Tensor:
        reward = TrainableReward(RewardPlan("tiny-clip", head="regression"), seed=seed)
        return reward.trained()["head.layers.0.weight"]

    state = torch.get_rng_state()
    first, again, other = head(1), head(1), head(2)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_new_regression_head_begins_at_the_mean_rating(images: Tensor) -> None:
    reward = trainable(head="regression")
    before = outputs(reward, images)
    bias = reward.trained()["head.layers.0.bias"].detach().clone()
    reward.start_at(torch.tensor([5.5]))
    torch.testing.assert_close(outputs(reward, images), before - bias + 5.5)


def test_both_pictures_of_a_pair_are_read_with_their_own_prompt(images: Tensor) -> None:
    for plan in ({}, CROSS):
        reward = trainable(**plan)
        both = outputs(reward, torch.cat([images, images.flip(0)]))
        torch.testing.assert_close(both[:4], outputs(reward, images), rtol=1e-5, atol=1e-5)
        turned = outputs(reward, images.flip(0))
        torch.testing.assert_close(both[4:], turned, rtol=1e-5, atol=1e-5)


def test_training_goes_on_from_an_earlier_file(images: Tensor, tmp_path: Path) -> None:
    earlier = trainable(trains="blocks", image_blocks=1, framing="letterbox")
    disturb(earlier)
    file = str(earlier.save(tmp_path / "a"))
    wanted = reward_models.load(file).score(images, PROMPTS).values
    again = TrainableReward(file)
    assert again.card.framing == "letterbox"
    assert torch.equal(again.scorer().score(images, PROMPTS).values, wanted)
    # What the earlier training changed is in the new file, though it does not train on.
    assert not any("resblocks" in key for key in again.trained())
    kept = reward_models.load(str(again.save(tmp_path / "b"))).score(images, PROMPTS).values
    assert torch.equal(kept, wanted)


def test_a_catalogue_reward_is_a_start_with_its_own_head(images: Tensor) -> None:
    published = reward_models.load("tiny-aesthetic").score(images, PROMPTS).values
    reward = TrainableReward("tiny-aesthetic")
    assert reward.head == "regression" and not reward.has_new_head
    torch.testing.assert_close(reward.scorer().score(images, PROMPTS).values, published)
    other = TrainableReward(RewardPlan("tiny-aesthetic", attributes=("a", "b")))
    assert other.has_new_head


@pytest.mark.parametrize("start", ["hpsv2.1", "pickscore", "clip"])
def test_a_published_cosine_is_the_same_scorer_before_its_first_step(
    start: str, images: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(TOWERS, ROWS[start].tower, TOWERS["tiny-clip"])
    # Broken UTF-8, an entity and a curly quote: where the ways of cleaning a prompt part.
    prompts = ["a red circle", "it’s a “red” circle &amp; square", "naÃ¯ve", "ﬁne"]
    published = reward_models.load(start).score(images, prompts).values
    reward = TrainableReward(start)
    reward.network.eval()
    pixels = reward.prepare(images)
    read = reward.network(reward.image_inputs(pixels), reward.text_inputs(prompts))
    torch.testing.assert_close(reward.scores(read)[:, 0].detach(), published)
    unfrozen = TrainableReward(RewardPlan(start, trains="blocks", image_blocks=1, text_blocks=1))
    read = unfrozen.network.eval()(unfrozen.prepare(images), prompts)
    torch.testing.assert_close(unfrozen.scores(read)[:, 0].detach(), published)
    loaded = reward_models.load(str(reward.save(tmp_path))).score(images, prompts)
    torch.testing.assert_close(loaded.values, published)


@pytest.mark.parametrize("start", ["relu", "linear-mse", "linear"])
@pytest.mark.parametrize("layers", ["relu", "linear-mse", "linear"])
def test_a_new_head_over_a_regression_start_is_loaded_as_it_was_built(
    start: str, layers: str, images: Tensor, tmp_path: Path
) -> None:
    earlier = trainable(**{**SMALL, "layers": start, "attributes": ("a", "b")})
    plan: dict[str, Any] = {**SMALL, "layers": layers, "attributes": ("c", "d", "e")}
    reward = TrainableReward(RewardPlan(str(earlier.save(tmp_path / "a")), **plan))
    assert reward.has_new_head and reward.card.layers == layers
    disturb(reward)
    reward.network.eval()
    with torch.no_grad():
        wanted = outputs(reward, images)
    parts = reward_models.load(str(reward.save(tmp_path / "b"))).score(images, PROMPTS).parts
    torch.testing.assert_close(torch.stack(list(parts.values()), dim=1), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("names", "asked"),
    [
        (("a", "b"), ("b", "a")),
        (("a", "b"), None),
        (("colour",), ("colour",)),
        (("colour",), None),
    ],
)
def test_a_file_goes_on_with_its_head_and_its_attributes(
    names: tuple[str, ...], asked: tuple[str, ...] | None, images: Tensor, tmp_path: Path
) -> None:
    earlier = trainable(**{**SMALL, "attributes": names})
    disturb(earlier)
    file = str(earlier.save(tmp_path))
    again = TrainableReward(RewardPlan(file, attributes=asked))
    assert again.attributes == names and not again.has_new_head
    scores = again.scorer().score(images, PROMPTS).values
    assert torch.equal(scores, reward_models.load(file).score(images, PROMPTS).values)


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        ({"trains": "blocks", "image_blocks": 5}, "5 blocks, but this tower has 4"),
        ({"trains": "blocks", "text_blocks": 4}, "4 blocks, but this tower has 3"),
        ({"start": "compressibility"}, "stands on no CLIP tower"),
        ({"start": "tiny-clop"}, "unknown reward"),
    ],
)
def test_a_start_that_cannot_be_is_refused(plan: dict[str, Any], said: str) -> None:
    with pytest.raises(RewardError, match=said):
        TrainableReward(RewardPlan(**{"start": "tiny-clip", **plan}))


@pytest.mark.parametrize(
    ("plan", "field"),
    [
        ({"head": "regresion"}, "head"),
        ({"trains": "last"}, "trains"),
        ({"framing": "pad"}, "framing"),
        ({"layers": "two"}, "layers"),
        ({"image_blocks": -1}, "image_blocks"),
        ({"image_blocks": 2}, "image_blocks"),
        ({"trains": "blocks"}, "trains"),
        ({"trains": "blocks", "head": "regression", "text_blocks": 1}, "text_blocks"),
        ({"layers": "relu", "hidden": (8,)}, "hidden"),
        ({"layers": "relu", "hidden": (8, 8, 0, 8)}, "hidden"),
        ({"head": "cross", "attributes": ("a", "b")}, "attributes"),
        ({"attributes": ("a", "a")}, "attributes"),
        ({"attributes": ()}, "attributes"),
        ({"cross_head_dim": 7}, "cross_head_dim"),
        ({"cross_layers": 0}, "cross_layers"),
        ({"threshold": 1.0}, "threshold"),
        ({"threshold": float("nan")}, "threshold"),
    ],
)
def test_a_plan_out_of_range_names_its_field(plan: dict[str, Any], field: str) -> None:
    with pytest.raises(RewardError) as caught:
        RewardPlan("tiny-clip", **plan)
    assert caught.value.where == field


@pytest.mark.parametrize(
    ("head", "unread"),
    [
        ("cosine", {"cross_layers": 2}),
        ("regression", {"threshold": 0.1}),
        ("regression", {"framing": "letterbox"}),
        ("cross", {"framing": "crop"}),
        ("cosine", {"layers": "relu"}),
        ("cross", {"hidden": (8, 8, 8, 8)}),
    ],
)
def test_what_a_head_does_not_read_is_refused(head: str, unread: dict[str, object]) -> None:
    with pytest.raises(RewardError, match=f"belongs to a .* head, and this one is {head}") as e:
        RewardPlan("tiny-clip", head=head, **unread)  # type: ignore[arg-type]
    assert e.value.where == next(iter(unread))


def test_a_head_that_goes_on_training_keeps_its_size_and_takes_its_threshold(
    tmp_path: Path,
) -> None:
    small = {"cross_layers": 1, "cross_heads": 2, "cross_head_dim": 8, "cross_ff": 1}
    first = TrainableReward(RewardPlan("tiny-clip", head="cross", **small))  # type: ignore[arg-type]
    file = first.save(tmp_path / "first.safetensors")
    assert first.card.threshold == 0.3
    again = TrainableReward(RewardPlan(str(file), threshold=0.05))
    assert again.card.threshold == 0.05
    assert again.scorer().threshold == 0.05  # type: ignore[attr-defined]
    with pytest.raises(RewardError, match="brings its own head"):
        TrainableReward(RewardPlan(str(file), cross_layers=2))
    with pytest.raises(RewardError, match="brings its own head"):
        TrainableReward(RewardPlan("tiny-aesthetic", layers="linear-mse"))
