"""One step of a sampling chain, as reward gradients see it: run, re-run, passed through.

Everything goes through `Schedule.step`, the one reverse step there is. Both engines
(`gradient_engines.py`) and the rollout that keeps what they need (`active_rollout.py`) are made of
these few operations.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from diffusion_align.algorithms.gradient_plan import DrawnSteps, GradientPlan
from diffusion_align.algorithms.likelihood import branches
from diffusion_align.diffusion.schedules import Schedule
from diffusion_align.diffusion.transitions import Transition
from diffusion_align.policy import Conditioning, Policy
from diffusion_align.sampling.options import ResolvedSampling


@dataclass(frozen=True)
class Chain:
    """The steps of one sampler, and where a plan lets gradients through."""

    policy: Policy
    schedule: Schedule
    sampling: ResolvedSampling
    plan: GradientPlan

    def stochastic(self) -> tuple[bool, ...]:
        """Which of the S steps take noise."""
        s = self.sampling
        std = self.schedule.std(eta=s.eta, flow_kind=s.flow_kind, noise_level=s.noise_level)
        return tuple((std > 0).tolist())

    def predict(self, x: Tensor, step: int, cond: Conditioning) -> Tensor:
        """What the network says at a step, guidance inside: [B, *latent]."""
        return self.policy.predict(
            x,
            self.schedule.timesteps[step],
            cond,
            guidance_scale=self.sampling.guidance_scale,
            guidance_gradient=self.plan.guidance_gradient,
        )

    def transition(self, prediction: Tensor, x: Tensor, step: int) -> Transition:
        """The reverse step of the sampler."""
        s = self.sampling
        return self.schedule.step(
            prediction, x, step, eta=s.eta, flow_kind=s.flow_kind, noise_level=s.noise_level
        )

    def output(
        self, prediction: Tensor, x: Tensor, step: int, noise: Tensor | None, last: int
    ) -> Tensor:
        """What a step leads to: the next latent, or at the last step run what the reward sees.

        Args:
            prediction, x: [B, *latent].
            noise: what the step took, None where it takes none.
            last: the last step run.
        """
        transition = self.transition(prediction, x, step)
        if step == last and self.plan.reward_input == "estimate":
            return transition.x0
        return transition.mean if noise is None else transition.sample(noise)

    def rerun(self, x: Tensor, step: int, cond: Conditioning, weight: float) -> tuple[Tensor, ...]:
        """The network on a coupled input: (prediction, prediction whose gradient is weighted)."""
        alpha = self.plan.coupling
        seen = x if alpha == 1 else x.detach()
        if 0 < alpha < 1:
            seen = seen + alpha * (x - x.detach())  # the value of x, to the bit
        prediction = self.predict(seen, step, cond)
        if weight == 1:
            return prediction, prediction
        constant = prediction.detach()
        return prediction, constant + weight * (prediction - constant)

    def weights(self, drawn: DrawnSteps) -> dict[int, float]:
        """Factor of each active step's network gradient."""
        said = self.plan.step_weights or (1.0,) * len(drawn.active)
        return {step: w * self.share for step, w in zip(drawn.active, said, strict=True)}

    @property
    def pairs(self) -> bool:
        """Whether a prediction joins two guidance branches."""
        return branches(self.sampling.guidance_scale, self.policy) == 2

    @property
    def share(self) -> float:
        """1 / guidance scale with `norm_compensation`: takes off what a pair's formula puts on.

        A network that is told the scale multiplies nothing by it.
        """
        compensated = self.plan.norm_compensation and self.pairs
        return 1 / self.sampling.guidance_scale if compensated else 1.0

    def through(self, gradient: Tensor, step: int, last: int) -> Tensor:
        """dL/dx from dL/d(output) where the network's output is a constant: no network call."""
        with torch.enable_grad():
            x = torch.zeros_like(gradient).requires_grad_()
            out = self.output(torch.zeros_like(gradient), x, step, None, last)
            return torch.autograd.grad(out, x, gradient)[0]

    def copy(self, prediction: Tensor, renoised: Tensor) -> Tensor:
        """The data that the last step predicts of x_0 noised again: [B, *latent].

        DDPM: (x' - sigma eps) / alpha; flow: x' - sigma v (DRaFT-LV, arXiv 2309.17400).
        """
        return self.transition(prediction, renoised, len(self.schedule) - 1).x0

    def rescale(self, drawn: DrawnSteps) -> float:
        """1 + rho (S / S_active - 1), S the sum of |d output / d prediction| over steps.

        Source: FlowBP, where S is the sum of |d sigma|, which this is for a flow's ODE.
        """
        if not self.plan.gradient_rescale:
            return 1.0
        reach = [self._reach(step, drawn.last) for step in range(drawn.last + 1)]
        active = sum(reach[step] for step in drawn.active)
        return 1 + self.plan.gradient_rescale * (sum(reach) / active - 1)

    def _reach(self, step: int, last: int) -> float:
        with torch.enable_grad():
            prediction = torch.zeros(1, 1, dtype=torch.float64, requires_grad=True)
            zero = torch.zeros(1, 1, dtype=torch.float64)
            out = self.output(prediction, zero, step, None, last)
            return abs(float(torch.autograd.grad(out.sum(), prediction)[0]))


@dataclass(frozen=True)
class Distance:
    """How far a step is from the reference's, per item.

    kind: `kl` of the two Gaussians, per dimension (SEIKO, arXiv 2402.16359: (mu - mu_ref)^2 /
    (2 std^2)), of the steps with noise only; or the mean squared difference of the `prediction`s.
    The reference is a constant, and looks at the same latent.
    """

    kind: Literal["kl", "prediction"]
    weight: float

    @property
    def metric(self) -> str:
        """What it is called in the log; guards watch the first."""
        return "policy/kl_reference" if self.kind == "kl" else "policy/prediction_distance"

    def steps(self, chain: Chain, active: Iterable[int]) -> tuple[int, ...]:
        """Those of the active steps that have such a distance; means are over these."""
        stochastic = chain.stochastic()
        return tuple(step for step in active if self.kind == "prediction" or stochastic[step])

    def of(
        self, chain: Chain, prediction: Tensor, x: Tensor, step: int, cond: Conditioning
    ) -> Tensor:
        """[B], differentiable in the prediction, of one of `steps`."""
        with torch.no_grad(), chain.policy.reference():
            reference = chain.predict(x.detach(), step, cond)
        if self.kind == "prediction":
            return (prediction - reference).square().flatten(1).mean(1)
        here = chain.transition(prediction, x, step)
        return here.kl(chain.transition(reference, x, step), "mean")
