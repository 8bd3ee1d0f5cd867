"""What is looked at before the first update besides the replay: gradients switched on, rounding
after an update, and the reference. All of it on the first minibatch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_align.algorithms.base import Listener
from diffusion_align.algorithms.batches import TrajectoryMinibatch
from diffusion_align.algorithms.likelihood import Likelihood
from diffusion_align.algorithms.options import DDPOOptions
from diffusion_align.errors import UserError

NUDGE = 1e-3
"""Size of the trial move, relative to the parameters' root mean square."""

KL_BARS = {True: 1e-8, False: 1e-3}
"""How far an untouched policy may be from its reference, KL per dimension, in float32 or not.
Rounding gives 1e-11 and 1e-5; a reference computed in another precision 3e-2."""


@dataclass(frozen=True)
class Untouched:
    """A policy that was not updated yet. first: the minibatch that is looked at.

    guidance: of training. group_size: timesteps of one forward, as training groups them.
    """

    likelihood: Likelihood
    first: TrajectoryMinibatch
    guidance: float
    group_size: int

    def gradient_drift(self, like: Tensor) -> Tensor:
        """Log-probabilities with gradients switched on, less those without: [N, S], NaN elsewhere.

        Gradients may take other kernels, and whatever drops out in training does so only then.
        """
        group = self.first.groups(self.group_size)[0]
        with torch.no_grad():
            without = self.likelihood.log_prob(self.first, group, self.guidance)
        with torch.enable_grad():
            within = self.likelihood.log_prob(self.first, group, self.guidance).detach()
        drift = torch.full_like(like, math.nan)
        drift[self.first.rows[:, None], self.first.steps[:, group]] = within - without
        return drift

    def look_closer(self, options: DDPOOptions, *, is_float32: bool, listener: Listener) -> None:
        """Warn where rounding will drown the ratio; compare with the reference where it is used.

        Raises:
            UserError: the policy is not its reference.
        """
        if not is_float32:
            rounding = self.rounding(self.likelihood.policy.trainable_parameters())
            if warning := rounding_warning(rounding, options.clip_range, options.bounds):
                listener.message(warning)
        if options.kl_weight > 0:
            self.check_reference(is_float32=is_float32)

    @torch.no_grad()
    def rounding(self, parameters: Sequence[nn.Parameter]) -> Tensor:
        """How much rounding alone moves each log-ratio once parameters have moved: [B, T].

        f(p + d) + f(p - d) - 2 f(p) cancels what a small random move d really does to the
        log-probabilities and leaves the rounding of three evaluations; divided by sqrt(3) it is
        as large as that of two, which is what a ratio is made of. The move is undone.
        """
        here = self._log_probs()
        with _moved(parameters, +1):
            above = self._log_probs()
        with _moved(parameters, -1):
            below = self._log_probs()
        return (above + below - 2 * here).abs() / math.sqrt(3)

    @torch.no_grad()
    def check_reference(self, *, is_float32: bool) -> None:
        """Compare the policy with its reference, which it still must equal.

        Raises:
            UserError: the KL divergence per dimension exceeds the bar of the precision.
        """
        pairs = self.first.pairs(self.first.groups(self.group_size)[0])
        transition = self.likelihood.transition(pairs, self.guidance)
        with self.likelihood.policy.reference():
            reference = self.likelihood.transition(pairs, self.guidance)
        kl, bar = float(transition.kl(reference, "mean").max()), KL_BARS[is_float32]
        if not kl <= bar:
            raise UserError(
                f"the policy is not its own reference before any update: KL {kl:.1e} per "
                f"dimension, rounding allows {bar:.0e}",
                where="algorithm.kl_weight",
                fix="a policy that was trained before must be saved and loaded again (lora_path "
                "makes what was loaded the reference);\nmodel.dtype=float32 where narrow weights "
                "make the difference",
            )

    def _log_probs(self) -> Tensor:
        groups = self.first.groups(self.group_size)
        parts = [self.likelihood.log_prob(self.first, group, self.guidance) for group in groups]
        return torch.cat(parts, dim=1)


def rounding_warning(rounding: Tensor, clip_range: float, bounds: tuple[float, float]) -> str:
    """What to tell a person whose precision is coarser than the clip range; "" where it is not.

    Args:
        rounding: absolute log-ratios, of `Untouched.rounding`.
        clip_range: as the option says it; bounds: what it makes of the ratio.
    """
    beyond = ~(rounding.nan_to_num(nan=math.inf) <= math.log(bounds[1]))
    if not bool(beyond.any()):
        return ""
    worst, share = float(rounding.max()), float(beyond.float().mean())
    return (
        f"warning: in this precision rounding alone moves the log-ratio by up to {worst:.1e} after "
        f"an update, beyond the clip range {clip_range:g} on {share:.0%} of the transitions: there "
        "it is noise that clips. Train in float32 (model.dtype=float32, train.mixed_precision=no), "
        f"or set algorithm.clip_range well above {worst:.0e}"
    )


@contextmanager
def _moved(parameters: Sequence[nn.Parameter], sign: int) -> Iterator[None]:
    """The parameters a little aside, by the same random move at every call."""
    before = [parameter.detach().clone() for parameter in parameters]
    count = sum(parameter.numel() for parameter in parameters)
    squares = sum(float(parameter.detach().float().square().sum()) for parameter in parameters)
    size = sign * NUDGE * math.sqrt(squares / max(1, count))
    generator = torch.Generator().manual_seed(0)
    try:
        for parameter in parameters:
            move = torch.randn(parameter.shape, generator=generator)
            parameter.add_(move.to(parameter), alpha=size)
        yield
    finally:
        for parameter, value in zip(parameters, before, strict=True):
            parameter.copy_(value)
