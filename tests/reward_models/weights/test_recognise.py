"""What a weight file looks like: said by its keys, for the real layouts of libraries and files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn

from reward_models.weights import ASSETS
from reward_models.weights.layouts import recognise
from reward_models.weights.reading import read_tensors
from tests.reward_models.weights.small_clip import HUGE, LARGE, hf_clip, small_open_clip

Published = Callable[[str], Path]

TINY = Path(__file__).parents[3] / "diffusion_align" / "tiny" / "weights" / "tiny-sd"


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))


def named(*keys: str) -> dict[str, Tensor]:
    return {key: torch.empty(1, device="meta") for key in keys}


def stored(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118


def on_meta(build: Callable[[], nn.Module]) -> dict[str, Tensor]:
    with torch.device("meta"):
        state: dict[str, Tensor] = build().state_dict()
    return state


def models() -> Iterator[tuple[str, Callable[[], dict[str, Tensor]]]]:
    """What must be said, and the real state dict of a library or the keys of a published file."""
    for name in ("ViT-L-14", "ViT-B-32", "ViT-B-16", "ViT-g-14"):
        config = open_clip.get_model_config(name)
        said = f"a CLIP {name[:5]}/{name[6:]} in open_clip's layout"
        yield said, partial(on_meta, partial(open_clip.CLIP, **config))
    yield (
        "a CLIP ViT-L/14 in transformers' layout",
        lambda: on_meta(lambda: hf_clip(*LARGE[:3])),
    )
    yield (
        "a CLIP ViT-H/14 in transformers' layout, as PickScore is",
        lambda: on_meta(lambda: hf_clip(*HUGE[:3])),
    )
    yield (
        "a CLIP ViT of width 64, patch 14, 1 blocks in open_clip's layout",
        lambda: small_open_clip().state_dict(),
    )
    yield "a diffusion UNet", lambda: stored(TINY / "unet/diffusion_pytorch_model.safetensors")
    yield "a VAE", lambda: stored(TINY / "vae/diffusion_pytorch_model.safetensors")
    yield (
        "the text half of a CLIP in transformers' layout",
        lambda: stored(TINY / "text_encoder/model.safetensors"),
    )
    yield "a SigLIP", lambda: on_meta(lambda: transformers.SiglipModel(_siglip()))
    yield (
        "a SigLIP",
        lambda: on_meta(lambda: transformers.SiglipVisionModel(_siglip().vision_config)),
    )
    yield "a Qwen2-VL", lambda: on_meta(_qwen)
    yield (
        "HPSv3 or VideoReward (Qwen2-VL with a reward head)",
        lambda: on_meta(_qwen) | named("rm_head.0.weight"),
    )
    yield "a LoRA of a diffusion model", lambda: named("unet.down_blocks.0.to_q.lora_A.weight")
    yield "a LoRA of a diffusion model", lambda: named("lora_unet_down_0_to_q.lora_down.weight")
    yield "a LoRA", lambda: named("base_model.model.layers.0.q_proj.lora_A.weight")
    yield (
        "a Stable Diffusion checkpoint",
        lambda: named(
            "model.diffusion_model.input_blocks.0.0.weight",
            "first_stage_model.encoder.conv_in.weight",
            "cond_stage_model.transformer.text_model.final_layer_norm.weight",
        ),
    )
    yield (
        "MPS (a CLIP with a cross-attention head)",
        lambda: (
            {f"model.{k}": v for k, v in on_meta(lambda: hf_clip(*HUGE[:3])).items()}
            | named("cross_model.layers.0.0.fn.to_q.weight")
        ),
    )
    yield (
        "ImageReward (BLIP with a head)",
        lambda: named("blip.visual_encoder.blocks.0.norm1.weight", "mlp.layers.0.weight"),
    )
    yield "a BLIP", lambda: named("visual_encoder.blocks.0.norm1.weight", "text_encoder.x")
    yield "the head of aesthetic predictor v2.5 (over SigLIP)", lambda: named("scoring_head.0.bias")
    yield (
        "a reward that was trained with this package",
        lambda: named("tower.visual.proj", "head.layers.0.weight"),
    )
    yield "", lambda: named("weight")
    yield "", lambda: {}


def _siglip() -> Any:
    one = {"num_hidden_layers": 1, "vocab_size": 49408}
    return transformers.SiglipConfig(vision_config={"num_hidden_layers": 1}, text_config=one)


def _qwen() -> Any:
    config = transformers.Qwen2VLConfig(
        text_config={"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2},
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2},
    )
    return transformers.Qwen2VLForConditionalGeneration(config)


MODELS = list(models())


@pytest.mark.parametrize(
    ("said", "make"), MODELS, ids=[f"{i}-{m[0]}" for i, m in enumerate(MODELS)]
)
def test_a_file_is_recognised(said: str, make: Callable[[], dict[str, Tensor]]) -> None:
    assert recognise(make()) == said


def test_published_heads_are_recognised(published: Published) -> None:
    for name, said in (
        ("sac+logos+ava1-l14-linearMSE.pth", "a LAION aesthetic head (v2, linear MSE)"),
        ("ava+logos-l14-reluMSE.pth", "a LAION aesthetic head (ReLU)"),
        ("sa_0_4_vit_l_14_linear.pth", "a LAION aesthetic head (v1, linear)"),
    ):
        assert recognise(read_tensors(published(f"aesthetic/{name}"))) == said


def test_the_embedded_models_are_recognised() -> None:
    found = recognise(stored(ASSETS / "tiny-clip.safetensors"))
    assert found.startswith("a CLIP ViT of width ") and found.endswith("open_clip's layout")
