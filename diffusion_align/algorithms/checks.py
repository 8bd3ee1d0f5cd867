"""Whether DDPO can be trained as it samples; what its options alone tell is in `options.py`."""

from __future__ import annotations

from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import ResolvedSampling


def check_sampling(options: DDPOOptions, sampling: ResolvedSampling, stochastic_steps: int) -> None:
    """Refuse sampling whose likelihood cannot be trained on.

    Raises:
        UserError: naming the option.
    """
    if stochastic_steps == 0:
        raise UserError(
            "no step of this schedule has noise, so none has a likelihood to train on",
            where="sampling.eta",
            fix="set sampling.eta=1 (DDIM) or sampling.flow_kind=sde (flow models)",
        )
    guided = sampling.guidance_scale > 1
    if options.old_log_probs == "sampled" and guided and not options.train_guidance:
        raise UserError(
            "sampled log-probabilities are those of the guided policy, training is unguided",
            where="algorithm.old_log_probs",
            fix="use auto or replayed",
        )
