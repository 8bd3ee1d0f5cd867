"""ComfyUI's key layout: its names, its arithmetic, and what has no place in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor, nn

from diffusion_align import Policy, UserError
from diffusion_align.policy.families import FAMILIES
from diffusion_align.publish.layouts import comfyui_layout, comfyui_name, write_comfyui

HERE = Path(__file__).parent
SHARED: dict[str, Any] = {"norm_num_groups": 4, "cross_attention_dim": 8, "layers_per_block": 2}
# The published structures of both UNets; widths are narrow, which names know nothing of.
SD15: dict[str, Any] = {"block_out_channels": (8, 16, 32, 32), "attention_head_dim": 4, **SHARED}
SDXL: dict[str, Any] = {
    "block_out_channels": (8, 16, 32),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (2, 4, 8),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 8 * 6 + 8,
    **SHARED,
}


def written(name: str) -> list[str]:
    """The names of a list, comments left out."""
    lines = (HERE / f"comfyui_names_{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line and not line.startswith("#")]


@pytest.mark.parametrize(
    ("name", "config", "in_transformers", "count"),
    [("sd15", SD15, 192, 282), ("sdxl", SDXL, 722, 794)],
)
def test_every_layer_of_the_published_unets_has_the_written_name(
    name: str, config: dict[str, Any], in_transformers: int, count: int
) -> None:
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config)
    layers = [n for n, part in unet.named_modules() if isinstance(part, nn.Linear | nn.Conv2d)]
    names = written(name)
    assert sorted(comfyui_name(layer) for layer in layers) == sorted(names)
    assert (len(set(names)), sum("_attentions_" in n for n in names)) == (count, in_transformers)
    # What is trained unless a person says otherwise: four layers of every attention.
    targets = next(f for f in FAMILIES if f.name == "stable-diffusion").lora_targets
    trained = [layer for layer in layers if layer.endswith(targets)]
    attentions = [n for n in names if "_attn1_" in n or "_attn2_" in n]
    assert sorted(map(comfyui_name, trained)) == sorted(attentions)


@pytest.mark.parametrize(
    "layer",
    [
        "transformer_blocks.0.attn.to_q",
        "mid_block.attentions.0.transformer_blocks.0.norm1",
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.base_layer",
        "down_blocks.0.motion_modules.0.proj_in",
        "encoder_hid_proj",
        "up_blocks.1.attentions.0.transformer_blocks.0.attn2.add_k_proj",
    ],
)
def test_a_layer_that_comfyui_does_not_know_is_refused_by_name(layer: str) -> None:
    with pytest.raises(UserError, match="ComfyUI has no name") as found:
        comfyui_name(layer)
    assert layer in str(found.value)


def adapted(**settings: Any) -> tuple[UNet2DConditionModel, dict[str, Tensor], dict[str, Any]]:
    """A small UNet with a LoRA on linear and convolution layers, its tensors and settings."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    targets = ["to_q", "to_out.0", "ff.net.0.proj", "proj_in", "conv1", "conv_shortcut", "op"]
    unet.add_adapter(LoraConfig(target_modules=targets, init_lora_weights=False, **settings))
    state = {f"unet.{key}": value for key, value in get_peft_model_state_dict(unet).items()}
    return unet, state, unet.peft_config["default"].to_dict()


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "lora_alpha": 4},
        {"r": 4, "lora_alpha": 16},
        {"r": 4, "lora_alpha": 2, "use_rslora": True},
        {
            "r": 4,
            "lora_alpha": 4,
            "rank_pattern": {"attn1.to_q": 2, "conv1": 3},
            "alpha_pattern": {"attn1.to_q": 8, "proj_in": 1},
        },
    ],
    ids=["plain", "alpha", "rslora", "patterns"],
)
def test_comfyuis_arithmetic_gives_pefts_change_of_every_weight(settings: dict[str, Any]) -> None:
    unet, state, known = adapted(**settings)
    layout = comfyui_layout(state, known)
    layers = {n: part for n, part in unet.named_modules() if hasattr(part, "lora_A")}
    assert len(layers) > 10 and len(layout) == 3 * len(layers)
    for name, layer in layers.items():
        key = "lora_unet_" + name.replace(".", "_")
        down, up = layout[f"{key}.lora_down.weight"], layout[f"{key}.lora_up.weight"]
        alpha = layout[f"{key}.alpha"]
        assert alpha.shape == () and alpha.dtype == torch.float32
        scale = alpha / down.shape[0]
        change = scale * (up.flatten(1) @ down.flatten(1)).reshape(layer.base_layer.weight.shape)
        wanted = layer.get_delta_weight("default")
        torch.testing.assert_close(change, wanted, atol=1e-6, rtol=1e-5)


def test_what_has_no_place_in_the_layout_is_refused() -> None:
    _, state, known = adapted(r=2, lora_alpha=2)
    with pytest.raises(UserError, match="use_dora"):
        comfyui_layout(state, {**known, "use_dora": True})
    one = next(iter(state))
    with pytest.raises(UserError, match="no pair"):
        comfyui_layout({key: value for key, value in state.items() if key != one}, known)
    with pytest.raises(UserError, match="no pair"):
        comfyui_layout({**state, "text_encoder.x.lora_A.weight": torch.zeros(2, 2)}, known)


def test_a_family_without_a_known_layout_is_named(
    folders: dict[str, Path], moved: Callable[..., None], tmp_path: Path
) -> None:
    policy = Policy.load(folders["sd"], lora_rank=2, lora_alpha=6)
    moved(policy)
    policy.save(tmp_path)
    lora = tmp_path / "pytorch_lora_weights.safetensors"
    with pytest.raises(UserError, match="flux") as found:
        write_comfyui(lora, replace(policy.family, name="flux"))
    assert "stable-diffusion-xl" in str(found.value)
    assert [path.name for path in tmp_path.iterdir()] == [lora.name]
    alphas = [v for k, v in load_file(write_comfyui(lora, policy.family)).items() if "alpha" in k]
    assert alphas and all(float(alpha) == 6.0 for alpha in alphas)
    (tmp_path / "damaged.safetensors").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be read"):
        write_comfyui(tmp_path / "damaged.safetensors", policy.family)
