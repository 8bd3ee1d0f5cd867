"""Pictures for evaluation: the same prompts and the same noise for every model.

The noise of picture (prompt p, seed s) comes from its own stream of purpose `eval`, keyed by the
run seed, p and s alone. So base and tuned model share noise picture by picture, which is what
makes a paired comparison; so do two points of one training run. Batch size and number of devices
do not matter, and no evaluation ever meets training noise.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from diffusion_align.data.images import to_uint8
from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.options import EvaluationOptions
from diffusion_align.sampling.options import ResolvedSampling, SamplingOptions, resolve_sampling
from diffusion_align.sampling.rollout import rollout
from diffusion_align.sampling.seeds import stream

if TYPE_CHECKING:
    from diffusion_align.policy import Policy


# The model without any adapter, or the model as this training began (they differ where it
# continued from a LoRA).
Reference = Literal["base", "start"]


@dataclass(frozen=True)
class Pictures:
    """Pictures of some prompts, as a PNG would hold them.

    Attributes:
        pixels: uint8 `[P, S, 3, H, W]` on the CPU; of a video model `[P, S, F, 3, H, W]`.
        valid: bool `[P, S]`; False where the model gave a pixel that is not finite.
    """

    pixels: Tensor
    valid: Tensor

    def floats(self) -> Tensor:
        """float32 of the same shape, in [0, 1]: exactly what scoring the written PNGs would see."""
        return self.pixels.float() / 255.0


def evaluation_sampling(
    sampling: SamplingOptions, options: EvaluationOptions, *, batch_size: int | None = None
) -> SamplingOptions:
    """The sampling of an evaluation: as in training, but for what `options` say of it.

    `eta = 0` is deterministic in both families (DDIM; the flow's ODE).
    """
    guidance = options.guidance_scale
    return replace(
        sampling,
        steps=sampling.steps if options.steps is None else options.steps,
        guidance_scale=sampling.guidance_scale if guidance is None else guidance,
        eta=options.eta,
        flow_kind="ode" if options.eta == 0.0 else sampling.flow_kind,
        batch_size=batch_size or options.batch_size,
    )


def generate(
    policy: Policy,
    prompts: Sequence[str | Prompt],
    seeds: int,
    sampling: SamplingOptions,
    *,
    reference: Reference | None = None,
    run_seed: int = 0,
    first_position: int = 0,
) -> Pictures:
    """Pictures of `prompts`, `seeds` each, on the evaluation noise.

    Args:
        policy: a loaded policy; its mode (train or eval) is put back afterwards.
        prompts: P prompts, in the order of the evaluation.
        seeds: S pictures per prompt.
        sampling: None values stand for the model's own.
        reference: draw with the base model, or with the policy as its training began; None draws
            with the policy as it is.
        run_seed: chooses the evaluation noise.
        first_position: index of `prompts[0]` in the whole evaluation, where `prompts` is a slice.

    Raises:
        UserError: a sampling value out of range.
    """
    settings = resolve_sampling(sampling, policy.info)
    items = [prompt if isinstance(prompt, Prompt) else Prompt(prompt) for prompt in prompts]
    chosen = policy.reference(reference) if reference else nullcontext()
    # In this order: the reference may put another denoiser into the slot.
    with torch.no_grad(), chosen, _eval_mode(policy.denoiser):
        pixels = _draw(policy, items, seeds, settings, run_seed, first_position)
    valid = pixels.isfinite().flatten(1).all(dim=1)
    stored = torch.from_numpy(to_uint8(pixels))
    shape = (len(items), seeds)
    return Pictures(stored.reshape(*shape, *stored.shape[1:]), valid.reshape(shape))


def _draw(
    policy: Policy,
    prompts: Sequence[Prompt],
    seeds: int,
    settings: ResolvedSampling,
    run_seed: int,
    first_position: int,
) -> Tensor:
    """`float32 [P * S, (F,) 3, H, W]` on the CPU, the seeds of a prompt next to each other."""
    conditioning = policy.encode(
        [prompt.text for prompt in prompts],
        negative_prompts=[prompt.negative for prompt in prompts],
        guidance_scale=settings.guidance_scale,
        height=settings.height,
        width=settings.width,
        frames=settings.frames,
    )
    streams = [
        stream(run_seed, "eval", iteration=None, position=first_position + p, sample=s)
        for p in range(len(prompts))
        for s in range(seeds)
    ]
    trajectory = rollout(
        policy,
        conditioning.take(torch.arange(len(prompts)).repeat_interleave(seeds)),
        policy.schedule(settings.steps, height=settings.height, width=settings.width),
        streams,
        guidance_scale=settings.guidance_scale,
        eta=settings.eta,
        flow_kind=settings.flow_kind,
        noise_level=settings.noise_level,
        batch_size=settings.batch_size,
        keep="final",
    )
    decoded = [policy.decode(x_0).cpu() for x_0 in trajectory.x_0.split(settings.batch_size)]
    return torch.cat(decoded)


@contextmanager
def _eval_mode(module: nn.Module) -> Iterator[None]:
    """No dropout inside; every submodule gets its own mode back (they may differ)."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode
