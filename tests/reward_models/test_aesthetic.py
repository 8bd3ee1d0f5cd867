"""The published heads on real embeddings (no tower: see test_backbones.py for pixels)."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from reward_models import aesthetic
from reward_models.aesthetic import head_from_tensors, load_aesthetic, score_embeddings
from reward_models.base import RewardError
from reward_models.catalogue import ROWS, load
from reward_models.table import LoadOptions
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


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_does_not_reach_the_head(  # type: ignore[no-untyped-def]
    published, embeddings: Tensor, name: str, dtype: torch.dtype
) -> None:
    loaded = head(published, name)
    with torch.autocast("cpu", dtype):
        rough = loaded(embeddings)
        scores = score_embeddings(loaded, embeddings)
    assert scores.dtype == torch.float32
    assert scores.tolist() == pytest.approx(HEADS[name], abs=1e-3)
    assert rough.dtype == dtype  # without care it would


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


def test_another_models_checkpoint_is_recognised() -> None:
    mps = {"cross_model.layers.0.0.norm.weight": torch.ones(2)}
    with pytest.raises(RewardError, match=r"is no aesthetic head.*; it looks like MPS"):
        head_from_tensors(mps, Path("other.pth"))


LAYOUTS = {
    "aesthetic": stack((0, 2, 4, 6, 7), [6, 5, 4, 3, 2, 1]),
    "aesthetic-relu": stack((0, 3, 6, 9, 11), [6, 5, 4, 3, 2, 1]),
    "aesthetic-v1": {"weight": torch.ones(1, 6), "bias": torch.ones(1)},
}


@pytest.mark.parametrize("given", LAYOUTS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_reward_takes_heads_of_its_own_layout_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, given: str
) -> None:
    monkeypatch.setattr(aesthetic, "load_tower", lambda *_, **__: SmallTower)
    mine = tmp_path / "mine.pth"
    torch.save(LAYOUTS[given], mine)
    if name == given:
        assert load_aesthetic(ROWS[name], LoadOptions(weights=mine)).head.width == 6
        return
    with pytest.raises(RewardError, match=f"is no head of {name}; it looks like a LAION") as caught:
        load_aesthetic(ROWS[name], LoadOptions(weights=mine))
    assert "mine.pth" in str(caught.value) and f"load it as {given};" in str(caught.value)


def test_the_published_v1_head_is_not_taken_for_v2(published) -> None:  # type: ignore[no-untyped-def]
    other = published("aesthetic/sa_0_4_vit_l_14_linear.pth")
    with pytest.raises(RewardError, match=r"looks like a LAION aesthetic head \(v1, linear\)"):
        load("aesthetic", weights=other)


class SmallTower:
    """As much of a tower as a reward asks for before it scores."""

    width = 6


def small_head(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LoadOptions:
    monkeypatch.setattr(aesthetic, "load_tower", lambda *_, **__: SmallTower)
    torch.save(LAYOUTS["aesthetic"], tmp_path / "mine.pth")
    return LoadOptions(weights=tmp_path / "mine.pth")


def test_a_head_that_was_loaded_in_inference_mode_can_be_back_propagated_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small_head(tmp_path, monkeypatch)
    with torch.inference_mode():
        load_aesthetic(ROWS["aesthetic"], options)
    reward = load_aesthetic(ROWS["aesthetic"], options)
    assert not any(p.is_inference() or p.requires_grad for p in reward.head.parameters())
    embeddings = torch.rand(2, 6, requires_grad=True)
    reward.score_embeddings(embeddings).sum().backward()
    assert embeddings.grad is not None and embeddings.grad.abs().sum() > 0


def test_four_threads_read_a_head_once_and_a_new_file_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small_head(tmp_path, monkeypatch)
    read: list[Path] = []

    def slow(path: Path) -> Any:
        read.append(path)
        time.sleep(0.05)
        return read_tensors(path)

    monkeypatch.setattr(aesthetic, "read_tensors", slow)
    start = Barrier(4)

    def load_one(_: int) -> Any:
        start.wait()
        return load_aesthetic(ROWS["aesthetic"], options).head

    with ThreadPoolExecutor(4) as pool:
        heads = list(pool.map(load_one, range(4)))
    assert len(read) == 1 and all(each is heads[0] for each in heads)
    torch.save(stack((0, 2, 4, 6, 7), [6, 9, 8, 7, 2, 1]), tmp_path / "mine.pth")
    changed = load_aesthetic(ROWS["aesthetic"], options).head
    assert len(read) == 2 and changed.layers[0].out_features == 9


def test_an_unknown_device_is_refused_in_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = small_head(tmp_path, monkeypatch)
    with pytest.raises(RewardError, match="gpu7"):
        load_aesthetic(ROWS["aesthetic"], LoadOptions(device="gpu7", weights=options.weights))


def test_the_gradient_reaches_the_embedding() -> None:
    loaded = head_from_tensors(stack((0, 3, 6, 9, 11), [6, 5, 4, 3, 3, 1]), Path("tiny")).double()
    embedding = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda e: score_embeddings(loaded, e), embedding)
