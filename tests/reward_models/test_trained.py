"""The file of a trained reward: what is in it, and how it is refused when it is not one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import reward_models
from reward_models import RewardError
from reward_models.plan import RewardPlan
from reward_models.training import TrainableReward

PROMPTS = ["a red circle", "a blue square"]
HIDDEN = (16, 8, 8, 4)


@pytest.fixture
def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def trainable(**plan: Any) -> TrainableReward:
    return TrainableReward(RewardPlan("tiny-clip", **plan), seed=3, name="mine")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return trainable(head="regression").save(tmp_path / "mine.safetensors")


def rewritten(file: Path, **card: Any) -> Path:
    """The same file with other entries in its card; None takes one out."""
    with safe_open(file, framework="pt") as opened:
        content = json.loads(opened.metadata()["reward"])
    changed = {key: value for key, value in {**content, **card}.items() if value is not None}
    save_file(load_file(file), file, metadata={"reward": json.dumps(changed)})
    return file


def refusal(file: Path) -> str:
    with pytest.raises(RewardError) as caught:
        reward_models.load(str(file))
    assert str(file) in str(caught.value)
    return str(caught.value)


def test_it_holds_what_trained_and_nothing_else(tmp_path: Path) -> None:
    reward = trainable(trains="blocks", image_blocks=1)
    stored = load_file(reward.save(tmp_path))
    assert set(stored) == set(reward.trained())
    with safe_open(tmp_path / "reward.safetensors", framework="pt") as opened:
        card = json.loads(opened.metadata()["reward"])
    assert card["format"] == 1
    assert (card["name"], card["head"], card["tower"]) == ("mine", "cosine", "tiny-clip")


def test_a_folder_a_run_and_a_file_are_the_same_reward(images: Tensor, tmp_path: Path) -> None:
    file = trainable(head="regression").save(tmp_path / "run" / "final")
    assert file.name == "reward.safetensors"
    scores = [
        reward_models.load(str(path)).score(images, PROMPTS).values
        for path in (file, file.parent, file.parent.parent)
    ]
    assert torch.equal(scores[0], scores[1]) and torch.equal(scores[1], scores[2])


def test_float16_halves_the_file_and_keeps_the_logit_scale(images: Tensor, tmp_path: Path) -> None:
    reward = trainable(trains="blocks", image_blocks=1)
    with torch.no_grad():
        reward.trained()["tower.logit_scale"].fill_(3.14159274)
    whole = reward.save(tmp_path / "a.safetensors")
    half = reward.save(tmp_path / "b.safetensors", dtype="float16")
    assert half.stat().st_size < 0.55 * whole.stat().st_size
    stored = load_file(half)
    assert stored["tower.visual.proj"].dtype == torch.float16
    assert stored["tower.logit_scale"].item() == torch.tensor(3.14159274).item()
    scores = [reward_models.load(str(f)).score(images, PROMPTS).values for f in (whole, half)]
    torch.testing.assert_close(scores[0], scores[1], rtol=0, atol=2e-3)


def test_a_trained_token_table_is_stored_by_its_rows(images: Tensor, tmp_path: Path) -> None:
    reward = trainable(trains="all")
    table = reward.trained()["tower.token_embedding.weight"]
    with torch.no_grad():
        table[table.ne(0).any(dim=1)] += 0.01
        table[12345] = 0.5  # a token that the tower never met
    file = reward.save(tmp_path)
    assert file.stat().st_size < table.numel() * 4
    again = reward_models.load(str(file))
    assert torch.equal(again.tower.model.token_embedding.weight, table)  # type: ignore[attr-defined]


@pytest.mark.parametrize("overall", [True, False])
def test_named_attributes_are_parts(overall: bool, images: Tensor, tmp_path: Path) -> None:
    names = ("colour", "overall" if overall else "shape", "light")
    reward = trainable(head="regression", layers="relu", hidden=HIDDEN, attributes=names)
    with torch.no_grad():
        reward.trained()["head.layers.11.bias"].copy_(torch.tensor([1.0, 20.0, 300.0]))
        reward.trained()["head.layers.11.weight"].zero_()
    scores = reward_models.load(str(reward.save(tmp_path))).score(images, PROMPTS)
    assert {name: part.tolist() for name, part in scores.parts.items()} == {
        names[0]: [1.0, 1.0],
        names[1]: [20.0, 20.0],
        names[2]: [300.0, 300.0],
    }
    assert scores.values.tolist() == [20.0] * 2 if overall else [107.0] * 2


def test_an_item_that_is_no_picture_has_no_score_in_any_attribute(tmp_path: Path) -> None:
    reward = trainable(head="regression", attributes=("a", "b"))
    images = torch.rand(2, 3, 64, 64)
    images[0, 0, 0, 0] = float("nan")
    scores = reward_models.load(str(reward.save(tmp_path))).score(images, PROMPTS)
    for values in (scores.values, *scores.parts.values()):
        assert values.isnan().tolist() == [True, False]


def test_the_gradient_reaches_the_pixels(images: Tensor, tmp_path: Path) -> None:
    for number, plan in enumerate(({}, {"head": "regression", "attributes": ("a", "b")})):
        reward = reward_models.load(str(trainable(**plan).save(tmp_path / str(number))))
        pixels = images.clone().requires_grad_(True)
        reward.score(pixels, PROMPTS).values.sum().backward()
        assert pixels.grad is not None and pixels.grad.abs().max() > 0


def test_a_file_that_was_written_again_is_read_again(images: Tensor, tmp_path: Path) -> None:
    reward = trainable(head="regression")
    before = reward_models.load(str(reward.save(tmp_path))).score(images, PROMPTS).values
    with torch.no_grad():
        reward.trained()["head.layers.0.bias"].add_(1)
    after = reward_models.load(str(reward.save(tmp_path))).score(images, PROMPTS).values
    torch.testing.assert_close(after, before + 1)


def test_weights_without_a_card_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "weights.safetensors"
    save_file({"head.layers.0.weight": torch.zeros(1, 96)}, file)
    assert "says nothing of a reward" in refusal(file)


def test_another_format_is_refused_in_words(file: Path) -> None:
    assert "is of format 2; this version reads 1" in refusal(rewritten(file, format=2))


@pytest.mark.parametrize(
    "card",
    [
        {"head": "guess"},
        {"head": None},
        {"attributes": []},
        {"attributes": [1]},
        {"attributes": 3},
        {"layers": "many"},
        {"framing": "none"},
        {"name": 7},
        {"validation": {"accuracy": "high"}},
        {"tower_values": ["a"]},
    ],
)
def test_a_damaged_card_is_refused(file: Path, card: dict[str, Any]) -> None:
    assert "its card is damaged" in refusal(rewritten(file, **card))


def test_a_card_that_is_no_json_is_refused(file: Path) -> None:
    save_file(load_file(file), file, metadata={"reward": "{"})
    assert "its card is damaged" in refusal(file)


def test_an_unknown_tower_is_refused(file: Path) -> None:
    assert "the tower 'clip-z', which this version does not know" in refusal(
        rewritten(file, tower="clip-z")
    )


def test_a_tower_that_was_replaced_is_refused(file: Path) -> None:
    values = [0.5] * 8
    assert "was trained on another tiny-clip" in refusal(rewritten(file, tower_values=values))


@pytest.mark.parametrize("place", [0, 8, 16])
def test_a_tower_that_differs_in_one_of_its_parts_is_refused(file: Path, place: int) -> None:
    values = list(trainable(head="regression").card.tower_values)
    assert len(values) == 24
    values[place] += 0.5
    assert "was trained on another tiny-clip" in refusal(rewritten(file, tower_values=values))


def test_an_earlier_card_is_compared_in_the_numbers_that_it_has(file: Path) -> None:
    values = list(trainable(head="regression").card.tower_values)[:8]
    assert reward_models.load(str(rewritten(file, tower_values=values))).info.name == "mine"
    assert "was trained on another" in refusal(rewritten(file, tower_values=[]))


def test_half_precision_knows_the_tower_again(file: Path) -> None:
    assert reward_models.load(str(file), dtype="bfloat16").info.name == "mine"


def test_foreign_and_missing_tensors_are_refused(file: Path) -> None:
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(file)
    save_file({**tensors, "optimizer.step": torch.zeros(1)}, file, metadata=metadata)
    assert "'optimizer.step' that is neither" in refusal(file)
    save_file({"head.layers.0.weight": tensors["head.layers.0.weight"]}, file, metadata=metadata)
    assert "missing layers.0.bias" in refusal(file)
    save_file({**tensors, "tower.visual.nose": torch.zeros(1)}, file, metadata=metadata)
    assert "visual.nose" in refusal(file)


def test_a_file_that_was_cut_off_is_refused(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in refusal(file)
