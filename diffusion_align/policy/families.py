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
            scheduler's config, and replaces schedulers that have no likelihood per step.
        guidance: "cat": one forward of 2B items ordered [negative, positive], joined as
            negative + scale * (positive - negative).
        decode: "scaled": pixels = VAE(z * std / scaling_factor + mean), std and mean optional.
        size_multiple: height and width must be multiples of this many pixels.
        lora_targets: layers adapted unless the user names others.
        unused_components: optional components that are not loaded (they are not the model).
        steps, guidance_scale: defaults of a model that the catalogue does not know.
    """

    name: str
    pipelines: tuple[str, ...]
    denoiser: str
    latent_argument: str
    timestep_argument: str
    timestep_factor: float
    schedule: Literal["ddim"]
    guidance: Literal["cat"]
    decode: Literal["scaled"]
    size_multiple: int
    lora_targets: tuple[str, ...]
    unused_components: tuple[str, ...]
    steps: int
    guidance_scale: float


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
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
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
        lora_targets=("to_q", "to_k", "to_v", "to_out.0"),
        unused_components=("feature_extractor", "image_encoder"),
        steps=50,
        guidance_scale=5.0,
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
