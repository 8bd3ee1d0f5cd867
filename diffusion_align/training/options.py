"""Options of the training loop: a frozen standard-library dataclass, no torch in this file."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from diffusion_align.errors import OptionError
from diffusion_align.ranges import at_least, nearest_divisors, positive, require, words


@dataclass(frozen=True)
class TrainOptions:
    """What steers the loop, whatever the algorithm. A *step* is one optimiser update.

    Errors: a value out of range raises `OptionError`.
    """

    steps: int = field(default=100, metadata={"doc": "optimiser updates in the whole run"})
    learning_rate: float = field(default=3e-4, metadata={"doc": "AdamW learning rate, its highest"})
    schedule: Literal["constant", "cosine"] = field(
        default="constant",
        metadata={"doc": "of the learning rate: constant, or along a cosine to 0 at the last step"},
    )
    warmup_steps: int = field(
        default=0,
        metadata={"doc": "first steps over which the learning rate rises from 0 in a line"},
    )
    weight_decay: float = field(default=1e-4, metadata={"doc": "AdamW weight decay"})
    adam_beta1: float = field(default=0.9, metadata={"doc": "AdamW beta 1"})
    adam_beta2: float = field(default=0.999, metadata={"doc": "AdamW beta 2"})
    adam_epsilon: float = field(default=1e-8, metadata={"doc": "AdamW epsilon"})
    optimizer: Literal["adamw", "adamw8bit"] = field(
        default="adamw",
        metadata={
            "doc": "adamw8bit keeps the moments in 8 bits (2 bytes per weight instead of 8); needs "
            "CUDA and bitsandbytes"
        },
    )
    ema_decay: float = field(
        default=0.0,
        metadata={
            "doc": "held-out scores, sample pictures and final/ use a running average of the "
            "weights that keeps this share of itself at each update of it; 0 turns it off"
        },
    )
    ema_every: int = field(default=1, metadata={"doc": "steps between updates of that average"})
    max_grad_norm: float = field(
        default=1.0, metadata={"doc": "the gradient's norm is clipped to this; 0 = never"}
    )
    accumulation: int = field(
        default=1,
        metadata={
            "doc": "minibatches per optimiser update, a divisor of an iteration's; costs no memory"
        },
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"doc": "autocast of the network; losses stay in float32"}
    )
    distribution: Literal["ddp", "fsdp2"] = field(
        default="ddp",
        metadata={
            "doc": "of several processes: ddp keeps the whole network on each, fsdp2 a shard of "
            "its weights, gradients and moments; of no meaning to one (docs/scaling.md)"
        },
    )
    checkpoint_every: int = field(
        default=10, metadata={"doc": "iterations between checkpoints; 0 = only at the end"}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"doc": "newest checkpoints kept; older ones are deleted"}
    )
    sample_every: int = field(
        default=50,
        metadata={
            "doc": "steps between sample pictures and held-out scores of a policy; 0 = step 0 and "
            "end"
        },
    )
    log_every: int = field(default=1, metadata={"doc": "steps between rows of metrics.jsonl"})
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = field(
        default=(), metadata={"doc": "trackers beside metrics.jsonl, which is always written"}
    )

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "steps", "accumulation", "keep_checkpoints", "log_every")
        at_least(self, 0, "checkpoint_every", "sample_every", "weight_decay", "max_grad_norm")
        at_least(self, 0, "warmup_steps")
        positive(self, "learning_rate", "adam_epsilon")
        require(self, "lie in [0, 1)", lambda beta: 0 <= beta < 1, "adam_beta1", "adam_beta2")
        require(self, "lie in [0, 1)", lambda decay: 0 <= decay < 1, "ema_decay")
        at_least(self, 1, "ema_every")
        self._check_distribution()

    def _check_distribution(self) -> None:
        if self.distribution == "ddp":
            return
        if self.mixed_precision == "fp16":
            raise OptionError(
                "distribution",
                "fsdp2 has no gradient scaler, which fp16 needs",
                fix="set train.mixed_precision=bf16, or train.distribution=ddp",
                reads=("mixed_precision",),
            )
        if self.optimizer == "adamw8bit":
            raise OptionError(
                "distribution",
                "fsdp2 cannot shard the moments of adamw8bit",
                fix="set train.optimizer=adamw, whose moments fsdp2 shards, or "
                "train.distribution=ddp",
                reads=("optimizer",),
            )

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of update number `step`, from 0: a function of it and of the options.

        Warm-up update s of w takes (s + 1) / w of the highest rate. A run that is resumed with
        another `steps` goes on along the longer or shorter cosine.
        """
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return self.learning_rate
        share = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * min(1.0, share)))

    def check_accumulation(self, minibatches: int, arithmetic: str) -> None:
        """Refuse an iteration that does not split into whole updates.

        Args:
            minibatches: of one iteration.
            arithmetic: how that number comes about, ending in `= 8 minibatches`.

        Raises:
            OptionError: with the arithmetic and the nearest numbers that divide.
        """
        if minibatches % self.accumulation:
            raise OptionError(
                "accumulation",
                f"{arithmetic} do not split into updates of {self.accumulation}",
                fix=f"nearest that do: {nearest_divisors(minibatches, self.accumulation)}",
            )
