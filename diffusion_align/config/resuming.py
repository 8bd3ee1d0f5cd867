"""What may change in a config when its run is resumed, and what would spoil the run."""

from __future__ import annotations

from diffusion_align.config.load import AnyConfig, differences
from diffusion_align.config.sections import RewardRunConfig
from diffusion_align.errors import UserError

# A run that goes on with another model, adapter, reward, noise or prompts is another run: its
# optimiser state, its statistics and its curve would belong to neither.
FIXED = ("model", "lora", "prompts", "sampling", "reward", "data", "algorithm.name", "seed")
# What a reward learns from in which order, and by which loss.
FIXED_OF_REWARDS = ("algorithm.loss", "algorithm.batch_size", "algorithm.batches_per_iteration")
# These say where and in what portions the same thing is computed.
FREE = ("model.device", "sampling.batch_size", "reward.device")


def changes_on_resume(before: AnyConfig, after: AnyConfig) -> list[str]:
    """`key: old -> new` of everything that changed since the run began, all of it allowed.

    Raises:
        UserError: changes that would make it another run; lists them.
    """
    changes = differences(before, after)
    fixed = FIXED + FIXED_OF_REWARDS if isinstance(after, RewardRunConfig) else FIXED
    barred = [change for change in changes if _is_barred(change.partition(": ")[0], fixed)]
    if barred:
        raise UserError(
            "this run cannot go on with another model, data, reward, loss, batch or seed"
            if isinstance(after, RewardRunConfig)
            else "this run cannot go on with another model, data, reward or seed",
            where=str(after.output),
            fix="\n".join(
                [
                    *(f"changed: {change}" for change in barred),
                    f"take these back (they stand in {after.output}/config.yaml), "
                    "or begin another run with --new or another output=",
                ]
            ),
        )
    return changes


def _is_barred(key: str, fixed: tuple[str, ...]) -> bool:
    return key not in FREE and any(key == name or key.startswith(f"{name}.") for name in fixed)
