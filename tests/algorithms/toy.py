"""A linear-Gaussian world in which everything about a policy gradient is known in closed form.

The denoiser is eps_hat = W x + b + m[prompt], the schedule is the real DDIM one, the picture is the
latent itself. Loaded by path from the conftests (tests are no packages).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.diffusion.schedules import Schedule, ddim_schedule
from reward_models.base import RewardInfo, Scores

SHAPE = (1, 2, 2)
CONFIG: Mapping[str, Any] = {
    "_class_name": "DDIMScheduler",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "num_train_timesteps": 1000,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}


class LinearDenoiser(nn.Module):
    """eps_hat = W x + b, on flattened latents."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = nn.Parameter(
            torch.eye(4) * 0.3 + 0.05 * torch.randn(4, 4, generator=generator)
        )
        self.bias = nn.Parameter(0.1 * torch.randn(4, generator=generator))
        self.dropout = dropout

    def forward(self, x: Tensor, extra: Tensor) -> Tensor:
        flat = x.flatten(1)
        if self.dropout and torch.is_grad_enabled():
            flat = nn.functional.dropout(flat, self.dropout)
        return (flat @ self.weight.T + self.bias + extra).view_as(x)


@dataclass(frozen=True)
class ToyConditioning:
    """One number per item, made of the prompt's length."""

    prompts: tuple[str, ...]
    latent_shape: tuple[int, ...] = SHAPE

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Any) -> ToyConditioning:
        order = torch.as_tensor(indices, dtype=torch.long).tolist()
        return ToyConditioning(tuple(self.prompts[i] for i in order))

    @property
    def extra(self) -> Tensor:
        return torch.tensor([[0.01 * len(prompt)] for prompt in self.prompts])


class ToyPolicy:
    """What DDPO and the loop need of a policy, without a network worth the name."""

    def __init__(self, dropout: float = 0.0) -> None:
        self.denoiser: nn.Module = LinearDenoiser(dropout)
        self.bare = self.denoiser
        self.start = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.device = torch.device("cpu")
        self.info = SimpleNamespace(
            name="toy", steps=4, guidance_scale=1.0, height=2, width=2, frames=None, fps=None
        )
        self.calls = 0

    def encode(self, prompts: Sequence[str], **options: Any) -> ToyConditioning:
        return ToyConditioning(tuple(prompts))

    def schedule(
        self, steps: int, *, height: int | None = None, width: int | None = None
    ) -> Schedule:
        return ddim_schedule(CONFIG, steps)

    def latent_shape(
        self, height: int | None = None, width: int | None = None, frames: int | None = None
    ) -> tuple[int, ...]:
        return SHAPE

    def initial_noise(self, noise: Tensor) -> Tensor:
        return noise

    def predict(
        self,
        x_t: Tensor,
        timestep: Tensor,
        cond: ToyConditioning,
        *,
        guidance_scale: float,
        guidance_gradient: str = "both",
    ) -> Tensor:
        self.calls += len(cond) * (2 if guidance_scale > 1 else 1)
        # "Guidance" shifts the prediction, so that unguided training is another policy.
        return self.denoiser(x_t, cond.extra.to(x_t) * guidance_scale)

    def decode(
        self, x_0: Tensor, *, chunk: int | None = None, frames: Sequence[int] | None = None
    ) -> Tensor:
        return torch.sigmoid(x_0).expand(-1, 3, -1, -1)

    def decode_gradient(
        self,
        x_0: Tensor,
        pixel_gradient: Tensor,
        *,
        chunk: int | None = None,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        pixels = torch.sigmoid(x_0)
        return pixel_gradient.sum(1, keepdim=True) * pixels * (1 - pixels)

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.bare.parameters())

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.denoiser = self.denoiser, self.start
        try:
            yield
        finally:
            self.denoiser = trained

    def save(self, folder: str | Path) -> None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        torch.save(self.bare.state_dict(), Path(folder) / "weights.pt")


@dataclass
class Brightness:
    """Mean pixel; `failing` says which calls return NaN for which items."""

    failing: tuple[int, ...] = ()
    info: RewardInfo = field(
        default_factory=lambda: RewardInfo("brightness", "image", True, "0 to 1", "-", "-")
    )

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        values = media.flatten(1).mean(1)
        for row in self.failing:
            values[row] = float("nan")
        return Scores(values, {"twice": values * 2})


@dataclass
class Constant:
    """The same reward for everything."""

    info: RewardInfo = field(
        default_factory=lambda: RewardInfo("constant", "image", True, "1", "-", "-")
    )

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        return Scores(torch.ones(len(media)))


def gradient(algorithm: Any, batch: Any, scale: float = 1.0) -> Tensor:
    """What all losses of a batch leave in the trainable parameters, flat."""
    parameters = algorithm.policy.trainable_parameters()
    for parameter in parameters:
        parameter.grad = None
    for minibatch in algorithm.minibatches(batch):
        for loss, _ in algorithm.losses(minibatch, scale):
            loss.backward()
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])
