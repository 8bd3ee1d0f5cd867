"""Random-weight pipelines of the transformer families, a few ten thousand parameters each.

Loaded by its path, as `tiny_pipelines.py`, from which it takes the tokenizer and the CLIP config.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLCogVideoX,
    AutoencoderKLMagvit,
    AutoencoderKLWan,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import (
    CLIPTextModel,
    CLIPTextModelWithProjection,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)


def _beside(name: str) -> ModuleType:
    path = Path(__file__).with_name(f"{name}.py")
    spec = importlib.util.spec_from_file_location(f"{name}_of_transformers", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TINY = _beside("tiny_pipelines")


def char_tokenizer() -> T5Tokenizer:
    """One token per printable character."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -2.0)]
    pieces += [(chr(code), -3.0) for code in range(33, 127)]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def clip(kind: Any, width: int) -> Any:
    return kind(TINY.text_config(width, width))


def t5(config: Any, kind: Any, width: int) -> Any:
    return kind(
        config(
            vocab_size=98,
            d_model=width,
            d_kv=8,
            d_ff=37,
            num_layers=2,
            num_heads=4,
            relative_attention_num_buckets=8,
        )
    )


def image_vae(channels: int, **changes: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=channels,
        norm_num_groups=4,
        use_quant_conv=False,
        use_post_quant_conv=False,
        **changes,
    )


def stable_diffusion_3(**scheduler: Any) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3 in small: 32 x 32 pictures, latents of 16 x 16 x 16."""
    return _ready(
        lambda: StableDiffusion3Pipeline(
            transformer=SD3Transformer2DModel(
                sample_size=16,
                patch_size=2,
                in_channels=16,
                num_layers=2,
                attention_head_dim=8,
                num_attention_heads=4,
                joint_attention_dim=64,
                caption_projection_dim=32,
                pooled_projection_dim=64,
                out_channels=16,
                pos_embed_max_size=32,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            vae=image_vae(16, scaling_factor=1.5305, shift_factor=0.0609),
            text_encoder=clip(CLIPTextModelWithProjection, 32),
            tokenizer=TINY.byte_tokenizer(),
            text_encoder_2=clip(CLIPTextModelWithProjection, 32),
            tokenizer_2=TINY.byte_tokenizer(),
            text_encoder_3=t5(T5Config, T5EncoderModel, 64),
            tokenizer_3=char_tokenizer(),
        )
    )


def flux(*, schnell: bool = False) -> FluxPipeline:
    """FLUX.1 in small: 32 x 32 pictures, latents of 4 x 16 x 16 in tokens of 16.

    `schnell` is told no guidance scale, and its noise levels do not depend on the size.
    """
    return _ready(
        lambda: FluxPipeline(
            transformer=FluxTransformer2DModel(
                patch_size=1,
                in_channels=16,
                num_layers=1,
                num_single_layers=1,
                attention_head_dim=16,
                num_attention_heads=2,
                joint_attention_dim=32,
                pooled_projection_dim=32,
                guidance_embeds=not schnell,
                axes_dims_rope=(4, 4, 8),
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(
                shift=1.0 if schnell else 3.0,
                use_dynamic_shifting=not schnell,
                base_shift=0.5,
                max_shift=1.15,
                base_image_seq_len=256,
                max_image_seq_len=4096,
            ),
            vae=image_vae(4, scaling_factor=0.3611, shift_factor=0.1159),
            text_encoder=clip(CLIPTextModel, 32),
            tokenizer=TINY.byte_tokenizer(),
            text_encoder_2=t5(T5Config, T5EncoderModel, 32),
            tokenizer_2=char_tokenizer(),
        )
    )


def wan(scheduler: Any = None) -> WanPipeline:
    """Wan 2.1 in small: latents of 16 channels, one latent frame per four of the clip."""
    return _ready(
        lambda: WanPipeline(
            tokenizer=char_tokenizer(),
            text_encoder=t5(UMT5Config, UMT5EncoderModel, 32),
            vae=AutoencoderKLWan(
                base_dim=3,
                z_dim=16,
                dim_mult=[1, 1, 1, 1],
                num_res_blocks=1,
                temperal_downsample=[False, True, True],
            ),
            scheduler=scheduler or FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=WanTransformer3DModel(
                patch_size=(1, 2, 2),
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=16,
                out_channels=16,
                text_dim=32,
                freq_dim=32,
                ffn_dim=32,
                num_layers=2,
                cross_attn_norm=True,
                qk_norm="rms_norm_across_heads",
                rope_max_seq_len=32,
            ),
        )
    )


def cogvideox(*, rotary: bool = False) -> CogVideoXPipeline:
    """CogVideoX in small: latents of 4 channels, frames before channels."""
    return _ready(
        lambda: CogVideoXPipeline(
            tokenizer=char_tokenizer(),
            text_encoder=t5(T5Config, T5EncoderModel, 32),
            vae=AutoencoderKLCogVideoX(
                in_channels=3,
                out_channels=3,
                down_block_types=("CogVideoXDownBlock3D",) * 4,
                up_block_types=("CogVideoXUpBlock3D",) * 4,
                block_out_channels=(8, 8, 8, 8),
                latent_channels=4,
                layers_per_block=1,
                norm_num_groups=2,
                temporal_compression_ratio=4,
            ),
            scheduler=CogVideoXDDIMScheduler(
                beta_start=0.00085,
                beta_end=0.012,
                beta_schedule="scaled_linear",
                prediction_type="v_prediction",
                rescale_betas_zero_snr=True,
                snr_shift_scale=3.0,
                timestep_spacing="trailing",
                set_alpha_to_one=True,
            ),
            transformer=CogVideoXTransformer3DModel(
                num_attention_heads=4,
                attention_head_dim=16 if rotary else 8,
                in_channels=4,
                out_channels=4,
                time_embed_dim=2,
                text_embed_dim=32,
                num_layers=1,
                sample_width=4,
                sample_height=4,
                sample_frames=9,
                patch_size=2,
                temporal_compression_ratio=4,
                max_text_seq_length=226,
                use_rotary_positional_embeddings=rotary,
            ),
        )
    )


def easyanimate(**scheduler: Any) -> EasyAnimatePipeline:
    """EasyAnimate V5.1 in small: latents of 4 channels, one latent frame per four of the clip."""
    return _ready(
        lambda: EasyAnimatePipeline(
            tokenizer=chat_tokenizer(),
            text_encoder=qwen2_vl(32),
            vae=AutoencoderKLMagvit(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=2,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(**{"shift": 3.0, **scheduler}),
            transformer=EasyAnimateTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=16,
                in_channels=4,
                out_channels=4,
                patch_size=2,
                num_layers=2,
                mmdit_layers=2,
                time_embed_dim=8,
                add_norm_text_encoder=True,
                text_embed_dim=32,
            ),
        )
    )


def chat_tokenizer() -> Qwen2Tokenizer:
    """One token per byte, and a chat template as Qwen2-VL's, without its system prompt."""
    vocabulary = {word: i for i, word in enumerate(TINY.byte_tokenizer().get_vocab()) if i < 256}
    for word in ("<|endoftext|>", "<|im_start|>", "<|im_end|>"):
        vocabulary[word] = len(vocabulary)
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}<|im_end|>{% endfor %}"
    )
    return tokenizer


def qwen2_vl(width: int) -> Qwen2VLForConditionalGeneration:
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={
                "vocab_size": 259,
                "hidden_size": width,
                "intermediate_size": 37,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 512,
                "rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]},
                "bos_token_id": 256,
                "eos_token_id": 256,
            },
            vision_config={"depth": 1, "embed_dim": 8, "hidden_size": width, "num_heads": 2},
            image_token_id=250,
            video_token_id=251,
            vision_start_token_id=252,
            vision_end_token_id=253,
        )
    )


def _ready(build: Callable[[], Any]) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = TINY._ready(build())
        # Their last layers begin at zero, and a denoiser that says nothing proves nothing.
        for parameter in pipeline.transformer.parameters():
            if float(parameter.detach().abs().max()) == 0:
                torch.nn.init.normal_(parameter, std=0.05)
    return pipeline
