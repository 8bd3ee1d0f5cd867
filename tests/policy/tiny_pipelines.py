"""Random-weight Stable Diffusion pipelines of a few ten thousand parameters, built in tests.

Both conftests of the rooms that need a pipeline load this file by its path.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)


def byte_tokenizer() -> CLIPTokenizer:
    """One token per character: 256 bytes, each also with `</w>`, plus start and end."""
    bytes_ = [*range(33, 127), *range(161, 173), *range(174, 256)]
    extra = [byte for byte in range(256) if byte not in bytes_]
    symbols = [chr(byte) for byte in bytes_] + [chr(256 + i) for i in range(len(extra))]
    words = [*symbols, *(f"{symbol}</w>" for symbol in symbols)]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: index for index, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77)


def text_config(width: int, projection: int) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=514,
        hidden_size=width,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        projection_dim=projection,
        bos_token_id=512,
        eos_token_id=513,
        pad_token_id=513,
    )


def small_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
    )


def ddim(prediction_type: str = "epsilon", **changes: Any) -> DDIMScheduler:
    settings: dict[str, Any] = {
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": prediction_type,
    }
    return DDIMScheduler(**{**settings, **changes})


def stable_diffusion(scheduler: Any, *, seed: int = 0) -> StableDiffusionPipeline:
    """Stable Diffusion in small: 32 x 32 pictures, latents of 4 x 16 x 16."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32,
            attention_head_dim=4,
            norm_num_groups=4,
        )
        pipeline = StableDiffusionPipeline(
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config(32, 32)),
            tokenizer=byte_tokenizer(),
            unet=unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    return _ready(pipeline)


def stable_diffusion_xl(scheduler: Any, *, seed: int = 0) -> StableDiffusionXLPipeline:
    """SDXL in small: two text encoders, six time ids, pooled text of 32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet = UNet2DConditionModel(
            block_out_channels=(8, 16),
            layers_per_block=1,
            sample_size=16,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64,
            attention_head_dim=(2, 4),
            transformer_layers_per_block=(1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 32,
            norm_num_groups=4,
        )
        pipeline = StableDiffusionXLPipeline(
            vae=small_vae(),
            text_encoder=CLIPTextModel(text_config(32, 32)),
            text_encoder_2=CLIPTextModelWithProjection(text_config(32, 32)),
            tokenizer=byte_tokenizer(),
            tokenizer_2=byte_tokenizer(),
            unet=unet,
            scheduler=scheduler,
            add_watermarker=False,
        )
    return _ready(pipeline)


def _ready(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    for component in pipeline.components.values():
        if isinstance(component, torch.nn.Module):
            component.eval()
    return pipeline
