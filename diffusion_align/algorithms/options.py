"""Options of the algorithms: frozen standard-library dataclasses, no torch in this file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

from diffusion_align.algorithms.clipping import clip_bounds
from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, nearest_divisors, positive, require, words


@dataclass(frozen=True)
class CollectionOptions:
    """What every online method says of an iteration: what is sampled, scored, cut and compared.

    Errors: a value out of range, or batches that do not divide, raise `OptionError`.
    """

    prompts_per_iteration: int = field(
        default=8, metadata={"doc": "prompts drawn for one collection"}
    )
    samples_per_prompt: int = field(
        default=4, metadata={"doc": "pictures sampled for each of these prompts"}
    )
    train_batch_size: int = field(
        default=8,
        metadata={"doc": "samples in one minibatch; must divide prompts x samples per prompt"},
    )
    timesteps_per_loss: int = field(
        default=1,
        metadata={"doc": "timesteps of each sample in one forward; higher is faster, more memory"},
    )
    inner_epochs: int = field(
        default=1, metadata={"doc": "how many times each collected sample is trained on"}
    )
    advantages: Literal["prompt", "group", "global"] = field(
        default="prompt",
        metadata={
            "doc": "rewards are normalised per prompt over a running buffer, within this "
            "iteration's samples of the prompt (group), or over the whole iteration (global)"
        },
    )
    buffer_size: int = field(
        default=32, metadata={"doc": "rewards remembered per prompt (advantages: prompt)"}
    )
    buffer_min_count: int = field(
        default=16,
        metadata={"doc": "a prompt with fewer remembered rewards uses the iteration's statistics"},
    )
    advantage_clip: float = field(
        default=5.0, metadata={"doc": "advantages are limited to plus and minus this"}
    )
    shared_noise: bool = field(
        default=False,
        metadata={
            "doc": "the samples of a prompt begin with the same noise, so that they differ by the "
            "steps' noise alone"
        },
    )
    reward_overlap: bool | None = field(
        default=None,
        metadata={
            "doc": "score one chunk in a thread while the next is sampled; null = where the reward "
            "computes elsewhere (another device, a server). The numbers are the same"
        },
    )
    reward_timeout: float = field(
        default=0.0,
        metadata={"doc": "seconds one call of the reward may take before the run stops; 0 = any"},
    )

    def __post_init__(self) -> None:
        words(self)
        at_least(
            self,
            1,
            "prompts_per_iteration",
            "samples_per_prompt",
            "train_batch_size",
            "timesteps_per_loss",
            "inner_epochs",
            "buffer_size",
            "buffer_min_count",
        )
        positive(self, "advantage_clip")
        at_least(self, 0, "reward_timeout")
        compared = {"group": self.samples_per_prompt, "global": self.samples}
        if compared.get(self.advantages) == 1:
            raise OptionError(
                "samples_per_prompt",
                f"1 leaves nothing to compare a sample with (advantages: {self.advantages}), so "
                "every advantage would be zero",
                fix="set 2 or more, or algorithm.advantages=prompt, which remembers rewards"
                + (", or global" if self.advantages == "group" and self.samples > 1 else ""),
                reads=("advantages", "prompts_per_iteration"),
            )
        if self.buffer_min_count > self.buffer_size:
            raise OptionError(
                "buffer_min_count",
                f"{self.buffer_min_count} rewards never fit a buffer of {self.buffer_size}",
                reads=("buffer_size",),
            )
        if self.samples % self.train_batch_size:
            raise OptionError(
                "train_batch_size",
                f"{self.prompts_per_iteration} prompts x {self.samples_per_prompt} samples = "
                f"{self.samples} samples do not split into batches of {self.train_batch_size}",
                fix=f"nearest that do: {nearest_divisors(self.samples, self.train_batch_size)}",
                reads=("prompts_per_iteration", "samples_per_prompt"),
            )

    @property
    def samples(self) -> int:
        """Samples of one iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        """Minibatches of one iteration."""
        return self.samples // self.train_batch_size * self.inner_epochs

    def trained_steps(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """How many steps of each sample an inner epoch trains on, of so many that it has.

        Args:
            quiet_end: how many steps at the end take no noise.
        """
        return sampling_steps

    def different_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """(sample, step) pairs of an iteration, each counted once; at the most, where some are
        drawn anew in every inner epoch.
        """
        return self.samples * self.trained_steps(sampling_steps, quiet_end=quiet_end)

    def fitting(self, sampling_steps: int) -> CollectionOptions:
        """The same for fewer sampling steps: nothing asks for more of them than there are."""
        return self

    def sampled_calls(self, sampling_steps: int) -> float:
        """How often the denoiser is asked for a sample while it is made."""
        return sampling_steps

    def trained_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """(sample, step) pairs that an iteration trains on, each inner epoch's counted."""
        trained = self.trained_steps(sampling_steps, quiet_end=quiet_end)
        return self.samples * trained * self.inner_epochs

    def fewer(
        self, at_once: int, steps: int, accumulation: int
    ) -> tuple[CollectionOptions, int, int]:
        """One update that is as full at its fullest: (options, sampling steps, accumulation).

        Args:
            at_once: samples that are sampled together.
            steps, accumulation: those of the run.
        """
        trained, group = self.trained_steps(steps), self.timesteps_per_loss
        # Two losses find gradients in place; so does the second of two accumulated minibatches.
        wanted = max(1, min(2 * group, trained))
        few = next((n for n in range(1, steps) if self.trained_steps(n) >= wanted), steps)
        parts = 2 if accumulation > 1 and trained <= group else 1
        samples = max(min(at_once, self.samples), self.train_batch_size)
        prompts = fewest_prompts(self, samples)
        fitting = self.fitting(few)
        return replace(fitting, prompts_per_iteration=prompts, inner_epochs=parts), few, parts

    def sizes(self, phase: str, at_once: int) -> dict[str, int]:
        """Options that say how much a phase has in memory at once, and what they say."""
        return {"timesteps_per_loss": self.timesteps_per_loss} if phase == "updating" else {}

    def dry(self) -> CollectionOptions:
        """The same work where pictures have no meaning: no score of theirs changes any of it."""
        return self

    @property
    def caveat(self) -> str:
        """What an estimate made of iteration 0 cannot know of later ones; empty if nothing."""
        return ""

    @property
    def arithmetic(self) -> str:
        """How the number of minibatches comes about, for messages."""
        return (
            f"{self.samples} samples / {self.train_batch_size} x {self.inner_epochs} inner epochs "
            f"= {self.minibatches} minibatches"
        )


class _Samples(Protocol):
    @property
    def prompts_per_iteration(self) -> int: ...
    @property
    def samples_per_prompt(self) -> int: ...
    @property
    def train_batch_size(self) -> int: ...


def fewest_prompts(options: _Samples, samples: int) -> int:
    """With how few prompts an iteration has `samples`, and falls into whole minibatches."""
    return next(
        count
        for count in range(1, options.prompts_per_iteration + 1)
        if (n := count * options.samples_per_prompt) >= samples
        and n % options.train_batch_size == 0
    )


def window(steps: int, start: float, end: float) -> range:
    """Indices of the steps, of so many in all, from share `start` on and before share `end`."""
    # The tiny terms keep 0.29 x 100 from being 28.999...
    return range(math.ceil(start * steps - 1e-9), math.ceil(end * steps - 1e-9))


@dataclass(frozen=True)
class DDPOOptions(CollectionOptions):
    """What steers DDPO. *Source:* Black et al. 2023 (arXiv 2305.13301) and ddpo-pytorch.

    Errors: a value out of range, or batches that do not divide, raise `OptionError`.
    """

    clip_range: float = field(
        default=1e-4,
        metadata={"doc": "how far the policy may move per iteration, in the unit of clip_unit"},
    )
    clip_unit: Literal["mean", "nats"] = field(
        default="mean",
        metadata={
            "doc": "mean: the log-ratio is averaged over the latent's dimensions (every published "
            "recipe); nats: it is summed (the true likelihood ratio)"
        },
    )
    timestep_fraction: float = field(
        default=1.0,
        metadata={"doc": "share of each sample's timesteps trained on, drawn anew per sample"},
    )
    window_start: float = field(
        default=0.0,
        metadata={"doc": "share of the steps, from noise on, that lie before those trained on"},
    )
    window_end: float = field(
        default=1.0,
        metadata={"doc": "share of the steps, from noise on, at which those trained on end"},
    )
    noise_window: int = field(
        default=0,
        metadata={
            "doc": "so many consecutive steps of a sample take noise and are trained on, the "
            "others are deterministic; where they lie is drawn anew for each prompt of an "
            "iteration; 0 = every step takes noise"
        },
    )
    step_weights: Literal["likelihood", "prediction"] = field(
        default="likelihood",
        metadata={
            "doc": "likelihood: the log-ratio as it is, in which late steps outweigh early ones by "
            "far; prediction: scaled at each step, so that an equal change of the denoiser's "
            "output counts the same at every step"
        },
    )
    advantage_floor: float = field(
        default=0.0,
        metadata={
            "doc": "samples whose advantage is smaller are sampled and counted in the statistics, "
            "but not trained on: they would cost as much as others and teach little; 0 = all are"
        },
    )
    train_guidance: bool = field(
        default=True,
        metadata={"doc": "apply classifier-free guidance in training as in sampling (2 calls)"},
    )
    old_log_probs: Literal["auto", "sampled", "replayed"] = field(
        default="auto",
        metadata={
            "doc": "denominator of the ratio: sampled keeps the rollout's log-probabilities; "
            "replayed computes them again in the shape of the training batch (one more forward "
            "per trained step); auto replays only where rounding would show in the ratio"
        },
    )
    kl_weight: float = field(
        default=0.0,
        metadata={
            "doc": "weight of the KL divergence to the reference, per step, in the reduction of "
            "clip_unit; 0 turns it off and saves the reference's forward"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self, "lie in (0, 1]", lambda share: 0 < share <= 1, "timestep_fraction")
        at_least(self, 0, "kl_weight", "advantage_floor", "noise_window")
        require(self, "lie in [0, 1]", lambda share: 0 <= share <= 1, "window_start", "window_end")
        if self.window_start >= self.window_end:
            raise OptionError(
                "window_end",
                f"{self.window_end:g} leaves no step after window_start {self.window_start:g}",
                reads=("window_start",),
            )
        if self.advantage_floor >= self.advantage_clip:
            raise OptionError(
                "advantage_floor",
                f"{self.advantage_floor:g} is above every advantage (limited to "
                f"{self.advantage_clip:g})",
                reads=("advantage_clip",),
            )
        clip_bounds(self.clip_range, self.clip_unit)

    def trained_steps(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """Those of a sample in the window, times the fraction; 0 where the window is empty.

        A last step that lands on clean data takes no noise and is never trained on; with
        `set_alpha_to_one: false`, as Stable Diffusion 1.5 has it, it takes noise (quiet_end 0).
        """
        noisy = self._inside(sampling_steps, quiet_end)
        return self.drawn(self.noisy(noisy)) if noisy > 0 else 0

    def different_pairs(self, sampling_steps: int, *, quiet_end: int = 1) -> int:
        """As above: with a timestep_fraction each inner epoch draws its own."""
        once = super().different_pairs(sampling_steps, quiet_end=quiet_end)
        return once if self.timestep_fraction == 1 else once * self.inner_epochs

    def fitting(self, sampling_steps: int) -> DDPOOptions:
        """The same for fewer sampling steps: the noise window is no longer than what is there."""
        inside = self._inside(sampling_steps, quiet_end=1)
        return replace(self, noise_window=min(self.noise_window, max(1, inside)))

    def _inside(self, sampling_steps: int, quiet_end: int) -> int:
        """Steps in the window that can take noise; not positive where there is none."""
        inside = window(sampling_steps, self.window_start, self.window_end)
        return min(inside.stop, sampling_steps - quiet_end) - inside.start

    def noisy(self, steps: int) -> int:
        """How many of a sample's `steps` that could take noise do."""
        return min(self.noise_window or steps, steps)

    def drawn(self, steps: int) -> int:
        """How many of a sample's `steps` that could be trained on are: `timestep_fraction`."""
        # The tiny term keeps 0.29 x 100 from flooring to 28.
        return max(1, int(steps * self.timestep_fraction + 1e-9))

    @property
    def bounds(self) -> tuple[float, float]:
        """The interval that the ratio is clipped to."""
        return clip_bounds(self.clip_range, self.clip_unit)
