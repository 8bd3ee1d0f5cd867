"""From dL/d(reward's input) to the parameters: by replay in constant memory, or as one graph.

Replay walks the active steps backwards and re-runs one at a time. It yields <x_next(theta, x), g>;
whoever asked back-propagates that, which puts the step's share into the parameters' gradients and
the next g into x.grad. Retained is one step's graph, however many steps there are. By linearity the
sum is the gradient of the whole chain; the other engine builds that chain and is the oracle.

*Source:* reverse-mode differentiation by recomputation (Chen et al. 2016, arXiv 1604.06174); that
the rollout's latents are kept, and what counts as a constant, are FlowBP's choices (`Chain`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_align.algorithms.active_rollout import Walk
from diffusion_align.algorithms.gradient_chain import Chain, Distance
from diffusion_align.policy import Conditioning

Yielded = tuple[Tensor, dict[str, Tensor]]

MISMATCH = "replay/mismatch_max"
"""Metric: largest difference of a re-run latent from the sampled one, relative to its step."""


@dataclass(frozen=True)
class Errand:
    """What one minibatch of B chains is walked back with.

    Args:
        gradient: [B, *latent], dL/d(walk.final), scaled.
        copy_gradients: [B, C, *latent], dL/d(walk.copies), scaled.
        distance: to the reference, None for none.
        shares: [B], what each item's distance counts in the update.
    """

    chain: Chain
    walk: Walk
    cond: Conditioning
    gradient: Tensor
    copy_gradients: Tensor
    distance: Distance | None
    shares: Tensor


def loss_count(walk: Walk, engine: str) -> int:
    """How many losses an engine yields: known beforehand, and equal on all processes."""
    copies = walk.copies.shape[1]
    return copies + (len(walk.drawn.active) if engine == "replay" else 1)


def replay(errand: Errand) -> Iterator[Yielded]:
    """One loss per LV copy, then one per active step, last to first."""
    yield from _copies(errand)
    chain, walk = errand.chain, errand.walk
    drawn, weights, g = walk.drawn, chain.weights(walk.drawn), errand.gradient
    for step in range(drawn.last, drawn.first - 1, -1):
        if step not in weights:
            g = chain.through(g, step, drawn.last)
            continue
        # Nobody asks what leads to the first active step.
        x = walk.x(step).detach().requires_grad_(step != drawn.first)
        out, added, metrics = _active(errand, x, step, weights)
        yield _product(out, g) + added, metrics
        if step != drawn.first:
            assert x.grad is not None  # the loss was back-propagated
            g = x.grad


def autograd(errand: Errand) -> Iterator[Yielded]:
    """One loss per LV copy, then one of the whole chain; memory grows with every active step."""
    yield from _copies(errand)
    chain, walk, cond = errand.chain, errand.walk, errand.cond
    drawn, weights = walk.drawn, chain.weights(walk.drawn)
    x, total = walk.x(drawn.first), errand.gradient.new_zeros(())
    metrics: list[Mapping[str, Tensor]] = []
    for step in range(drawn.first, drawn.last + 1):
        if step in weights:
            x, added, found = _active(errand, x, step, weights)
            total, metrics = total + added, [*metrics, found]
            continue
        with torch.no_grad():
            prediction = chain.predict(x.detach(), step, cond)
        x = chain.output(prediction, x, step, walk.noise_of(step), drawn.last)
    yield _product(x, errand.gradient) + total, _merged(metrics)


ENGINES = {"replay": replay, "autograd": autograd}


def _active(
    errand: Errand, x: Tensor, step: int, weights: Mapping[int, float]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(what the step leads to, the term of the reference, metrics)."""
    chain, walk = errand.chain, errand.walk
    prediction, weighted = chain.rerun(x, step, errand.cond, weights[step])
    out = chain.output(weighted, x, step, walk.noise_of(step), walk.drawn.last)
    metrics = {MISMATCH: _mismatch(out, walk.after(step), x)}
    having = errand.distance.steps(chain, walk.drawn.active) if errand.distance else ()
    if errand.distance is None or step not in having:
        return out, out.new_zeros(()), metrics
    distance = errand.distance.of(chain, prediction, x, step, errand.cond)
    counted = (distance * errand.shares.to(distance)).sum() / len(having)
    metrics[errand.distance.metric] = distance.detach().mean()
    return out, errand.distance.weight * counted, metrics


def _copies(errand: Errand) -> Iterator[Yielded]:
    chain, walk = errand.chain, errand.walk
    step = len(chain.schedule) - 1
    weight = chain.weights(walk.drawn).get(step, chain.share)
    for copy in range(walk.copies.shape[1]):
        x = walk.renoised[:, copy]
        _, weighted = chain.rerun(x, step, errand.cond, weight)
        out = chain.copy(weighted, x)
        metrics = {MISMATCH: _mismatch(out, walk.copies[:, copy], x)}
        yield _product(out, errand.copy_gradients[:, copy]), metrics


def _product(out: Tensor, gradient: Tensor) -> Tensor:
    # Its value means nothing; its derivative is the chain rule.
    return (out * gradient.to(out)).sum()


def _mismatch(out: Tensor, sampled: Tensor, x: Tensor) -> Tensor:
    """|out - sampled| / |sampled - x|, the largest of any item: 0-d.

    Late steps hardly move a latent: relative to the latent itself, no fault of theirs would show.
    """
    difference = (out.detach() - sampled).flatten(1).norm(dim=1)
    moved = (sampled - x.detach()).flatten(1).norm(dim=1).clamp(min=1e-12)
    return (difference / moved).max().float()


def _merged(metrics: list[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    names = dict.fromkeys(name for found in metrics for name in found)
    joined = {n: torch.stack([found[n] for found in metrics if n in found]) for n in names}
    return {n: v.max() if n.endswith("_max") else v.mean() for n, v in joined.items()}
