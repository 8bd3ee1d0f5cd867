"""The supervised step on UNets and a flow transformer: its loss, worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from diffusion_align import Policy
from diffusion_align.algorithms.supervised import Supervised, SupervisedOptions

# Said everywhere: FLUX's config knows no size, and at its family's 1024 x 1024 pixels the small
# one, whose latents are half as wide, would attend to 65,536 tokens.
SIZE = 32


def step(policy: Policy) -> tuple[Supervised, float]:
    """One supervised step; its loss."""
    supervised = Supervised(
        policy,
        SupervisedOptions("small-world:3", batch_size=2),
        schedule=policy.schedule(5, height=SIZE, width=SIZE),
        seed=1,
        height=SIZE,
        width=SIZE,
    )
    ((loss, _),) = supervised.losses(0, 1.0)
    loss.backward()
    return supervised, loss.item()


@pytest.mark.parametrize("name", ["eps", "v", "xl", "sd3", "flux"])
def test_the_loss_is_that_of_the_models_own_prediction(
    folders: dict[str, Path], transformers_of: dict[str, Path], name: str
) -> None:
    place = folders.get(name) or transformers_of[name]
    policy = Policy.load(place, lora_rank=2)
    asked: list[tuple[Tensor, Tensor, Tensor]] = []
    predict = policy.predict

    def watching(x_t: Tensor, timestep: Tensor, *others: Any, **named: Any) -> Tensor:
        asked.append((x_t, timestep, predict(x_t, timestep, *others, **named)))
        return asked[-1][2]

    policy.predict = watching  # type: ignore[method-assign]
    supervised, loss = step(policy)
    ((x_t, times, output),) = asked
    schedule = policy.schedule(5, height=SIZE, width=SIZE)
    errors = []
    for x, t, said in zip(x_t, times, output, strict=True):
        level = schedule.levels[schedule.timesteps.tolist().index(float(t))]
        flow = schedule.family == "flow"
        alpha, sigma = (1 - level, level) if flow else (level.sqrt(), (1 - level).sqrt())
        # Which of the three pictures it was is seen from what is left: standard normal noise.
        found = []
        for row in range(3):
            x_0 = policy.encode_pixels(supervised.pictures.pixels(row, SIZE, SIZE)[None])[0]
            eps = (x - alpha * x_0) / sigma
            wanted = eps - x_0 if flow else alpha * eps - sigma * x_0 if name == "v" else eps
            found.append(float((said.detach() - wanted).square().mean()))
        errors.append(found)
    possible = {(errors[0][a] + errors[1][b]) / 2 for a in range(3) for b in range(3) if a != b}
    assert any(loss == pytest.approx(value, rel=1e-3) for value in possible)
    reached = [p.grad.abs().sum() > 0 for p in policy.trainable_parameters() if p.grad is not None]
    assert len(reached) == len(policy.trainable_parameters()) and sum(reached) * 3 > len(reached)
