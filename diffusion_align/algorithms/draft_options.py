"""Options of reward backpropagation: a frozen standard-library dataclass, no torch here."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Literal

from diffusion_align.algorithms.gradient_plan import (
    Active,
    Cut,
    GradientPlan,
    RewardInput,
)
from diffusion_align.algorithms.gradient_presets import PRESETS, REWARD_FRAMES, Preset
from diffusion_align.algorithms.options import fewest_prompts
from diffusion_align.errors import OptionError
from diffusion_align.policy.options import GuidanceGradient
from diffusion_align.ranges import at_least, nearest_divisors, positive, require, words

_AS_PRESET = "; null = as the preset says"


@dataclass(frozen=True)
class DraftOptions:
    """What steers reward backpropagation. Sources stand at the presets (`gradient_presets.py`).

    Errors: a value out of range, or batches that do not divide, raise `OptionError`.
    """

    preset: Preset = field(
        default="draft-lv",
        metadata={"doc": "the published method whose gradient plan is taken; options change it"},
    )
    prompts_per_iteration: int = field(default=8, metadata={"doc": "prompts drawn for one update"})
    samples_per_prompt: int = field(
        default=1, metadata={"doc": "pictures sampled for each of these prompts"}
    )
    train_batch_size: int = field(
        default=8,
        metadata={
            "doc": "samples that are re-run at once; must divide prompts x samples per prompt. "
            "train.accumulation is how many such minibatches an update has: all of them"
        },
    )
    reward_input: RewardInput | None = field(
        default=None,
        metadata={
            "doc": "what the reward looks at: the final sample (x_0), or the data that the last "
            "step run predicts (estimate)" + _AS_PRESET
        },
    )
    active: Active | None = field(
        default=None,
        metadata={
            "doc": "steps that carry a gradient: the last K, K spaced ones (uniform), K random "
            "ones of a window (interval), all after a random truncation (cut), all, or chosen"
            + _AS_PRESET
        },
    )
    active_steps: int | None = field(
        default=None, metadata={"doc": "K of last, uniform and interval" + _AS_PRESET}
    )
    chosen_steps: tuple[int, ...] | None = field(
        default=None, metadata={"doc": "indices of the active steps, from 0" + _AS_PRESET}
    )
    interval_start: float | None = field(
        default=None,
        metadata={"doc": "share of the steps at which the window of interval begins" + _AS_PRESET},
    )
    interval_end: float | None = field(
        default=None,
        metadata={"doc": "share of the steps at which that window ends" + _AS_PRESET},
    )
    cut: Cut | None = field(
        default=None,
        metadata={
            "doc": "how the truncation is drawn, once per batch: normal (cut_mean, cut_std) or "
            "uniform (interval_start, interval_end)" + _AS_PRESET
        },
    )
    cut_mean: float | None = field(
        default=None, metadata={"doc": "mean of a normal cut, share of the steps" + _AS_PRESET}
    )
    cut_std: float | None = field(
        default=None, metadata={"doc": "its standard deviation, share of the steps" + _AS_PRESET}
    )
    stop_start: float | None = field(
        default=None,
        metadata={
            "doc": "the last step run is drawn, once per batch, from here on; 1 = no early stop"
            + _AS_PRESET
        },
    )
    stop_end: float | None = field(
        default=None, metadata={"doc": "and before this share of the steps" + _AS_PRESET}
    )
    coupling: float | None = field(
        default=None,
        metadata={
            "doc": "share of the gradient that passes through a network's input: 1 the full chain, "
            "0 none (DRTune)" + _AS_PRESET
        },
    )
    step_weights: tuple[float, ...] | None = field(
        default=None,
        metadata={"doc": "factor of each active step's network gradient, in order" + _AS_PRESET},
    )
    gradient_rescale: float | None = field(
        default=None,
        metadata={
            "doc": "rho: 1 makes up for the steps that carry no gradient, 0 does not" + _AS_PRESET
        },
    )
    lv_copies: int | None = field(
        default=None,
        metadata={
            "doc": "more estimates from x_0 noised again to the last step's level, each with a "
            "reward of its own" + _AS_PRESET
        },
    )
    guidance_gradient: GuidanceGradient | None = field(
        default=None,
        metadata={
            "doc": "through both guidance branches, or the conditional one alone (half the memory)"
            + _AS_PRESET
        },
    )
    norm_compensation: bool | None = field(
        default=None,
        metadata={
            "doc": "with conditional: divide the gradient by the guidance scale that multiplies it"
            + _AS_PRESET
        },
    )
    loss: Literal["negative", "relu", "absolute"] = field(
        default="negative",
        metadata={
            "doc": "of a reward r: -r, max(0, loss_target - r) or |loss_target - r|, all times "
            "loss_scale"
        },
    )
    loss_target: float | None = field(
        default=None, metadata={"doc": "reward above which relu teaches nothing; absolute's aim"}
    )
    loss_scale: float = field(
        default=1.0, metadata={"doc": "factor of the loss (not of kl_weight)"}
    )
    kl_weight: float = field(
        default=0.0,
        metadata={"doc": "weight of the distance to the reference at the active steps; 0 = off"},
    )
    kl_kind: Literal["kl", "prediction"] = field(
        default="kl",
        metadata={
            "doc": "kl: between the steps' Gaussians, where they have noise; prediction: mean "
            "squared difference of what the networks say"
        },
    )
    engine: Literal["replay", "autograd"] = field(
        default="replay",
        metadata={
            "doc": "replay re-runs one step at a time, in constant memory; autograd keeps one "
            "graph of them all (to check with)"
        },
    )
    mismatch_limit: float | None = field(
        default=None,
        metadata={
            "doc": "largest difference of a re-run latent from the sampled one, as a share of what "
            "its step moved; null = 1e-3 in float32, 0.1 in lower precision"
        },
    )
    decode_batch_size: int | None = field(
        default=None,
        metadata={"doc": "samples decoded at once, also in the backward pass; null = one by one"},
    )
    reward_batch_size: int | None = field(
        default=None,
        metadata={"doc": "samples scored with gradient at once; null = those sampled at once"},
    )
    decode_frames: str = field(
        default="all",
        metadata={"doc": "video: latent frames decoded: all, first or uniform:n"},
    )
    reward_frames: str | None = field(
        default=None,
        metadata={
            "doc": "video: decoded frames an image reward sees: all, first, uniform:n or random:n "
            "(drawn for each clip of each iteration)" + _AS_PRESET
        },
    )
    range_check: Literal["stop", "warn", "off"] = field(
        default="stop",
        metadata={
            "doc": "scores outside the range that the reward states; where it says 'about', by "
            "more than the range is wide"
        },
    )
    reward_timeout: float = field(
        default=0.0,
        metadata={"doc": "seconds one call of the reward may take before the run stops; 0 = any"},
    )

    def __post_init__(self) -> None:
        words(self)
        sizes = ("prompts_per_iteration", "samples_per_prompt", "train_batch_size")
        at_least(self, 1, *sizes, "decode_batch_size", "reward_batch_size")
        at_least(self, 0, "kl_weight", "reward_timeout")
        positive(self, "loss_scale", "mismatch_limit")
        require(self, "be a number", lambda _: True, "loss_target")
        if (self.loss == "negative") != (self.loss_target is None):
            needed = self.loss != "negative"
            raise OptionError(
                "loss_target",
                f"is needed by loss={self.loss}" if needed else "is not read with loss=negative",
                fix="give the reward at which to stop pulling" if needed else "leave it out",
                reads=("loss",),
            )
        _check_frames(self)
        if self.samples % self.train_batch_size:
            raise OptionError(
                "train_batch_size",
                f"{self.prompts_per_iteration} prompts x {self.samples_per_prompt} samples = "
                f"{self.samples} samples do not split into batches of {self.train_batch_size}",
                fix=f"nearest that do: {nearest_divisors(self.samples, self.train_batch_size)}",
                reads=("prompts_per_iteration", "samples_per_prompt"),
            )
        _ = self.plan  # it checks itself

    @property
    def plan(self) -> GradientPlan:
        """The preset's plan with the options that were given."""
        names = [option.name for option in fields(GradientPlan)]
        given = {name: getattr(self, name) for name in names}
        said = {name: value for name, value in given.items() if value is not None}
        return replace(PRESETS[self.preset], **said)

    @property
    def frames_scored(self) -> str:
        """The frames of a clip that an image reward sees: as given, or as the preset says."""
        return self.reward_frames or REWARD_FRAMES.get(self.preset, "all")

    def trained_steps(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """How many network calls of a sample carry a gradient: about so many, where that is drawn.

        LV copies count as well.
        """
        plan = self.plan
        if plan.active == "cut":
            normal = plan.cut == "normal"
            first = plan.cut_mean if normal else (plan.interval_start + plan.interval_end) / 2
            steps = max(1, round((1 - first) * sampling_steps))
        else:
            counts = {"all": sampling_steps, "chosen": len(plan.chosen_steps)}
            steps = min(counts.get(plan.active, plan.active_steps), sampling_steps)
        return steps + plan.lv_copies

    def sampled_calls(self, sampling_steps: int) -> float:
        """How often the denoiser is asked for a sample while it is made: steps and LV copies."""
        ends = (self.plan.stop_start + self.plan.stop_end) / 2
        return sampling_steps * ends + self.plan.lv_copies

    def trained_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """(sample, network call with a gradient) pairs of an iteration: about so many."""
        return self.samples * self.trained_steps(sampling_steps)

    def different_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """The same: nothing is computed again."""
        return self.trained_pairs(sampling_steps)

    def fewer(self, at_once: int, steps: int, accumulation: int) -> tuple[DraftOptions, int, int]:
        """One update that is as full at its fullest: (options, sampling steps, accumulation).

        Of steps only those before the last K may go: elsewhere which of them carry a gradient hangs
        on how many there are. Of minibatches there are two where there are several: the second
        finds gradients in place. An iteration is one update, so `accumulation` is what is left.
        """
        if self.plan.active == "last" and not self.plan.stops_early:
            steps = min(steps, self.plan.active_steps + 1)
        parts = min(2, self.minibatches) * self.train_batch_size
        prompts = fewest_prompts(self, max(min(at_once, self.samples), parts))
        options = replace(self, prompts_per_iteration=prompts)
        return options, steps, options.minibatches

    def sizes(self, phase: str, at_once: int) -> dict[str, int]:
        """Options that say how much a phase has in memory at once, and what they say."""
        said = {
            "decoding": {"decode_batch_size": self.decode_batch_size or 1},
            "scoring": {"reward_batch_size": self.reward_batch_size or at_once},
        }
        return said.get(phase, {})

    def dry(self) -> DraftOptions:
        """The same work where pictures have no meaning: no score of theirs changes any of it."""
        return replace(self, loss="negative", loss_target=None, range_check="off")

    @property
    def caveat(self) -> str:
        """What an estimate made of iteration 0 cannot know of later ones; empty if nothing."""
        if self.plan.active != "cut":
            return ""
        return (
            "how many steps carry a gradient is drawn for each update (algorithm.active: cut); the "
            "figures are those of the first"
        )

    @property
    def samples(self) -> int:
        """Samples of one iteration, which is one update."""
        return self.prompts_per_iteration * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        """Minibatches of one iteration."""
        return self.samples // self.train_batch_size

    @property
    def arithmetic(self) -> str:
        """How the number of minibatches comes about, for messages."""
        return f"{self.samples} samples / {self.train_batch_size} = {self.minibatches} minibatches"


def _check_frames(options: DraftOptions) -> None:
    """Choices of frames, by the words that scorers know; without torch."""
    for name, kinds in (
        ("decode_frames", ("all", "first", "uniform")),
        ("reward_frames", ("all", "first", "uniform", "random")),
    ):
        word = getattr(options, name)
        if word is None:
            continue
        kind, _, number = str(word).partition(":")
        counted = kind in ("uniform", "random")
        fits = number.isdecimal() and int(number) > 0 if counted else not number
        if kind not in kinds or not fits:
            known = ", ".join(f"{k}:4" if k in ("uniform", "random") else k for k in kinds)
            raise OptionError(name, f"must be one of {known}, not {word!r}")
