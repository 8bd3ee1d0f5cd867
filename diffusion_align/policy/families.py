"""Families of pipelines as rows of data: what capture and replay cannot find out by itself.

A family says which component denoises, how its timestep is scaled, how the guidance branches are
run and joined, how latents become pixels and which layers a LoRA adapts. Everything else (the
denoiser's arguments, their batch axes, the shape of a latent) is captured from the pipeline. No
torch here: the catalogue and the CLI read this table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion_align.errors import UserError


@dataclass(frozen=True)
class Frames:
    """What a family of video models says of time.

    Args:
        axis: of a batched latent that counts latent frames.
        ratio: frames of the clip that one latent frame becomes; the first becomes one.
        multiple: a clip has one frame more than a multiple of this.
        default: length of a clip that neither the user nor the config says.
        config_name: of the denoiser's config with that length; "" where it has none.
    """

    axis: int
    ratio: int
    multiple: int
    default: int
    config_name: str = ""


@dataclass(frozen=True)
class Family:
    """One row.

    Args:
        name: as `ModelInfo.family` states it.
        pipelines: diffusers pipeline classes (`_class_name` of `model_index.json`) of the family.
        denoiser: name of the pipeline's component that predicts.
        latent_argument: the denoiser's argument that carries x_t.
        timestep_argument: the denoiser's argument that carries the timestep.
        timestep_factor: what a scheduler's timestep is multiplied by before the denoiser sees it.
        schedule: reverse process; "ddim" reads noise levels and prediction kind (eps or v) from the
            scheduler's config, "flow" its shift. Schedulers that have no likelihood per step are
            replaced by `scheduler`.
        guidance: "cat": one forward of 2B items ordered [negative, positive], joined as
            negative + scale * (positive - negative); "two": the same by two forwards, positive
            first; "embedded": one forward that is told the scale, no negative branch.
        decode: "scaled": pixels = VAE(z * std / scaling_factor + mean), std and mean optional;
            "wan", "cogvideox" and "magvit": the causal VAEs of that name.
        size_multiple: height and width must be multiples of this many pixels.
        lora_targets: layers adapted unless the user names others.
        unused_components: optional components that are not loaded (they are not the model).
        steps, guidance_scale: defaults of a model that the catalogue does not know.
        scheduler: diffusers class of the steps, which others are replaced by.
        guidance_argument: the denoiser's argument that carries the scale, where it is embedded.
        packing: "2x2" where the denoiser takes tokens [B, h/2 * w/2, 4C] of a latent [B, C, h, w].
            Latents are stored unpacked: a row of tokens has forgotten its height and width.
        sigmas: "linear" where the pipeline sets 1, 1 - 1/S, ... itself.
        max_shift: of dynamic shifting, where the scheduler's config does not say.
        mu: of dynamic shifting, where the pipeline sets one for all sizes; None follows the size.
        needs_negative: the pipeline has no negative prompt of its own; the empty text stands in.
        size_names: the denoiser's config keys of height and width in latent pixels; () for none.
        size: height and width where the config has none.
        reader: (tokenizer, tokens) of the text encoder that reads furthest; () for every
            tokenizer's own limit.
        refused: settings of the pipeline or its denoiser that make another model of it.
        frames: of video; None for images.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    latent_argument: str
    timestep_argument: str
    timestep_factor: float
    schedule: Literal["ddim", "flow"]
    guidance: Literal["cat", "two", "embedded"]
    decode: Literal["scaled", "wan", "cogvideox", "magvit"]
    size_multiple: int
    lora_targets: tuple[str, ...]
    unused_components: tuple[str, ...]
    steps: int
    guidance_scale: float
    scheduler: str = "DDIMScheduler"
    guidance_argument: str = ""
    packing: Literal["none", "2x2"] = "none"
    sigmas: Literal["scheduler", "linear"] = "scheduler"
    max_shift: float = 1.15
    mu: float | None = None
    needs_negative: bool = False
    size_names: tuple[str, ...] = ("sample_size", "sample_size")
    size: tuple[int, int] | None = None
    reader: tuple[str, int] | tuple[()] = ()
    refused: tuple[str, ...] = ()
    frames: Frames | None = None

    @property
    def modality(self) -> Literal["image", "video"]:
        """What `decode` gives: [B, 3, H, W] or [B, F, 3, H, W]."""
        return "image" if self.frames is None else "video"


_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_JOINT_ATTENTION = (*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")

# What a scheduler's config is filled up with where DDIM takes its place. DDIM's own defaults are
# wrong for latents: they would clip them to [-1, 1]. An offset of 1 is what the Stable Diffusion
# pipelines enforce.
DDIM_DEFAULTS = {"clip_sample": False, "steps_offset": 1, "set_alpha_to_one": False}

FAMILIES: tuple[Family, ...] = (
    Family(
        name="stable-diffusion",
        pipelines=("StableDiffusionPipeline",),
        denoiser="unet",
        latent_argument="sample",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="ddim",
        guidance="cat",
        decode="scaled",
        size_multiple=8,
        lora_targets=_ATTENTION,
        unused_components=("safety_checker", "feature_extractor", "image_encoder"),
        steps=50,
        guidance_scale=7.5,
    ),
    Family(
        name="stable-diffusion-xl",
        pipelines=("StableDiffusionXLPipeline",),
        denoiser="unet",
        latent_argument="sample",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="ddim",
        guidance="cat",
        decode="scaled",
        size_multiple=8,
        lora_targets=_ATTENTION,
        unused_components=("feature_extractor", "image_encoder"),
        steps=50,
        guidance_scale=5.0,
    ),
    Family(
        name="stable-diffusion-3",
        pipelines=("StableDiffusion3Pipeline",),
        denoiser="transformer",
        latent_argument="hidden_states",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="flow",
        guidance="cat",
        decode="scaled",
        size_multiple=16,
        lora_targets=_JOINT_ATTENTION,
        unused_components=("feature_extractor", "image_encoder"),
        steps=28,
        guidance_scale=7.0,
        scheduler="FlowMatchEulerDiscreteScheduler",
        max_shift=1.16,
        reader=("tokenizer_3", 256),
    ),
    Family(
        name="flux",
        pipelines=("FluxPipeline",),
        denoiser="transformer",
        latent_argument="hidden_states",
        timestep_argument="timestep",
        timestep_factor=1e-3,
        schedule="flow",
        guidance="embedded",
        decode="scaled",
        size_multiple=16,
        lora_targets=_JOINT_ATTENTION,
        unused_components=("feature_extractor", "image_encoder"),
        steps=28,
        guidance_scale=3.5,
        scheduler="FlowMatchEulerDiscreteScheduler",
        guidance_argument="guidance",
        packing="2x2",
        sigmas="linear",
        size_names=(),
        size=(1024, 1024),
        reader=("tokenizer_2", 512),
    ),
    Family(
        name="wan2.1",
        pipelines=("WanPipeline",),
        denoiser="transformer",
        latent_argument="hidden_states",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="flow",
        guidance="two",
        decode="wan",
        size_multiple=16,
        lora_targets=(*_ATTENTION, "ffn.net.0.proj", "ffn.net.2"),
        unused_components=(),
        steps=50,
        guidance_scale=5.0,
        scheduler="FlowMatchEulerDiscreteScheduler",
        size_names=(),
        size=(480, 832),
        reader=("tokenizer", 512),
        refused=("boundary_ratio", "expand_timesteps"),  # the two kinds of Wan 2.2
        frames=Frames(axis=2, ratio=4, multiple=4, default=81),
    ),
    Family(
        name="cogvideox",
        pipelines=("CogVideoXPipeline",),
        denoiser="transformer",
        latent_argument="hidden_states",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="ddim",
        guidance="cat",
        decode="cogvideox",
        size_multiple=16,
        lora_targets=_ATTENTION,
        unused_components=(),
        steps=50,
        guidance_scale=6.0,
        scheduler="CogVideoXDDIMScheduler",
        size_names=("sample_height", "sample_width"),
        reader=("tokenizer", 226),
        refused=("patch_size_t",),  # CogVideoX 1.5, which pads latent frames
        frames=Frames(axis=1, ratio=4, multiple=8, default=49, config_name="sample_frames"),
    ),
    Family(
        name="easyanimate5.1",
        pipelines=("EasyAnimatePipeline",),
        denoiser="transformer",
        latent_argument="hidden_states",
        timestep_argument="timestep",
        timestep_factor=1.0,
        schedule="flow",
        guidance="cat",
        decode="magvit",
        size_multiple=16,
        # Without to_add_out: what it gives in the last block is thrown away, so that a LoRA there
        # has no gradient, which DDP takes for an error.
        lora_targets=(*_ATTENTION, "add_q_proj", "add_k_proj", "add_v_proj"),
        unused_components=(),
        steps=50,
        guidance_scale=6.0,
        scheduler="FlowMatchEulerDiscreteScheduler",
        mu=1.0,
        needs_negative=True,
        size_names=(),
        size=(512, 512),
        # 256 less what Qwen2-VL's chat template puts before a prompt; what is behind is cut first.
        reader=("tokenizer", 242),
        refused=("text_embed_dim_t5",),  # EasyAnimate 5, which reads two text encoders
        frames=Frames(axis=2, ratio=4, multiple=4, default=49),
    ),
)


def family_of(pipeline_class: str, *, where: str) -> Family:
    """The row of a pipeline class.

    Args:
        pipeline_class: e.g. "StableDiffusionPipeline".
        where: the model, for the message.

    Raises:
        UserError: no row has this class; the message lists those that are known.
    """
    for family in FAMILIES:
        if pipeline_class in family.pipelines:
            return family
    known = ", ".join(name for family in FAMILIES for name in family.pipelines)
    raise UserError(
        f"pipelines of class {pipeline_class} are not supported",
        where=where,
        fix=f"supported classes: {known}",
    )
