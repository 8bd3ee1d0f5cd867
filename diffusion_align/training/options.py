"""Options of the training loop: a frozen standard-library dataclass, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TrainOptions:
    """What steers the loop, whatever the algorithm. A *step* is one optimiser update."""

    steps: int = field(default=100, metadata={"doc": "optimiser updates in the whole run"})
    learning_rate: float = field(default=3e-4, metadata={"doc": "AdamW learning rate, constant"})
    weight_decay: float = field(default=1e-4, metadata={"doc": "AdamW weight decay"})
    adam_beta1: float = field(default=0.9, metadata={"doc": "AdamW beta 1"})
    adam_beta2: float = field(default=0.999, metadata={"doc": "AdamW beta 2"})
    adam_epsilon: float = field(default=1e-8, metadata={"doc": "AdamW epsilon"})
    max_grad_norm: float = field(
        default=1.0, metadata={"doc": "the gradient's norm is clipped to this; 0 = never"}
    )
    accumulation: int = field(
        default=1, metadata={"doc": "minibatches per optimiser update; costs no memory"}
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = field(
        default="no", metadata={"doc": "autocast of the network; losses stay in float32"}
    )
    checkpoint_every: int = field(
        default=10, metadata={"doc": "iterations between checkpoints; 0 = only at the end"}
    )
    keep_checkpoints: int = field(
        default=2, metadata={"doc": "newest checkpoints kept; older ones are deleted"}
    )
    sample_every: int = field(
        default=50,
        metadata={"doc": "steps between sample pictures and held-out scores; 0 = step 0 and end"},
    )
    log_every: int = field(default=1, metadata={"doc": "steps between rows of metrics.jsonl"})
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = field(
        default=(), metadata={"doc": "trackers beside metrics.jsonl, which is always written"}
    )
