"""Single objects: the policy that a config describes, the one that was tuned, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from diffusion_align.policy import Policy
    from diffusion_align.policy.tuned import Tuned
    from reward_models.base import Reward


def load_policy(config: RunConfig) -> Policy:
    """The policy that a config describes: LoRA, a LoRA that is continued, or the whole denoiser."""
    from diffusion_align.policy import Policy

    model, lora = config.model, config.lora
    plain: dict[str, Any] = {
        "device": model.device,
        "dtype": model.dtype,
        "revision": model.revision,
        "seed": config.seed,
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
