"""What may change in a config when its run is resumed, and what would spoil the run."""

from __future__ import annotations

from diffusion_align.config.load import AnyConfig, differences
from diffusion_align.errors import UserError

# A run that goes on with another model, adapter, reward, noise or prompts is another run: its
# optimiser state, its statistics and its curve would belong to neither. Nor may an algorithm's
# options change: the checkpoint's iteration says which prompts come next only for the same number
# of prompts and samples, its remembered rewards are of this kind and length, and its finding that
# the ratio of an untouched policy is 1 holds for these batches, this precision and this guidance.
# Looks are compared with step 0 picture by picture, so they must be drawn as they were then (fewer
# or more of them are no comparison, and are seen to be none).
# The optimiser's moments and the average of the weights are of one kind from the first step on.
FIXED = (
    "model",
    "lora",
    "prompts",
    "sampling",
    "reward",
    "data",
    "algorithm",
    "supervised",
    "evaluation.prompts",
    "evaluation.eta",
    "evaluation.steps",
    "evaluation.guidance_scale",
    "train.mixed_precision",
    "train.optimizer",
    "train.ema_decay",
    "memory",  # it may split batches
    "seed",
)
# These say where and in what portions the same thing is computed, or are strengths like the
# learning rate, which no kept state hangs on.
FREE = (
    "model.device",
    "model.gradient_checkpointing",
    "model.release_text_encoders",
    "model.vae_slicing",
    "model.vae_tiling",
    "sampling.batch_size",
    "reward.device",
    # online methods
    "algorithm.advantage_clip",
    "algorithm.buffer_min_count",
    "algorithm.clip_range",
    "algorithm.inner_epochs",
    "algorithm.kl_weight",
    "algorithm.reward_overlap",
    "algorithm.reward_timeout",
    "algorithm.quantile",
    "algorithm.temperature",
    "algorithm.threshold",
    "algorithm.timestep_fraction",
    "supervised.pictures_per_loss",
    "supervised.weight",
    # reward training
    "algorithm.cache_gb",
    "algorithm.flip",
    "algorithm.validate_every",
    "algorithm.workers",
)


def changes_on_resume(before: AnyConfig, after: AnyConfig) -> list[str]:
    """`key: old -> new` of everything that changed since the run began, all of it allowed.

    Raises:
        UserError: changes that would make it another run; lists them.
    """
    changes = differences(before, after)
    barred = [change for change in changes if _is_barred(change.partition(": ")[0])]
    if barred:
        raise UserError(
            "this run cannot go on with another model, data, reward, seed, or another way to learn "
            "or to look",
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
