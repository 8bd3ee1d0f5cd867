"""BLIP on transformers against plain torch; keys and shapes of the published size."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from reward_models import blip
from reward_models.base import RewardError
from reward_models.blip import blip_from_tensors
from reward_models.wordpiece import PromptTokenizer
from tests.reward_models import small_blip as small

FILE = Path("ImageReward.pt")


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    loaded: dict[str, Tensor] = small.random_tensors(small.SMALL, seed=1, dtype=torch.float64)
    return loaded


@pytest.fixture(scope="module")
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(small.WORDS)


def pictures(count: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(count, 3, 32, 32, generator=generator, dtype=torch.float64).to(dtype)


PROMPTS = ["a large red circle", "a dog running", "", "the blue square above a white triangle !"]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-11), (torch.float32, 1e-5)])
def test_states_are_those_of_the_formulas(
    tensors: dict[str, Tensor],
    tokenizer: PromptTokenizer,
    dtype: torch.dtype,
    close: float,
) -> None:
    loaded = blip_from_tensors({key: t.to(dtype) for key, t in tensors.items()}, FILE)
    tokens, pixels = tokenizer(PROMPTS), pictures(len(PROMPTS), torch.float64)
    expected = small.class_states(tensors, pixels, tokens.ids, tokens.mask)
    states = loaded.class_states(pixels.to(dtype), tokens)
    assert states.dtype == dtype
    assert expected.std() > 0.3
    assert (states - expected).abs().max() < close


@pytest.mark.parametrize(
    "part", ["norm2.weight", "attn.qkv.bias", "crossattention.self.key.weight", "pos_embed"]
)
def test_the_formulas_feel_every_part(
    tensors: dict[str, Tensor], tokenizer: PromptTokenizer, part: str
) -> None:
    """Otherwise agreement above would say little."""
    tokens, pixels = tokenizer(PROMPTS), pictures(len(PROMPTS), torch.float64)
    key = next(key for key in tensors if key.endswith(part))
    other = {**tensors, key: tensors[key] + 0.1 * tensors[key].roll(1, -1)}
    before = small.class_states(tensors, pixels, tokens.ids, tokens.mask)
    after = small.class_states(other, pixels, tokens.ids, tokens.mask)
    assert (before - after).abs().max() > 1e-4


def test_half_precision_answers_in_float32(
    tensors: dict[str, Tensor], tokenizer: PromptTokenizer
) -> None:
    loaded = blip_from_tensors({key: t.bfloat16() for key, t in tensors.items()}, FILE)
    states = loaded.class_states(pictures(2, torch.float32), tokenizer(PROMPTS[:2]))
    exact = blip_from_tensors(tensors, FILE)
    assert loaded.dtype == torch.bfloat16 and states.dtype == torch.float32
    expected = exact.class_states(pictures(2, torch.float64), tokenizer(PROMPTS[:2]))
    assert (states - expected).abs().mean() < 0.1


def test_models_are_frozen_and_in_eval_mode(tensors: dict[str, Tensor]) -> None:
    loaded = blip_from_tensors(tensors, FILE)
    for model in (loaded.image, loaded.text):
        assert not any(module.training for module in model.modules())
        assert not any(parameter.requires_grad for parameter in model.parameters())


def test_loading_draws_no_random_numbers(tensors: dict[str, Tensor]) -> None:
    before = torch.get_rng_state()
    blip_from_tensors(tensors, FILE)
    assert torch.equal(before, torch.get_rng_state())


def test_keys_and_shapes_at_full_size() -> None:
    """ViT-L/16 and BERT-base with cross-attention, on the meta device: no memory."""
    shapes = {
        key: shape
        for key, shape in small.published_shapes(small.FULL).items()
        if key.startswith("blip.")
    }
    loaded = blip_from_tensors(
        {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}, FILE
    )
    image, text = loaded.image.state_dict(), loaded.text.state_dict()
    assert (len(image), len(text)) == (294, 316)
    published = {blip.IMAGE + blip.published_key(key): tuple(t.shape) for key, t in image.items()}
    published |= {blip.TEXT + key: tuple(t.shape) for key, t in text.items()}
    assert published == {key: shape for key, shape in shapes.items() if key not in blip.UNUSED}
    assert (loaded.image_size, loaded.width, loaded.vocabulary) == (224, 768, 30524)
    assert loaded.image.config.num_attention_heads == 16
    assert loaded.text.config.num_attention_heads == 12
    assert loaded.image.config.layer_norm_eps == 1e-6
    assert loaded.text.config.layer_norm_eps == 1e-12
    # What the published file weighs in float32, its unused projections and the head included.
    every = sum(torch.Size(s).numel() for s in small.published_shapes(small.FULL).values())
    assert every == 446_665_953


def without(tensors: dict[str, Tensor], *keys: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key not in keys}


@pytest.mark.parametrize(
    "key",
    [
        "blip.visual_encoder.blocks.1.attn.proj.bias",
        "blip.visual_encoder.pos_embed",
        "blip.visual_encoder.norm.weight",
        "blip.text_encoder.encoder.layer.0.crossattention.self.key.weight",
        "blip.text_encoder.embeddings.LayerNorm.bias",
    ],
)
def test_a_missing_key_is_named_as_the_file_spells_it(tensors: dict[str, Tensor], key: str) -> None:
    assert key in tensors
    with pytest.raises(RewardError, match="missing " + key.replace(".", r"\.")) as caught:
        blip_from_tensors(without(tensors, key), FILE)
    assert "ImageReward.pt" in str(caught.value)


def test_a_gap_between_blocks_is_named(tensors: dict[str, Tensor]) -> None:
    gapped = {
        key.replace("encoder.layer.1.", "encoder.layer.5."): tensor
        for key, tensor in tensors.items()
    }
    with pytest.raises(RewardError, match=r"missing .*encoder\.layer\.1\..* and \d+ more"):
        blip_from_tensors(gapped, FILE)


@pytest.mark.parametrize(
    "key",
    [
        "blip.itm_head.weight",
        "blip.text_encoder.pooler.dense.bias",
        "blip.visual_encoder.blocks.0.attn.extra",
    ],
)
def test_an_extra_key_is_named(tensors: dict[str, Tensor], key: str) -> None:
    with pytest.raises(RewardError, match="unexpected " + key.replace(".", r"\.")):
        blip_from_tensors({**tensors, key: torch.zeros(1)}, FILE)


def test_the_unused_projections_may_be_absent(tensors: dict[str, Tensor]) -> None:
    assert set(blip.UNUSED) < set(tensors)
    assert blip_from_tensors(without(tensors, *blip.UNUSED), FILE).width == 128


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("blip.visual_encoder.pos_embed", (1, 16, 128), "15 patches .* make no BLIP"),
        ("blip.visual_encoder.pos_embed", (17, 128), r"pos_embed has the shape \[17, 128\]"),
        ("blip.text_encoder.embeddings.word_embeddings.weight", (45, 96), "make no BLIP"),
        (
            "blip.text_encoder.embeddings.position_embeddings.weight",
            (34, 128),
            "reads 34 tokens, prompts have 35",
        ),
        (
            "blip.text_encoder.encoder.layer.1.crossattention.self.value.weight",
            (128, 64),
            "do not fit this model",
        ),
    ],
)
def test_shapes_that_make_no_blip_are_refused(
    tensors: dict[str, Tensor], key: str, shape: tuple[int, ...], message: str
) -> None:
    with pytest.raises(RewardError, match=message):
        blip_from_tensors({**tensors, key: torch.zeros(shape)}, FILE)
