"""What may change in a config when its run is resumed, and what would spoil the run."""

from __future__ import annotations

from diffusion_align.config.load import differences
from diffusion_align.config.sections import RunConfig
from diffusion_align.errors import UserError

# A run that goes on with another model, adapter, reward, noise or prompts is another run: its
# optimiser state, its statistics and its curve would belong to neither.
FIXED = ("model", "lora", "prompts", "sampling", "reward", "algorithm.name", "seed")
# These say where and in what portions the same thing is computed.
FREE = ("model.device", "sampling.batch_size")


def changes_on_resume(before: RunConfig, after: RunConfig) -> list[str]:
    """`key: old -> new` of everything that changed since the run began, all of it allowed.

    Raises:
        UserError: changes that would make it another run; lists them.
    """
    changes = differences(before, after)
    barred = [change for change in changes if _is_barred(change.partition(": ")[0])]
    if barred:
        raise UserError(
            "this run cannot go on with another model, data, reward or seed",
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


def _is_barred(key: str) -> bool:
    return key not in FREE and any(key == name or key.startswith(f"{name}.") for name in FIXED)
