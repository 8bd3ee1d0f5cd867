"""Whether DDPO's options fit together; every refusal shows its arithmetic."""

from __future__ import annotations

from diffusion_align.algorithms.losses import clip_bounds
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import ResolvedSampling


def check_options(options: DDPOOptions, sampling: ResolvedSampling, stochastic_steps: int) -> None:
    """Refuse what cannot be trained.

    Raises:
        UserError: naming the option.
    """
    for name in (
        "prompts_per_iteration",
        "samples_per_prompt",
        "train_batch_size",
        "timesteps_per_loss",
        "inner_epochs",
        "buffer_size",
        "buffer_min_count",
    ):
        if getattr(options, name) < 1:
            raise _error(name, f"{getattr(options, name)} is not at least 1")
    _check_division(options)
    if options.buffer_min_count > options.buffer_size:
        raise _error(
            "buffer_min_count",
            f"{options.buffer_min_count} rewards never fit a buffer of {options.buffer_size}",
        )
    if not 0 < options.timestep_fraction <= 1:
        raise _error("timestep_fraction", f"{options.timestep_fraction} is not in (0, 1]")
    if not options.advantage_clip > 0:
        raise _error("advantage_clip", f"{options.advantage_clip} is not positive")
    if not options.kl_weight >= 0:
        raise _error("kl_weight", f"{options.kl_weight} is negative")
    try:
        clip_bounds(options.clip_range, options.clip_unit)
    except ValueError as error:
        raise _error("clip_range", str(error)) from None
    if stochastic_steps == 0:
        raise UserError(
            "no step of this schedule has noise, so none has a likelihood to train on",
            where="sampling.eta",
            fix="set sampling.eta=1 (DDIM) or sampling.flow_kind=sde (flow models)",
        )
    guided = sampling.guidance_scale > 1
    if options.old_log_probs == "sampled" and guided and not options.train_guidance:
        raise _error(
            "old_log_probs",
            "sampled log-probabilities are those of the guided policy, training is unguided",
            "use auto or replayed",
        )


def _check_division(options: DDPOOptions) -> None:
    prompts, samples = options.prompts_per_iteration, options.samples_per_prompt
    total, size = prompts * samples, options.train_batch_size
    if total % size == 0:
        return
    divisors = [d for d in range(1, total + 1) if total % d == 0]
    near = [max(d for d in divisors if d < size), *[d for d in divisors if d > size][:1]]
    raise _error(
        "train_batch_size",
        f"{prompts} x {samples} = {total} samples do not split into batches of {size}",
        f"nearest: {', '.join(map(str, near))}",
    )


def _error(name: str, what: str, fix: str = "") -> UserError:
    return UserError(what, where=f"algorithm.{name}", fix=fix)
