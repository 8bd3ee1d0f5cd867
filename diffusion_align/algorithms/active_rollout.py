"""The rollout of reward backpropagation: no gradients, and only what the engines re-run is kept.

Kept are the latents at the active steps and behind them, the noise those steps took, and what the
reward looks at. Chains of a plan that stops early end there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from numpy.random import Generator
from torch import Tensor

from diffusion_align.algorithms.gradient_chain import Chain
from diffusion_align.algorithms.gradient_plan import DrawnSteps
from diffusion_align.diffusion.noising import add_noise
from diffusion_align.policy import Conditioning
from diffusion_align.sampling.seeds import normal


@dataclass(frozen=True)
class Walk:
    """B chains as far as they are walked back.

    Args:
        drawn: the active steps, and the last one run.
        places: the steps whose latent is kept, ascending.
        latents: [B, P, *latent] in the order of `places`.
        noisy: the steps whose noise is kept, ascending.
        noise: [B, Q, *latent] in the order of `noisy`.
        final: [B, *latent], what the reward looks at.
        renoised: [B, C, *latent], x_0 noised again, one per LV copy.
        copies: [B, C, *latent], the data that the last step made of them.
    """

    drawn: DrawnSteps
    places: tuple[int, ...]
    latents: Tensor
    noisy: tuple[int, ...]
    noise: Tensor
    final: Tensor
    renoised: Tensor
    copies: Tensor

    def __len__(self) -> int:
        return len(self.final)

    def x(self, step: int) -> Tensor:
        """The latent that a step began with: [B, *latent]."""
        return self.latents[:, self.places.index(step)]

    def after(self, step: int) -> Tensor:
        """What it led to."""
        return self.final if step == self.drawn.last else self.x(step + 1)

    def noise_of(self, step: int) -> Tensor | None:
        """The noise that it took, if any."""
        return self.noise[:, self.noisy.index(step)] if step in self.noisy else None

    def take(self, rows: Tensor) -> Walk:
        """The chains at `rows` (long [N])."""
        return self._each(lambda tensor: tensor[rows.to(tensor.device)])

    def idle(self) -> Walk:
        """One chain of zeros, for a process that has none to walk (its own may hold NaN)."""
        return self._each(lambda tensor: torch.zeros_like(tensor[:1]))

    def _each(self, change: Callable[[Tensor], Tensor]) -> Walk:
        return replace(
            self,
            latents=change(self.latents),
            noise=change(self.noise),
            final=change(self.final),
            renoised=change(self.renoised),
            copies=change(self.copies),
        )

    @classmethod
    def join(cls, parts: Sequence[Walk]) -> Walk:
        """Chains of the same batch, one after another."""
        return replace(
            parts[0],
            latents=torch.cat([part.latents for part in parts]),
            noise=torch.cat([part.noise for part in parts]),
            final=torch.cat([part.final for part in parts]),
            renoised=torch.cat([part.renoised for part in parts]),
            copies=torch.cat([part.copies for part in parts]),
        )


@torch.no_grad()
def active_rollout(
    chain: Chain,
    cond: Conditioning,
    streams: Sequence[Generator],
    copy_streams: Sequence[Generator],
    drawn: DrawnSteps,
    *,
    with_gaps: bool = False,
) -> Walk:
    """Sample B items together, and make the plan's LV copies.

    An item draws as in `sampling.rollout`: its first latent, then one noise per step that takes
    any, so its picture is that of any other rollout.

    Args:
        cond: of B items.
        streams: B streams, fresh.
        copy_streams: B more, of which each copy takes one draw.
        with_gaps: keep the noise of inactive steps between active ones too (one graph needs it).
    """
    shape, device, last = cond.latent_shape, chain.policy.device, drawn.last
    stochastic = chain.stochastic()
    places = tuple(sorted({p for a in drawn.active for p in (a, a + 1) if p <= last}))
    kept: dict[int, Tensor] = {}
    noises: dict[int, Tensor] = {}
    x = chain.policy.initial_noise(normal(streams, shape).to(device))
    for step in range(last + 1):
        if step in places:
            kept[step] = x
        prediction = chain.predict(x, step, cond)
        ends = step == last and chain.plan.reward_input == "estimate"
        noise = None
        if stochastic[step] and not ends:
            noise = normal(streams, shape).to(device)
            if step in drawn.active or (with_gaps and step > drawn.first):
                noises[step] = noise
        x = chain.output(prediction, x, step, noise, last)
    pairs = list(_copies(chain, cond, copy_streams, x))
    return Walk(
        drawn=drawn,
        places=places,
        latents=torch.stack([kept[step] for step in places], dim=1),
        noisy=tuple(noises),
        noise=_stacked(list(noises.values()), x),
        final=x,
        renoised=_stacked([renoised for renoised, _ in pairs], x),
        copies=_stacked([copy for _, copy in pairs], x),
    )


def _copies(
    chain: Chain, cond: Conditioning, streams: Sequence[Generator], x_0: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    step = len(chain.schedule) - 1
    alpha, sigma = chain.schedule.alpha_sigma(step)
    for _ in range(chain.plan.lv_copies):
        eps = normal(streams, x_0.shape[1:]).to(x_0)
        renoised = add_noise(x_0, eps, alpha, sigma)
        yield renoised, chain.copy(chain.predict(renoised, step, cond), renoised)


def _stacked(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    if not parts:
        return like.new_empty(len(like), 0, *like.shape[1:])
    return torch.stack(list(parts), dim=1)
