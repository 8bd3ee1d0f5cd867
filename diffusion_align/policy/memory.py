"""What a loaded policy may trade for memory or speed: one function per setting.

None of them changes which module is called: the denoiser stays in the slot it was in, in eval
mode. Checkpointing, slicing and released encoders change no number beyond rounding; tiles,
compiled blocks, another memory layout and another attention kernel do.

How we differ from the usual scripts: those switch checkpointing on and leave the network in eval
mode, where older diffusers (below 0.32) kept every activation without a word. Here it is a fact
that is looked at (`checkpointing_modules`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo
from accelerate import cpu_offload_with_hook
from diffusers.utils import logging as diffusers_logging
from torch import nn

from diffusion_align.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from diffusion_align.policy.policy import Policy

_COMPILATIONS = 64


def checkpoint_gradients(policy: Policy) -> None:
    """Keep only the inputs of the denoiser's blocks for the backward pass, and compute the rest
    again there. Acts only where gradients are enabled, so rollouts cost nothing.

    Raises:
        UserError: this denoiser has no such blocks.
    """
    denoiser: Any = policy.bare_denoiser
    if not getattr(denoiser, "_supports_gradient_checkpointing", False):
        raise UserError(
            f"{type(denoiser).__name__} cannot recompute its activations",
            where="model.gradient_checkpointing",
            fix="set it to false",
        )
    denoiser.enable_gradient_checkpointing()
    if not checkpointing_modules(denoiser):
        raise RuntimeError(f"{type(denoiser).__name__} took gradient checkpointing without effect")


def checkpointing_modules(denoiser: nn.Module) -> list[str]:
    """Names of the blocks that will recompute."""
    return [
        name
        for name, module in denoiser.named_modules()
        if getattr(module, "gradient_checkpointing", False)
    ]


def release_text_encoders(policy: Policy) -> str | None:
    """Keep text encoders in main memory; they visit the device while a new prompt is encoded.

    Returns:
        What to tell the person where there is nothing to release.
    """
    if policy.device.type == "cpu":
        return "text encoders stay: on a CPU, main memory is where they are"
    encoders = [
        component
        for name, component in policy.pipeline.components.items()
        if name.startswith("text_encoder") and isinstance(component, nn.Module)
    ]
    for encoder in encoders:
        _, hook = cpu_offload_with_hook(encoder, execution_device=policy.device)
        policy.resting.append(hook)
        hook.offload()
    return None


def slice_vae(policy: Policy) -> None:
    """Decode and encode one picture at a time."""
    policy.pipeline.vae.enable_slicing()


def tile_vae(policy: Policy) -> None:
    """Decode and encode in overlapping tiles where a picture is larger than one.

    Raises:
        UserError: this VAE cannot.
    """
    try:
        policy.pipeline.vae.enable_tiling()
    except NotImplementedError as error:
        raise UserError(
            f"{type(policy.pipeline.vae).__name__} has no tiles",
            where="model.vae_tiling",
            fix="set it to false",
        ) from error


def use_channels_last(policy: Policy) -> None:
    """Lay out the 4-D weights of denoiser, its copy and VAE as NHWC; values are unchanged."""
    layout: Any = torch.channels_last
    for module in (*_denoisers(policy), policy.pipeline.vae):
        module.to(memory_format=layout)


def compile_blocks(policy: Policy, *, backend: str = "inductor") -> None:
    """Compile the denoiser's repeated blocks in place; the first batch of each shape waits.

    Blocks instead of the whole network: they share one compilation, adapters are switched inside
    the network without compiling it anew, and the slot keeps the same module.

    Args:
        backend: of `torch.compile`.

    Raises:
        UserError: this denoiser has no repeated blocks.
    """
    # All blocks share one piece of code: each width, resolution and mode is one compilation of it,
    # and beyond torch's limit of 8 the rest would run uncompiled without a word.
    limits: Any = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, _COMPILATIONS)
    for denoiser in _denoisers(policy):
        if not getattr(denoiser, "_repeated_blocks", None):
            raise UserError(
                f"{type(denoiser).__name__} does not say which of its blocks repeat",
                where="model.compile",
                fix="set model.compile=false",
            )
        module: Any = denoiser
        module.compile_repeated_blocks(backend=backend)


def use_attention_backend(policy: Policy, name: str) -> str | None:
    """Choose the kernel of the denoiser's attention.

    Networks whose attention asks diffusers' dispatcher take any backend of its list. Older ones
    (the UNets of SD 1.5 and SDXL) ignore the dispatcher without a word; of them only `xformers`
    can be had, by the processors that they have for it.

    Returns:
        What to tell the person where the setting has no effect.

    Raises:
        UserError: an unknown backend, or one that is not installed or cannot run here.
    """
    known = attention_backends()
    if name not in known:
        near = did_you_mean(name, known)
        hint = f"did you mean {near}? " if near else ""
        raise UserError(
            f"unknown attention backend {name!r}",
            where="model.attention_backend",
            fix=f"{hint}known: {', '.join(known)}",
        )
    told = None
    for module in _denoisers(policy):
        denoiser: Any = module
        aware = any(hasattr(p, "_attention_backend") for p in _processors(denoiser))
        try:
            if aware:
                with _library_quiet():
                    denoiser.set_attention_backend(name)
            elif name == "xformers":
                denoiser.enable_xformers_memory_efficient_attention()
            else:
                told = (
                    f"warning: model.attention_backend={name} has no effect: the attention of "
                    f"{type(denoiser).__name__} does not ask for a backend (it uses torch's "
                    "scaled_dot_product_attention, which picks flash or efficient kernels itself)"
                )
        except (ImportError, ModuleNotFoundError, RuntimeError, ValueError) as error:
            raise UserError(
                f"{name} cannot be used here: {str(error).splitlines()[0]}",
                where="model.attention_backend",
                fix="install what it needs, or leave model.attention_backend out (null)",
            ) from error
    return told


def attention_backends() -> list[str]:
    """The names that diffusers knows."""
    from diffusers.models.attention_dispatch import AttentionBackendName

    return sorted(member.value for member in AttentionBackendName)


def _processors(denoiser: nn.Module) -> list[Any]:
    found = (getattr(module, "processor", None) for module in denoiser.modules())
    return [processor for processor in found if processor is not None]


def _denoisers(policy: Policy) -> list[nn.Module]:
    """The denoiser and, in full fine-tuning, its frozen copy: both must round alike."""
    copy = policy.reference_copy
    return [policy.bare_denoiser, *([copy] if copy is not None else [])]


@contextmanager
def _library_quiet() -> Iterator[None]:
    """diffusers says of every use that the feature is experimental."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)
