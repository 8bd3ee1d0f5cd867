"""What reward backpropagation refuses at the start, and where it says that a gradient broke."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.algorithms.draft_options import DraftOptions
from diffusion_align.algorithms.likelihood import tells_guidance
from diffusion_align.errors import UserError
from reward_models.base import Reward


def with_gradient(reward: Reward) -> Reward:
    """`reward`, which must have a gradient.

    Raises:
        UserError: it has none; the message lists the rewards that do.
    """
    if reward.info.differentiable:
        return reward
    from reward_models.catalogue import differentiable

    lacking = getattr(reward, "without_gradient", ())
    because = f" (because of {', '.join(lacking)})" if lacking else ""
    raise UserError(
        f"has no gradient{because}, and draft back-propagates through the reward",
        where=f"reward {reward.info.name}",
        fix=f"those that have one: {', '.join(sorted(differentiable()))};\n"
        "or use algorithm.name=ddpo, which needs none",
    )


def check_guidance(policy: Any, options: DraftOptions) -> None:
    """Refuse what is asked of a second guidance branch where the network has none.

    A preset that says `conditional` means all that such a network has.

    Raises:
        UserError: naming the option.
    """
    if not tells_guidance(policy):
        return
    asked = {
        "guidance_gradient": options.guidance_gradient == "conditional",
        "norm_compensation": bool(options.norm_compensation),
    }
    if any(asked.values()):
        raise UserError(
            f"{policy.info.name} is told its guidance and has no second branch: there is nothing "
            "to leave out of the gradient, and no factor to make up for",
            where=", ".join(f"algorithm.{name}" for name, said in asked.items() if said),
            fix="leave it out (null): the gradient goes through the one branch",
        )


def refuse_half(module: nn.Module) -> None:
    """Stop at fp16 weights: a chain of gradients leaves what fp16 can hold.

    Raises:
        UserError: with the precision to use.
    """
    if any(parameter.dtype == torch.float16 for parameter in module.parameters()):
        raise UserError(
            "fp16 underflows along a chain of gradients, and its scaler compounds at every loss",
            where="model.dtype",
            fix="use bfloat16 or float32",
        )


def check_finite(gradient: Tensor, prompts: Sequence[str], iteration: int) -> None:
    """Look at dL/dx_0 [B, *latent] of items whose pixels have a finite gradient.

    Raises:
        UserError: it is not finite.
    """
    bad = ~gradient.flatten(1).isfinite().all(dim=1)
    if bool(bad.any()):
        row = int(bad.nonzero()[0, 0])
        raise UserError(
            f"its backward pass gives NaN or infinity for {int(bad.sum())} of {len(gradient)} "
            f"samples (the first: {prompts[row]!r})",
            where=f"VAE, iteration {iteration}",
            fix="VAEs of SDXL's time overflow in half precision: model.dtype=bfloat16 or float32",
        )


def check_path(*, pixels: bool, latents: bool, reward: str, iteration: int) -> None:
    """Stop where samples that should teach have no gradient, and say where it was lost.

    Args:
        pixels, latents: whether dL/dpixels and dL/dx_0 are anywhere other than zero.

    Raises:
        UserError: the chain breaks at the reward, or at the VAE.
    """
    if not pixels:
        raise UserError(
            "the gradient of all scores with respect to the pixels is zero: the chain breaks at "
            "the reward",
            where=f"reward {reward}, iteration {iteration}",
            fix="it rounds, saturates, or looks at nothing of these pictures",
        )
    if not latents:
        raise vae_broken(iteration)


def vae_broken(iteration: int) -> UserError:
    """What to raise where a gradient reaches the pixels and no latent."""
    return UserError(
        "the pixels have a gradient and the latents have none: the chain breaks at the VAE",
        where=f"VAE, iteration {iteration}",
        fix="are all pixels clipped at 0 or 1, or does decoding run under no_grad?",
    )


def denoiser_broken(iteration: int) -> UserError:
    """What to raise where a gradient reaches the latents and no trained parameter."""
    return UserError(
        "the latents have a gradient and the trained parameters have none: the chain breaks at the "
        "denoiser",
        where=f"denoiser, iteration {iteration}",
        fix="is the adapter switched on, and do its layers act at the active steps?",
    )


def arrived(parameters: Sequence[nn.Parameter]) -> bool:
    """Whether any trained parameter has a gradient on this process; of a shard, its own part."""
    gradients = (p.grad for p in parameters if p.grad is not None)
    # NaN counts: it is the not_finite guard's.
    return any(bool(getattr(g, "to_local", lambda g=g: g)().any()) for g in gradients)


def check_mismatch(mismatch: Tensor | None, limit: float) -> None:
    """Stop where re-run latents are not those that were sampled.

    Args:
        mismatch: 0-d, the largest of a minibatch (`gradient_engines.MISMATCH`).

    Raises:
        UserError: it exceeds the limit, or is not a number.
    """
    value = math.nan if mismatch is None else float(mismatch)
    if mismatch is not None and not value <= limit:
        raise UserError(
            f"the re-run chain differs from the sampled one by {value:.1e} of a step, more than "
            f"{limit:.0e}: its gradient would be that of other pictures",
            where="algorithm.mismatch_limit",
            fix="one iteration must be one update (train.accumulation), dropout must be off, and "
            "sampling and training must use one precision",
        )


def check_one_update(scale: float, minibatches: int, arithmetic: str) -> None:
    """Stop where an iteration is cut into several updates: later ones would re-run stale chains.

    Raises:
        UserError: with the accumulation to set.
    """
    if round(1 / scale) != minibatches:
        raise UserError(
            f"{arithmetic}, and an update takes {round(1 / scale)}: draft makes one update of an "
            "iteration, whose chains are those of the weights as they are",
            where="train.accumulation",
            fix=f"set train.accumulation={minibatches}, or algorithm.train_batch_size to all "
            "samples of an iteration",
        )
