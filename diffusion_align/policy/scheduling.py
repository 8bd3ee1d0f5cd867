"""Which scheduler a pipeline steps with, and the schedule that follows from its config.

Training needs steps whose likelihood is a plain Gaussian: DDIM where noise levels are of the
variance-preserving kind, Euler's flow step where they are a rectified flow's. Other schedulers are
replaced, and everything that defines the noise levels is carried over.
"""

from __future__ import annotations

from typing import Any

from diffusers import CogVideoXDDIMScheduler, FlowMatchEulerDiscreteScheduler

from diffusion_align.diffusion.schedules import Schedule, ddim_schedule, flow_schedule
from diffusion_align.errors import UserError
from diffusion_align.policy.families import Family
from diffusion_align.policy.loading import use_ddim


def use_gaussian_steps(pipeline: Any, family: Family, name: str) -> str | None:
    """Give `pipeline` the scheduler of its family, in place, where it has another.

    Returns:
        What the user is told, or None where nothing was replaced.

    Raises:
        UserError: a scheduler of another kind of process.
    """
    if family.scheduler == "DDIMScheduler":
        return use_ddim(pipeline, name)
    before = type(pipeline.scheduler).__name__
    if before == family.scheduler:
        return None
    if family.scheduler == "CogVideoXDDIMScheduler":
        pipeline.scheduler = _cogvideox_ddim(pipeline.scheduler, name)
    else:
        pipeline.scheduler = _flow_euler(pipeline.scheduler, name)
    return (
        f"{name}: scheduler {before} has no likelihood per step and was replaced by "
        f"{family.scheduler} (same noise levels); what it draws differs slightly from the model "
        "card's"
    )


def schedule_of(pipeline: Any, family: Family, steps: int, height: int, width: int) -> Schedule:
    """The reverse process in `steps` steps for media of `height` x `width` pixels.

    Raises:
        ValueError: steps or an option that the schedule does not have.
    """
    config = dict(pipeline.scheduler.config)
    if family.schedule == "ddim":
        return ddim_schedule(config, steps)
    mu = None
    if config.get("use_dynamic_shifting", False):
        mu = family.mu
        if mu is None:
            mu = _mu(config, _tokens(pipeline, height, width), family.max_shift)
    # The last of S even times is 1/S, not 0: what the pipelines of FLUX hand to their scheduler.
    sigmas = [1 - i / steps for i in range(steps)] if family.sigmas == "linear" else None
    return flow_schedule(config, steps, mu=mu, sigmas=sigmas)


def _tokens(pipeline: Any, height: int, width: int) -> int:
    """How many tokens the denoiser sees of a picture: 2 x 2 latent pixels each."""
    side = 2 * int(pipeline.vae_scale_factor)
    return (height // side) * (width // side)


def _mu(config: dict[str, Any], tokens: int, max_shift: float) -> float:
    """The shift of a resolution: linear in its tokens (diffusers `calculate_shift`)."""
    low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
    least, most = config.get("base_shift", 0.5), config.get("max_shift", max_shift)
    slope = (most - least) / (high - low)
    return float(tokens * slope + (least - slope * low))


def _cogvideox_ddim(before: Any, name: str) -> Any:
    if "snr_shift_scale" not in before.config:
        raise UserError(
            f"its scheduler {type(before).__name__} cannot be replaced by CogVideoX's DDIM",
            where=name,
            fix="use the scheduler that the model came with",
        )
    return CogVideoXDDIMScheduler.from_config(before.config)


def _flow_euler(before: Any, name: str) -> Any:
    config = dict(before.config)
    if config.get("prediction_type") != "flow_prediction":
        raise UserError(
            f"its scheduler {type(before).__name__} (prediction {config.get('prediction_type')}) "
            "cannot be replaced by a flow's Euler step",
            where=name,
            fix="use the scheduler that the model came with",
        )
    # Built by hand: `from_config` drops `flow_shift`, and every picture would be another.
    return FlowMatchEulerDiscreteScheduler(
        num_train_timesteps=int(config.get("num_train_timesteps", 1000)),
        shift=float(config.get("flow_shift") or 1.0),
        use_dynamic_shifting=bool(config.get("use_dynamic_shifting", False)),
    )
