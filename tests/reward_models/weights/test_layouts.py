"""Layouts: a CLIP is the same model in the keys of transformers and in those of open_clip."""

from __future__ import annotations

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
from torch import Tensor

from reward_models.backbones import build_tower
from reward_models.base import RewardError
from reward_models.weights.layouts import recognise, to_open_clip
from reward_models.weights.reading import load_strict
from tests.reward_models.weights.small_clip import HUGE, LARGE, hf_clip, small_open_clip


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))


def shapes(tensors: Any) -> dict[str, tuple[int, ...]]:
    return {key: tuple(tensor.shape) for key, tensor in tensors.items()}


@pytest.fixture(scope="module", params=["gelu", "quick_gelu"])
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """A small random CLIP of transformers, and the tower built from its tensors."""
    torch.manual_seed(0)
    act = request.param
    theirs = hf_clip((24, 96, 2, 2), (32, 128, 3, 4), 20, vocabulary=64, image=42, act=act)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    config = {
        "embed_dim": 20,
        "quick_gelu": act == "quick_gelu",
        "vision_cfg": {
            "image_size": 42,
            "patch_size": 14,
            "width": 32,
            "layers": 3,
            "head_width": 8,
        },
        "text_cfg": {"context_length": 77, "vocab_size": 64, "width": 24, "heads": 2, "layers": 2},
    }
    return theirs.eval(), build_tower(config, theirs.state_dict(), Path("small"))


@torch.no_grad()
def test_image_features_and_tokens_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    pixels = torch.randn(3, 3, 42, 42)
    hidden = theirs.vision_model(pixels)
    pooled = theirs.visual_projection(hidden.pooler_output)
    tokens = theirs.visual_projection(hidden.last_hidden_state)  # without post_layernorm
    assert pooled.abs().mean() > 0.1 and tokens.shape == (3, 10, 20)
    assert (ours.model.encode_image(pixels) - pooled).abs().max() < 1e-5
    assert (ours.image_tokens(pixels) - tokens).abs().max() < 1e-5


@torch.no_grad()
def test_text_features_and_tokens_are_those_of_transformers(pair: tuple[Any, Any]) -> None:
    theirs, ours = pair
    ids = torch.randint(1, 62, (4, 77))
    for row, length in enumerate((5, 20, 76, 77)):
        ids[row, length - 1 :] = 0
        ids[row, length - 1] = 63
    hidden = theirs.text_model(ids)
    pooled = theirs.text_projection(hidden.pooler_output)
    tokens = theirs.text_projection(hidden.last_hidden_state)
    assert pooled.abs().mean() > 0.1
    assert (ours.model.encode_text(ids) - pooled).abs().max() < 1e-5
    assert (ours.text_tokens(ids) - tokens).abs().max() < 1e-5
    assert torch.equal(ours.model.logit_scale, theirs.logit_scale)


@pytest.mark.parametrize(("text", "vision", "projection", "name", "count"), [LARGE, HUGE])
def test_full_size_keys_and_shapes_are_those_of_open_clip(
    text: Any, vision: Any, projection: int, name: str, count: int
) -> None:
    with torch.device("meta"):
        theirs = hf_clip(text, vision, projection)
        ours = open_clip.CLIP(**open_clip.get_model_config(name))
    assert sum(p.numel() for p in theirs.parameters()) == count
    # PickScore's file was written when position_ids were part of the state dict.
    ids = {f"{part}_model.embeddings.position_ids": torch.arange(9) for part in ("text", "vision")}
    converted = to_open_clip(theirs.state_dict() | ids)
    assert shapes(converted) == shapes(ours.state_dict())
    assert sum(tensor.numel() for tensor in converted.values()) == count


def test_hps_has_the_keys_of_open_clip() -> None:
    """hpsv2's own model code, loaded beside its package (whose tokenizer lacks a file)."""
    found = importlib.util.find_spec("hpsv2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("hpsv2 is not installed (pip install --no-deps hpsv2==1.2.0)")
    root = Path(next(iter(found.submodule_search_locations)))
    with torch.device("meta"), bare_packages("hpsv2", root, "src", "open_clip") as package:
        code = importlib.import_module(f"{package}.model")
        config = open_clip.get_model_config("ViT-H-14")
        theirs = code.CLIP(**config)
        ours = open_clip.CLIP(**config)
    published = theirs.state_dict()
    assert len(published) == 686
    assert shapes(to_open_clip(published)) == shapes(ours.state_dict()) == shapes(published)
    assert recognise(published) == "a CLIP ViT-H/14 in open_clip's layout, as HPS is"


class bare_packages:
    """Packages whose `__init__` does not run, for the time of an import."""

    def __init__(self, name: str, root: Path, *inner: str) -> None:
        self.folders = {name: root}
        for part in inner:
            name, root = f"{name}.{part}", root / part
            self.folders[name] = root
        self.name = name

    def __enter__(self) -> str:
        self.before = {key: sys.modules.pop(key) for key in self._ours()}
        for name, folder in self.folders.items():
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].__path__ = [str(folder)]
        return self.name

    def __exit__(self, *_: object) -> None:
        for key in self._ours():
            del sys.modules[key]
        sys.modules.update(self.before)

    def _ours(self) -> list[str]:
        first = self.name.partition(".")[0]
        return [key for key in sys.modules if key == first or key.startswith(f"{first}.")]


def small_hf() -> dict[str, Tensor]:
    """Of the same size."""
    state: dict[str, Tensor] = hf_clip(
        (8, 32, 1, 1), (64, 256, 1, 1), 8, vocabulary=20, image=28
    ).state_dict()
    state["text_model.embeddings.position_embedding.weight"] = torch.zeros(7, 8)
    return state


def test_open_clip_keys_pass_unchanged() -> None:
    state = small_open_clip().state_dict()
    passed = to_open_clip(state)
    assert passed is not state and list(passed) == list(state)
    assert all(passed[key] is state[key] for key in state)


def test_query_key_and_value_keep_their_order() -> None:
    state = small_hf()
    joined = to_open_clip(state)["visual.transformer.resblocks.0.attn.in_proj_weight"]
    parts = [f"vision_model.encoder.layers.0.self_attn.{p}_proj.weight" for p in "qkv"]
    assert [torch.equal(part, state[key]) for part, key in zip(joined.chunk(3), parts)] == [
        True
    ] * 3


def test_what_is_too_much_or_too_little_is_reported_by_the_strict_load() -> None:
    state = small_hf()
    path = Path("some.safetensors")
    load_strict(small_open_clip(), to_open_clip(state), path, assign=True)
    with pytest.raises(RewardError, match=r"unexpected extra.bias, text_model.other.weight;"):
        extra = {"extra.bias": torch.ones(1), "text_model.other.weight": torch.ones(1)}
        load_strict(small_open_clip(), to_open_clip(state | extra), path, assign=True)
    del state["vision_model.encoder.layers.0.self_attn.k_proj.bias"]
    with pytest.raises(RewardError) as refused:
        load_strict(small_open_clip(), to_open_clip(state), path, assign=True)
    said = str(refused.value)
    assert "missing visual.transformer.resblocks.0.attn.in_proj_bias" in said
    for part in "qv":
        assert f"vision_model.encoder.layers.0.self_attn.{part}_proj.bias" in said


@pytest.mark.parametrize(
    "key",
    [
        "visual.conv1.weight",
        "transformer.resblocks.0.ln_1.weight",
        "text_projection",
        "ln_final.bias",
    ],
)
def test_half_converted_files_are_refused(key: str) -> None:
    with pytest.raises(RewardError, match=rf"half converted.*{key}"):
        to_open_clip(small_hf() | {key: torch.ones(1)})


def test_parts_of_an_attention_that_do_not_fit_are_refused() -> None:
    state = small_hf()
    state["text_model.encoder.layers.0.self_attn.v_proj.weight"] = torch.ones(8, 7)
    with pytest.raises(RewardError, match="differ in shape or dtype"):
        to_open_clip(state)


def test_half_precision_stays_and_tensors_are_contiguous() -> None:
    converted = to_open_clip({key: t.half() for key, t in small_hf().items()})
    assert {t.dtype for t in converted.values()} == {torch.float16}
    assert all(t.is_contiguous() for t in converted.values())
