"""Options of the algorithms: frozen standard-library dataclasses, no torch in this file."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class DDPOOptions:
    """What steers DDPO. *Source:* Black et al. 2023 (arXiv 2305.13301) and ddpo-pytorch."""

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
