"""Options of the guards: a frozen standard-library dataclass, no torch in this file.

What each guard looks at, why, and what to do about it stands in docs/guards.md.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from diffusion_align.ranges import at_least, positive, require, words

Action = Literal["stop", "warn", "off"]


@dataclass(frozen=True)
class GuardOptions:
    """What is done about a run that goes wrong: stop it, warn (once, then rarely), or nothing.

    Errors: a value out of range raises `OptionError`.
    """

    not_finite: Literal["stop", "skip"] = field(
        default="stop",
        metadata={
            "doc": "a gradient that is NaN or infinite: stop, or leave that update out (20 in a row"
            " stop the run). Parameters that are NaN always stop it"
        },
    )
    equal_rewards: Action = field(
        default="stop",
        metadata={"doc": "rewards, or what is made of them, without any spread: nothing to learn"},
    )
    equal_rewards_iterations: int = field(
        default=3, metadata={"doc": "iterations in a row before equal_rewards acts"}
    )
    no_gradient: Action = field(
        default="stop", metadata={"doc": "no gradient at all reaches the trained parameters"}
    )
    unreached: Action = field(
        default="warn",
        metadata={"doc": "some trained tensors (LoRA's A or B) never receive a gradient"},
    )
    unreached_updates: int = field(
        default=10, metadata={"doc": "updates that a tensor may wait for its first gradient"}
    )
    ratio_drift: Action = field(
        default="warn",
        metadata={"doc": "the likelihood ratio leaves what clipping should allow"},
    )
    ratio_mean_limit: float = field(
        default=3.0,
        metadata={
            "doc": "largest |log of the mean ratio| in clip ranges (of mean or nats, whichever "
            "clips)"
        },
    )
    ratio_max_limit: float = field(
        default=30.0,
        metadata={"doc": "largest |log ratio| of a single sample and step, in clip ranges"},
    )
    ratio_iterations: int = field(
        default=2, metadata={"doc": "iterations in a row before ratio_drift acts"}
    )
    kl_explosion: Action = field(
        default="warn", metadata={"doc": "the KL divergence passes its limit or grows without end"}
    )
    kl_old_limit: float | None = field(
        default=None,
        metadata={"doc": "largest mean KL to the sampling policy; null = none, only its growth"},
    )
    kl_reference_limit: float | None = field(
        default=None,
        metadata={"doc": "largest mean KL to the reference; null = none, only its growth"},
    )
    kl_growth: float = field(
        default=2.0,
        metadata={"doc": "a KL that multiplies by this iteration after iteration explodes"},
    )
    kl_iterations: int = field(
        default=5, metadata={"doc": "iterations in a row before the growth of a KL counts"}
    )
    gradient_spike: Action = field(
        default="warn", metadata={"doc": "the gradient's norm jumps far above its recent median"}
    )
    gradient_spike_factor: float = field(
        default=30.0, metadata={"doc": "a norm above so many medians is a spike"}
    )
    reward_collapse: Action = field(
        default="stop", metadata={"doc": "the running reward falls far below that of step 0"}
    )
    reward_collapse_deviations: float = field(
        default=1.0,
        metadata={"doc": "how far: in standard deviations of the rewards of the first iteration"},
    )
    reward_collapse_iterations: int = field(
        default=5, metadata={"doc": "iterations in a row before reward_collapse acts"}
    )
    picture_change: Action = field(
        default="warn",
        metadata={
            "doc": "saturation, edges, colours or diversity of the samples move far from step 0"
        },
    )
    picture_change_share: float = field(
        default=0.5,
        metadata={"doc": "how far: a fall by this share, or the rise that it would undo"},
    )
    picture_change_iterations: int = field(
        default=3, metadata={"doc": "iterations in a row before picture_change acts"}
    )
    stop_when_heldout_falls: Action = field(
        default="warn",
        metadata={
            "doc": "a held-out reward falls below step 0 while the trained one rises: end the run "
            "early (stop), say so, or leave it"
        },
    )
    stop_when_heldout_turns: Action = field(
        default="warn",
        metadata={
            "doc": "a held-out reward that rose falls below its own best look while the trained "
            "one goes on rising: end the run early (stop), say so, or leave it"
        },
    )
    heldout_fall: float = field(
        default=0.2,
        metadata={
            "doc": "how far: in standard deviations of its scores at step 0, beside a 95 % interval"
            " below zero"
        },
    )
    heldout_looks: int = field(
        default=2, metadata={"doc": "looks in a row (train.sample_every) before that counts"}
    )
    keep_best: bool = field(
        default=True,
        metadata={"doc": "keep the weights of the look with the best held-out rewards, in best/"},
    )

    def __post_init__(self) -> None:
        words(self)
        at_least(self, 1, "equal_rewards_iterations", "unreached_updates", "ratio_iterations")
        at_least(self, 1, "kl_iterations", "reward_collapse_iterations", "heldout_looks")
        at_least(self, 1, "picture_change_iterations")
        positive(self, "ratio_mean_limit", "ratio_max_limit", "kl_old_limit", "kl_reference_limit")
        positive(self, "reward_collapse_deviations", "heldout_fall")
        require(self, "be above 1", lambda x: x > 1, "kl_growth", "gradient_spike_factor")
        require(self, "lie in (0, 1)", lambda x: 0 < x < 1, "picture_change_share")
