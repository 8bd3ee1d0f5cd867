"""Whether DDPO can be trained as it samples, and with what it was given; what its options alone
tell is in `options.py`.
"""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor

from diffusion_align.algorithms.options import DDPOOptions, window
from diffusion_align.errors import UserError
from diffusion_align.sampling.options import ResolvedSampling
from reward_models.base import Reward


def as_reward(given: Any) -> Reward:
    """`given` where it is a reward, a plain function `fn(images, prompts) -> [B]` as one.

    Raises:
        UserError: it is neither, with what to write instead.
    """
    if isinstance(given, str):
        raise UserError(
            "a reward is an object, not its name",
            where="reward",
            fix=f"import reward_models, and give reward_models.load({given!r})",
        )
    if isinstance(given, type):
        raise UserError(
            f"{given.__name__} is a class, not a reward of it",
            where="reward",
            fix=f"give {given.__name__}(...)",
        )
    if hasattr(given, "info") and callable(getattr(given, "score", None)):
        reward: Reward = given
        return reward
    if callable(given) and not hasattr(given, "score"):
        from reward_models import FunctionReward

        return FunctionReward(given)
    raise UserError(
        f"{type(given).__name__} is no reward: it lacks `info` or `score`",
        where="reward",
        fix='give reward_models.load("name"), or a function fn(images, prompts) that returns one '
        "number per image",
    )


def in_window(steps: Tensor, count: int, start: float, end: float, *, at_least: int = 1) -> Tensor:
    """Those of `steps` (long [S], of a schedule of `count`) in the window [start, end) of it.

    Raises:
        UserError: there is none, or fewer than `at_least`, the noise window.
    """
    wanted = window(count, start, end)
    inside = steps[(steps >= wanted.start) & (steps < wanted.stop)]
    if not len(inside):
        raise UserError(
            f"no step with noise lies between {start:g} and {end:g} of the {count} steps",
            where="algorithm.window_start, algorithm.window_end",
            fix="widen the window",
        )
    if len(inside) < at_least:
        raise UserError(
            f"{at_least} steps are to take noise, and only {len(inside)} of the {count} can",
            where="algorithm.noise_window",
            fix=f"set {len(inside)} or less, or 0 for all of them",
        )
    return inside


def check_sampling(
    options: DDPOOptions,
    sampling: ResolvedSampling,
    family: Literal["ddim", "flow"],
    stochastic_steps: int,
) -> None:
    """Refuse sampling whose likelihood cannot be trained on.

    Raises:
        UserError: naming the option.
    """
    if stochastic_steps == 0:
        ddim = family == "ddim"
        key = "sampling.eta" if ddim else "sampling.flow_kind"
        fix = f"set {key}={'1' if ddim else 'sde'}"
        if sampling.eta > 0 if ddim else sampling.flow_kind != "ode":
            # Noise is asked for, but a last step that lands on clean data takes none.
            key, fix = "sampling.steps", "use 2 steps or more"
        raise UserError(
            "no step of this schedule has noise, so none has a likelihood to train on",
            where=key,
            fix=fix,
        )
    guided = sampling.guidance_scale > 1
    if options.old_log_probs == "sampled" and guided and not options.train_guidance:
        raise UserError(
            "sampled log-probabilities are those of the guided policy, training is unguided",
            where="algorithm.old_log_probs",
            fix="use auto or replayed",
        )
