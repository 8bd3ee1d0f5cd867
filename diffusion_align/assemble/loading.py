"""Single objects: the policy that a config describes, the one that was tuned, rewards."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.policy import ModelOptions, Policy
    from diffusion_align.policy.tuned import Tuned
    from reward_models.base import Reward


def _unsaid(text: str) -> None:
    """Nobody listens."""


def load_policy(
    config: RunConfig, *, weights: bool = True, say: Callable[[str], None] = _unsaid
) -> Policy:
    """The policy that a config describes: LoRA, a LoRA that is continued, or the whole denoiser.

    Args:
        weights: as in `Policy.load`; settings of memory and speed are made only with them.
        say: told what a setting does not do here.
    """
    model = config.model
    policy = _bare_policy(config, weights=weights)
    if weights:
        set_up(policy, model, say)
    return policy


def set_up(policy: Policy, model: ModelOptions, say: Callable[[str], None]) -> None:
    """Memory and speed as the options say; None stands for no.

    Raises:
        UserError: a setting that this model or this machine cannot have.
    """
    from diffusion_align.policy import memory

    told: list[str | None] = []
    if model.attention_backend is not None:
        told.append(memory.use_attention_backend(policy, model.attention_backend))
    if model.channels_last:
        memory.use_channels_last(policy)
    if model.gradient_checkpointing:
        memory.checkpoint_gradients(policy)
    if model.vae_slicing:
        memory.slice_vae(policy)
    if model.vae_tiling:
        memory.tile_vae(policy)
    if model.release_text_encoders:
        told.append(memory.release_text_encoders(policy))
    if model.compile:
        memory.compile_blocks(policy)
    for line in told:
        if line is not None:
            say(line)


def _bare_policy(config: RunConfig, *, weights: bool) -> Policy:
    from diffusion_align.policy import Policy

    model, lora = config.model, config.lora
    plain: dict[str, Any] = {
        "device": model.device,
        "dtype": model.dtype,
        "revision": model.revision,
        "seed": config.seed,
        "weights": weights,
    }
    if lora is None:
        return Policy.load(model.id, full=True, **plain)
    if lora.path is not None:
        # Rank, alpha and targets are the file's; a rank that was asked for is held against it.
        return Policy.load(
            model.id,
            lora_path=lora.path,
            lora_rank=lora.rank,
            lora_dropout=lora.dropout,
            **plain,
        )
    return Policy.load(
        model.id,
        lora_rank=lora.new_rank,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        lora_targets=lora.targets,
        lora_init=lora.init,
        **plain,
    )


def load_tuned(
    model: str,
    tuned: Tuned,
    device: str,
    *,
    dtype: str = "float32",
    revision: str | None = None,
) -> Policy:
    """The policy to draw with: `model` with a LoRA, or a whole model that was tuned from it.

    A saved pipeline does not say with how many steps and which guidance it is meant to be sampled;
    those are `model`'s.

    Raises:
        UserError: it cannot be loaded, or belongs to a model of another family.
    """
    from diffusion_align.policy import Policy, resolve

    if not tuned.whole:
        return Policy.load(
            model, lora_path=tuned.path, device=device, dtype=dtype, revision=revision
        )
    policy = Policy.load(tuned.path, device=device, dtype=dtype)
    info = resolve(model)
    if not info.family:
        return policy  # a hub id that is not loaded; the family's own sampling is as good
    if info.family != policy.family.name:
        raise UserError(
            f"this is a whole {policy.family.name} model, but {model} is {info.family}",
            where=str(tuned.path),
            fix="name the model that it was tuned from",
        )
    policy.info = replace(policy.info, steps=info.steps, guidance_scale=info.guidance_scale)
    return policy


def load_rewards(names: Sequence[str], device: object) -> dict[str, Reward]:
    """The rewards of these names, on `device`."""
    import reward_models

    return {name: reward_models.load(name, device=str(device)) for name in names}


def place_of_rewards(config: RunConfig, policy: Policy) -> str:
    """The device that rewards compute on: `reward_device`, else the policy's.

    Raises:
        UserError: a device that this machine does not have.
    """
    from diffusion_align.policy.devices import device_of

    if config.reward_device is None:
        return str(policy.device)
    try:
        return str(device_of(config.reward_device))
    except UserError as error:
        raise UserError(error.what, where="reward_device", fix=error.fix) from error
