"""diffusers' LoRA methods for models that diffusers gives none.

diffusers puts `add_adapter`, `load_lora_weights` and the like on its classes by mixins, and left
them out of EasyAnimate. They work on any module that names its layers, so an object without them
gets a class that is its own one with the mixin before it; name and module stay, so that what is
saved says the same.
"""

from __future__ import annotations

from typing import Any

from diffusers.loaders import CogVideoXLoraLoaderMixin
from diffusers.loaders.peft import PeftAdapterMixin

from diffusion_align.policy.families import Family


def complete_lora_methods(pipeline: Any, family: Family) -> None:
    """Give `pipeline` and its denoiser, in place, the LoRA methods that they lack.

    The pipeline's are those of CogVideoX, which know one `transformer` and no text encoder.
    """
    for owner, mixin, method in (
        (getattr(pipeline, family.denoiser), PeftAdapterMixin, "add_adapter"),
        (pipeline, CogVideoXLoraLoaderMixin, "load_lora_weights"),
    ):
        own = type(owner)
        if not hasattr(own, method):
            owner.__class__ = type(own.__name__, (mixin, own), {"__module__": own.__module__})
