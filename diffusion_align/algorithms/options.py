"""Options of the algorithms: frozen standard-library dataclasses, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffusion_align.algorithms.clipping import clip_bounds
from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, nearest_divisors, positive, require, words


@dataclass(frozen=True)
class DDPOOptions:
    """What steers DDPO. *Source:* Black et al. 2023 (arXiv 2305.13301) and ddpo-pytorch.

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
        require(self, "lie in (0, 1]", lambda share: 0 < share <= 1, "timestep_fraction")
        at_least(self, 0, "kl_weight")
        clip_bounds(self.clip_range, self.clip_unit)
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
    def bounds(self) -> tuple[float, float]:
        """The interval that the ratio is clipped to."""
        return clip_bounds(self.clip_range, self.clip_unit)

    @property
    def samples(self) -> int:
        """Samples of one iteration."""
        return self.prompts_per_iteration * self.samples_per_prompt

    @property
    def minibatches(self) -> int:
        """Minibatches of one iteration."""
        return self.samples // self.train_batch_size * self.inner_epochs

    @property
    def arithmetic(self) -> str:
        """How the number of minibatches comes about, for messages."""
        return (
            f"{self.samples} samples / {self.train_batch_size} x {self.inner_epochs} inner epochs "
            f"= {self.minibatches} minibatches"
        )
