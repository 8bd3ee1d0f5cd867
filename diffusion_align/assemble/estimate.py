"""What a run will hold in memory and how much it computes, term by term, from a dry run.

The dry run is one update on a few samples (`one_update`). What grows with the samples and steps of
an iteration (stored latents, log-probabilities, embeddings) is exact arithmetic on shapes, and is
put in for the whole iteration. Methods say themselves what of them may be cut (`one_update`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffusion_align.assemble.dry_reward import stands_for
from diffusion_align.assemble.dry_run import PHASES, DryRun, dry_run
from diffusion_align.assemble.named import scored_with
from diffusion_align.assemble.one_update import Amount, amount, cut_to_one_update, options_of
from diffusion_align.assemble.reward_memory import FLOAT, bytes_of_rewards, small_rewards

if TYPE_CHECKING:
    from diffusion_align.config import RunConfig
    from reward_models.base import Reward


@dataclass(frozen=True)
class Estimate:
    """Bytes on the model's device, but for `beside`.

    Attributes:
        held: what is there before the first step, by term.
        later: what comes with the first update and stays.
        collected: what an iteration keeps until it is learnt from.
        phases: phase -> the most it needs on top of all that.
        gradients: part of the phase `updating` that is the trained parameters' gradients.
        beside: what lies in main memory or on another device.
        step: high-water of the one update of the dry run above `held`.
        flops: floating point operations of an iteration, by phase.
        unknown: what is not in these figures, in sentences.
    """

    held: Mapping[str, int]
    later: Mapping[str, int]
    collected: Mapping[str, int]
    phases: Mapping[str, int]
    gradients: int
    beside: Mapping[str, int]
    step: int
    flops: Mapping[str, float]
    unknown: tuple[str, ...]

    @property
    def resident(self) -> int:
        """What is there all the time from the first update on."""
        return sum((*self.held.values(), *self.later.values()))

    @property
    def fullest(self) -> str:
        """The phase that needs the most."""
        return max(self.phases, key=lambda phase: self.phases[phase])

    @property
    def peak(self) -> int:
        """The most bytes at any moment."""
        return self.resident + sum(self.collected.values()) + self.phases[self.fullest]


def estimate(config: RunConfig) -> Estimate:
    """Estimate `config`, whose settings of memory are all settled.

    Raises:
        UserError: the model's configs are not at hand, or the settings do not fit together.
    """
    from diffusion_align.policy.catalogue import resolve

    info = resolve(config.model.id)
    cut = cut_to_one_update(config, info)
    rewards = small_rewards(config)
    dry = dry_run(cut, rewards)
    whole, part = amount(config, info, dry.quiet_end), amount(cut, info, dry.quiet_end)
    stored, in_part = _stored(whole, part.steps, dry), _stored(part, part.steps, dry)
    moments, average = _moments(config, dry.trained), _average(config, dry.trained)
    held, beside, unknown = _weights(config, dry, rewards)
    scale = {
        "sampling": whole.calls / part.calls,
        "decoding": whole.samples / part.samples,
        "scoring": whole.samples / part.samples,
        "updating": whole.pairs / part.per_update,
    }
    phases = {
        name: max(0, dry.peaks[name] - sum(in_part.values()))
        for name in PHASES
        if name in dry.peaks
    }
    # The step itself makes the moments, which are in `moments` already.
    phases["optimiser"] = max(0, phases["optimiser"] - sum(moments.values()))
    phases["looking"] += sum(average.values()) + _other_pictures(config, cut, dry.picture)
    # Chunks of trajectories are joined: for a moment an iteration's latents are there twice.
    phases["joining"] = sum(size for name, size in stored.items() if name != "embeddings")
    return Estimate(
        held=held | average,
        later=moments,
        collected=stored,
        phases=phases,
        gradients=dry.trained if dry.losses > 1 else 0,
        beside=beside,
        step=dry.peak + sum(average.values()),
        flops={name: dry.flops.get(name, 0.0) * factor for name, factor in scale.items()},
        unknown=(*unknown, *filter(None, [options_of(config).caveat])),
    )


def _stored(amount: Amount, steps_of_part: int, dry: DryRun) -> dict[str, int]:
    """What an iteration of this amount keeps, by term."""
    # Methods that keep likelihoods keep whole trajectories, one latent more than steps.
    whole = dry.log_probs and dry.latents == steps_of_part + 1
    latents = amount.steps + 1 if whole else dry.latents
    log_probs = FLOAT * amount.samples * amount.steps
    return {
        "stored latents": FLOAT * amount.samples * latents * dry.latent,
        **({"log-probabilities": log_probs} if dry.log_probs else {}),
        "embeddings": amount.samples * dry.conditioning,
    }


def _other_pictures(config: RunConfig, cut: RunConfig, picture: int) -> int:
    """Pictures of a look beyond those of the dry run, where pictures are kept: in main memory."""
    from diffusion_align.policy.devices import device_of

    if device_of(config.model.device).type != "cpu":
        return 0
    evaluation = config.evaluation
    more = evaluation.sample_prompts - cut.evaluation.sample_prompts
    # Each as drawn, and as bytes of the base's and of the step's.
    return max(0, more) * evaluation.seeds * picture * (FLOAT + 2)


def _weights(
    config: RunConfig, dry: DryRun, rewards: Mapping[str, Reward]
) -> tuple[dict[str, int], dict[str, int], tuple[str, ...]]:
    """(on the device, elsewhere, what is not known)."""
    from diffusion_align.policy.devices import device_of

    device = device_of(config.model.device)
    released = bool(config.model.release_text_encoders) and device.type != "cpu"
    held: dict[str, int] = {}
    beside: dict[str, int] = {}
    for name, size in dry.components.items():
        away = released and name.startswith("text_encoder")
        (beside if away else held)[f"frozen {name}"] = size
    held["trained parameters"] = dry.trained
    elsewhere = config.reward_device is not None and device_of(config.reward_device) != device
    (beside if elsewhere else held)["rewards"] = bytes_of_rewards(config, rewards)
    missing = [n for n in scored_with(config) if n not in rewards and not stands_for(n)]
    unknown: tuple[str, ...] = ()
    if missing:
        names = ", ".join(missing)
        unknown = (f"what {names} needs while it scores is not in it: it was not loaded",)
    return held, beside, unknown


def _moments(config: RunConfig, trained: int) -> dict[str, int]:
    bytes_of_two = 2 * trained if config.train.optimizer == "adamw" else 2 * trained // FLOAT
    return {"optimiser's moments": bytes_of_two}


def _average(config: RunConfig, trained: int) -> dict[str, int]:
    return {"average (EMA)": trained} if config.train.ema_decay > 0 else {}
