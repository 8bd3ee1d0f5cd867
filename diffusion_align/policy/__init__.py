"""One adapter over diffusers pipelines: capture, families (rows of data), LoRA, references.

    capture.py       run a pipeline's own `__call__` far enough to learn what it feeds its denoiser
    conditioning.py  what was captured, one row per item: sliceable, collatable, movable
    encoder.py       prompts -> conditioning, once per prompt
    families.py      what capture cannot find out, as data      guidance.py  their guidance rules
    scheduling.py    schedulers with a likelihood, schedules    decoding.py  latents to pixels and
    latents.py       decoding of images                         back, and dL/dpixels to dL/dlatents
    causal.py        causal video VAEs as functions             clips.py     clips chunk by chunk
    loading.py       names, folders, checksums                  adapter.py  LoRA and references
    lora_methods.py  diffusers' LoRA methods where it has none
    choices.py       what a person may ask of a policy          tuned.py    what a run left behind
    devices.py       the device that a word names
    policy.py        `Policy`, which puts these together

Nothing is imported until it is used (PEP 562): the catalogue and the options need no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusion_align.policy.catalogue import MODELS, ModelInfo, resolve
    from diffusion_align.policy.conditioning import Conditioning
    from diffusion_align.policy.families import FAMILIES, Family
    from diffusion_align.policy.options import LoRAOptions, ModelOptions
    from diffusion_align.policy.policy import Policy

_HOMES = {
    "MODELS": "diffusion_align.policy.catalogue",
    "ModelInfo": "diffusion_align.policy.catalogue",
    "resolve": "diffusion_align.policy.catalogue",
    "Conditioning": "diffusion_align.policy.conditioning",
    "FAMILIES": "diffusion_align.policy.families",
    "Family": "diffusion_align.policy.families",
    "LoRAOptions": "diffusion_align.policy.options",
    "ModelOptions": "diffusion_align.policy.options",
    "Policy": "diffusion_align.policy.policy",
}

__all__ = [
    "FAMILIES",
    "MODELS",
    "Conditioning",
    "Family",
    "LoRAOptions",
    "ModelInfo",
    "ModelOptions",
    "Policy",
    "resolve",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
