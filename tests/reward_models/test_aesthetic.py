"""The published heads on real embeddings (no tower: see test_backbones.py for pixels)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from reward_models.aesthetic import head_from_tensors, score_embeddings
from reward_models.base import RewardError
from reward_models.catalogue import ROWS
from reward_models.weights import read_tensors, verify

RATINGS = (0, 2, 4, 6, 8)
HEADS = {
    "aesthetic": [1.6555, 3.0698, 4.2380, 5.0731, 5.5767],
    "aesthetic-v1": [-2.4579, 1.8951, 5.0997, 7.7870, 10.2264],
}


@pytest.fixture
def embeddings(published) -> Tensor:  # type: ignore[no-untyped-def]
    files = [published(f"aesthetic/rating{rating}.npy") for rating in RATINGS]
    return torch.from_numpy(np.concatenate([np.load(file).reshape(1, -1) for file in files]))


def head(published, name: str):  # type: ignore[no-untyped-def]
    file = ROWS[name].weights
    assert file is not None
    path = published(f"aesthetic/{file.name}")
    verify(path, file.sha256)
    return head_from_tensors(read_tensors(path), path)


@pytest.mark.parametrize("name", HEADS)
def test_published_scores_of_real_embeddings(published, embeddings: Tensor, name: str) -> None:  # type: ignore[no-untyped-def]
    scores = score_embeddings(head(published, name), embeddings)
    assert scores.tolist() == pytest.approx(HEADS[name], abs=1e-3)


@pytest.mark.parametrize("name", [*HEADS, "aesthetic-relu"])
def test_scores_do_not_depend_on_the_embeddings_length(  # type: ignore[no-untyped-def]
    published, embeddings: Tensor, name: str
) -> None:
    loaded = head(published, name)
    longer = score_embeddings(loaded, 7.3 * embeddings)
    assert torch.allclose(longer, score_embeddings(loaded, embeddings), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "bias", "length"),
    [("aesthetic", 5.2366, 17.996), ("aesthetic-v1", 3.529, 28.44)],
)
def test_heads_without_activations_are_affine(  # type: ignore[no-untyped-def]
    published, embeddings: Tensor, name: str, bias: float, length: float
) -> None:
    loaded = head(published, name).double()
    with torch.no_grad():
        offset = loaded(torch.zeros(1, 768, dtype=torch.float64))
        w = loaded(torch.eye(768, dtype=torch.float64)) - offset
        direct = torch.nn.functional.normalize(embeddings.double(), dim=-1) @ w + offset
    assert offset.item() == pytest.approx(bias, abs=1e-3)
    assert w.norm().item() == pytest.approx(length, abs=1e-2)
    assert torch.allclose(direct, score_embeddings(loaded, embeddings), atol=1e-9)


def test_the_relu_head_is_the_published_stack(published, embeddings: Tensor) -> None:  # type: ignore[no-untyped-def]
    loaded = head(published, "aesthetic-relu")
    tensors = read_tensors(published("aesthetic/ava+logos-l14-reluMSE.pth"))
    hidden = torch.nn.functional.normalize(embeddings, dim=-1)
    for index in (0, 3, 6, 9):
        weight, bias = tensors[f"layers.{index}.weight"], tensors[f"layers.{index}.bias"]
        hidden = (hidden @ weight.T + bias).relu()
    expected = hidden @ tensors["layers.11.weight"].T + tensors["layers.11.bias"]
    scores = score_embeddings(loaded, embeddings)
    assert torch.allclose(scores, expected[:, 0], atol=1e-5)
    assert scores[0].item() == pytest.approx(4.3717, abs=1e-3)


def test_heads_are_float32_frozen_and_without_dropout(published) -> None:  # type: ignore[no-untyped-def]
    loaded = head(published, "aesthetic")
    assert not any(module.training for module in loaded.modules())
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in loaded.parameters())


def stack(indices: tuple[int, ...], widths: list[int]) -> dict[str, Tensor]:
    tensors = {}
    for index, before, after in zip(indices, widths[:-1], widths[1:], strict=True):
        tensors[f"layers.{index}.weight"] = torch.randn(after, before)
        tensors[f"layers.{index}.bias"] = torch.randn(after)
    return tensors


@pytest.mark.parametrize("indices", [(0, 2, 4, 6, 7), (0, 3, 6, 9, 11)])
def test_widths_are_those_of_the_file(indices: tuple[int, ...]) -> None:
    tensors = stack(indices, [24, 20, 16, 12, 8, 1])
    half = {key: tensor.half() for key, tensor in tensors.items()}
    loaded = head_from_tensors(half, Path("tiny"))
    assert loaded.width == 24
    assert loaded.state_dict().keys() == tensors.keys()
    assert score_embeddings(loaded, torch.randn(3, 24)).shape == (3,)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (stack((0, 1, 2, 3, 4), [8, 8, 8, 8, 8, 1]), "none of the three"),
        ({"weight": torch.ones(2, 8), "bias": torch.ones(2)}, "gives 2 numbers"),
        ({"scoring_head.0.weight": torch.ones(1, 8)}, "none of the three"),
        ({**stack((0,), [8, 1]), "spare": torch.ones(1)}, "unexpected spare"),
        ({"weight": torch.ones(1, 8)}, "missing layers.0.bias"),
        ({}, "none of the three"),
    ],
)
def test_other_files_are_refused(tensors: dict[str, Tensor], message: str) -> None:
    with pytest.raises(RewardError, match=message):
        head_from_tensors(tensors, Path("other.pth"))


def test_the_gradient_reaches_the_embedding() -> None:
    loaded = head_from_tensors(stack((0, 3, 6, 9, 11), [6, 5, 4, 3, 3, 1]), Path("tiny")).double()
    embedding = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: score_embeddings(loaded, e), embedding)
