"""Which guidance branches a gradient flows through."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion_align import Policy
from diffusion_align.policy.conditioning import Conditioning

SCALE = 4.0
NAMES = ["eps", "xl", "sd3", "wan", "cogvideox"]


def prepared(place: Path) -> tuple[Policy, Conditioning, Tensor]:
    policy = Policy.load(place, lora_rank=2, dtype="float64")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.trainable_parameters():
            parameter.normal_(std=0.2, generator=generator)
    frames = 9 if policy.info.modality == "video" else None
    cond = policy.encode(
        ["a", "two words"], guidance_scale=SCALE, height=32, width=32, frames=frames
    )
    x = torch.randn(2, *cond.latent_shape, generator=generator, dtype=torch.float64)
    return policy, cond, x.requires_grad_()


@pytest.mark.parametrize("name", NAMES)
def test_conditional_is_the_same_value_with_scale_times_the_positive_branchs_gradient(
    folders: dict[str, Path], transformers_of: dict[str, Path], name: str
) -> None:
    policy, cond, x = prepared({**folders, **transformers_of}[name])
    inputs = [x, *policy.trainable_parameters()]
    moment = torch.tensor(500.0)
    both = policy.predict(x, moment, cond, SCALE)
    conditional = policy.predict(x, moment, cond, SCALE, guidance_gradient="conditional")
    positive = policy.predict(x, moment, cond, 1.0)  # the conditional branch alone
    torch.testing.assert_close(conditional, both, atol=1e-5, rtol=1e-5)
    weights = torch.linspace(-1, 1, both.numel(), dtype=both.dtype).view_as(both)
    found = torch.autograd.grad((conditional * weights).sum(), inputs)
    expected = torch.autograd.grad((positive * weights).sum(), inputs)
    (whole,) = torch.autograd.grad((both * weights).sum(), x)
    for mine, its in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, SCALE * its, atol=1e-6, rtol=1e-5)
    assert not torch.allclose(found[0], whole, rtol=1e-2)


@pytest.mark.parametrize(("name", "scale"), [("eps", 1.0), ("flux", SCALE)])
def test_without_a_negative_branch_there_is_nothing_to_choose(
    folders: dict[str, Path], transformers_of: dict[str, Path], name: str, scale: float
) -> None:
    policy, cond, x = prepared({**folders, **transformers_of}[name])
    both, conditional = (
        torch.autograd.grad(
            policy.predict(x, torch.tensor(500.0), cond, scale, guidance_gradient=kind).sum(), x
        )[0]
        for kind in ("both", "conditional")
    )
    assert torch.equal(both, conditional)
