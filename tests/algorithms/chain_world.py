"""A small guided model and, written apart from ours, the gradient of its sampling loop.

The denoiser is a two-layer network with a negative branch. `plain_gradient` is textbook code: the
DDIM and flow formulas from their papers, one graph from the first step to the reward, autograd. It
shares with the code under test nothing but the noise and the table of noise levels.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_align.diffusion.schedules import Schedule, ddim_schedule, flow_schedule
from reward_models.base import RewardInfo, Scores

SHAPE = (2, 3, 3)
DDIM = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
}
FLOW = {"num_train_timesteps": 1000, "shift": 3.0}


class Network(nn.Module):
    """f(x, t, c): [B, 2, 3, 3]."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(5)

        def drawn(*shape: int) -> nn.Parameter:
            drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * 0.15
            return nn.Parameter(drawn.to(dtype))

        self.first, self.second, self.bias = drawn(20, 18), drawn(18, 20), drawn(20)

    def forward(self, x: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        moment = (timestep.to(x) / 1000).reshape(-1, 1)
        inner = torch.tanh(x.flatten(1) @ self.first.T + self.bias + moment + text.to(x))
        return (inner @ self.second.T).view_as(x)


@dataclass(frozen=True)
class Texts:
    """What the network is told: a number per item."""

    prompts: tuple[str, ...]
    latent_shape: tuple[int, ...] = SHAPE

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Any) -> Texts:
        return Texts(tuple(self.prompts[i] for i in torch.as_tensor(indices).tolist()))

    def told(self, branch: int) -> Tensor:
        """[B, 1]; branch 0 is the negative one."""
        return torch.tensor([[0.2 * len(prompt) if branch else -0.3] for prompt in self.prompts])


class GuidedPolicy:
    """What `Draft` needs of a policy. `embedded`: its network is told the guidance scale."""

    def __init__(
        self, family: str = "ddim", dtype: torch.dtype = torch.float64, *, embedded: bool = False
    ) -> None:
        self.family_name, self.dtype = family, dtype
        self.family = SimpleNamespace(guidance="embedded" if embedded else "two")
        self.denoiser: nn.Module = Network(dtype)
        self.start = Network(dtype).requires_grad_(False)
        with torch.no_grad():
            self.start.bias.add_(0.2)
        self.device = torch.device("cpu")
        self.info = SimpleNamespace(
            name="guided", steps=6, guidance_scale=3.0, height=6, width=6, frames=None
        )
        generator = torch.Generator().manual_seed(1)
        self.colours = torch.randn(3, 2, generator=generator, dtype=torch.float64).to(dtype)
        self.passes = 0

    def encode(self, prompts: Sequence[str], **options: Any) -> Texts:
        return Texts(tuple(prompts))

    def schedule(
        self, steps: int, *, height: int | None = None, width: int | None = None
    ) -> Schedule:
        return (ddim_schedule if self.family_name == "ddim" else flow_schedule)(
            DDIM if self.family_name == "ddim" else FLOW, steps
        )

    def initial_noise(self, noise: Tensor) -> Tensor:
        return noise.to(self.dtype)

    def predict(
        self,
        x_t: Tensor,
        timestep: Tensor,
        cond: Texts,
        *,
        guidance_scale: float,
        guidance_gradient: str = "both",
    ) -> Tensor:
        self.passes += 1
        moments = timestep.expand(len(cond))
        if self.family.guidance == "embedded":
            return self.denoiser(x_t, moments, cond.told(1) + 0.1 * guidance_scale)
        positive = self.denoiser(x_t, moments, cond.told(1))
        if guidance_scale <= 1:
            return positive
        with torch.set_grad_enabled(torch.is_grad_enabled() and guidance_gradient == "both"):
            negative = self.denoiser(x_t, moments, cond.told(0))
        return negative + guidance_scale * (positive - negative)

    def decode(
        self, x_0: Tensor, *, chunk: int | None = None, frames: Sequence[int] | None = None
    ) -> Tensor:
        return torch.sigmoid(torch.einsum("kc,bchw->bkhw", self.colours, x_0))

    def decode_gradient(
        self,
        x_0: Tensor,
        pixel_gradient: Tensor,
        *,
        chunk: int | None = None,
        frames: Sequence[int] | None = None,
    ) -> Tensor:
        pixels = self.decode(x_0)
        return torch.einsum("kc,bkhw->bchw", self.colours, pixel_gradient * pixels * (1 - pixels))

    def trainable_parameters(self) -> list[nn.Parameter]:
        return list(self.denoiser.parameters())

    def save(self, folder: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        torch.save(self.denoiser.state_dict(), folder / "weights.pt")

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.denoiser = self.denoiser, self.start
        try:
            yield
        finally:
            self.denoiser = trained


class Threads:
    """Ranks as threads of one process; `gather` meets at a barrier."""

    lockstep = False

    def __init__(self, rank: int, table: dict[int, Tensor], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, barrier.parties
        self._table, self._barrier = table, barrier

    def gather(self, values: Tensor) -> Tensor:
        self._table[self.rank] = values
        self._barrier.wait(30)
        joined = torch.cat([self._table[rank] for rank in range(self.size)])
        self._barrier.wait(30)
        return joined


def on_ranks(work: Callable[[Threads], Any], size: int = 2) -> list[Any]:
    """What `work(group)` returns on each rank, or the exception it raised there."""
    table: dict[int, Tensor] = {}
    barrier, found = threading.Barrier(size), dict[int, Any]()

    def run(rank: int) -> None:
        try:
            found[rank] = work(Threads(rank, table, barrier))
        except Exception as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return [found[rank] for rank in range(size)]


def score_of(pixels: Tensor) -> Tensor:
    """A smooth reward: [B] in about 0 to 1."""
    weights = torch.linspace(0.2, 1.0, pixels[0].numel(), dtype=pixels.dtype)
    return (pixels.flatten(1) * weights).mean(1) + (pixels.flatten(1).square() * 0.3).mean(1)


class Smooth:
    """`score_of` as a reward; it remembers the pixels it saw."""

    def __init__(self, scope: str = "item", failing: Callable[[Tensor], Tensor] | None = None):
        self.info = RewardInfo("smooth", "image", True, "about 0 to 1", "-", "-", scope=scope)  # type: ignore[arg-type]
        self.seen: list[Tensor] = []
        self.asked: list[tuple[str, ...]] = []
        self._failing = failing

    def score(
        self, media: Tensor, prompts: Sequence[str], *, fps: Any = None, metadata: Any = None
    ) -> Scores:
        self.seen.append(media.detach().clone())
        self.asked.append(tuple(prompts))
        if self._failing is not None:
            # As where one picture breaks a scorer: NaN in its value, and in its derivative.
            broken = torch.where(self._failing(media.detach()), torch.nan, 1.0)
            media = media * broken.view(-1, 1, 1, 1)
        values = score_of(media)
        if self.info.scope == "group":
            values = values - 0.5 * values.mean()
        return Scores(values)


def ddim_step(
    x: Tensor, said: Tensor, now: Tensor, after: Tensor, eta: float, kind: str
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0 estimate, mean, std): equations 12 and 16 of arXiv 2010.02502; v of arXiv 2202.00512."""
    signal, noise = now.sqrt(), (1 - now).sqrt()
    if kind == "v":
        x_0, eps = signal * x - noise * said, signal * said + noise * x
    else:
        x_0, eps = (x - noise * said) / signal, said
    std = eta * ((1 - after) / (1 - now)).sqrt() * (1 - now / after).clamp(min=0).sqrt()
    return x_0, after.sqrt() * x_0 + (1 - after - std**2).clamp(min=0).sqrt() * eps, std


def flow_step(
    x: Tensor, v: Tensor, now: Tensor, after: Tensor, kind: str, level: float, top: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0 estimate, mean, std): Euler, or equation 9 of Flow-GRPO (arXiv 2505.05470)."""
    x_0, dt = x - now * v, after - now
    if kind == "ode":
        return x_0, x + v * dt, torch.zeros_like(now)
    noise = level * (now / (1 - (top if now > 0.9999 else now))).sqrt()
    mean = x + (v + noise**2 / (2 * now) * (x + (1 - now) * v)) * dt
    return x_0, mean, noise * (-dt).sqrt()


@dataclass
class Oracle:
    """The sampling loop as one graph.

    network: (x, timestep [B], branch) -> prediction, branch 0 the negative one; decode: latents to
    pixels; noises: x_T first, then one per step that takes any; copies: noise of the LV copies.
    """

    network: Callable[[Tensor, Tensor, int], Tensor]
    decode: Callable[[Tensor], Tensor]
    score: Callable[[Tensor], Tensor]
    schedule: Schedule
    guidance: float
    noises: list[Tensor]
    copies: list[Tensor]
    eta: float = 0.0
    flow_kind: str = "ode"
    level: float = 0.7

    def guided(self, x: Tensor, step: int, plan: Any) -> Tensor:
        moments = self.schedule.timesteps[step].expand(len(x))
        positive = self.network(x, moments, 1)
        if self.guidance <= 1:
            return positive
        negative = self.network(x, moments, 0)
        if plan.guidance_gradient == "conditional":
            negative = negative.detach()
            if plan.norm_compensation:
                detached = positive.detach()
                positive = detached + (positive - detached) / self.guidance
        return negative + self.guidance * (positive - negative)

    def step(self, x: Tensor, said: Tensor, step: int) -> tuple[Tensor, Tensor, Tensor]:
        schedule = self.schedule
        landings = schedule.levels[1:] if schedule.landings is None else schedule.landings
        now, after = schedule.levels[step].double(), landings[step].double()
        if schedule.family == "ddim":
            return ddim_step(x, said, now, after, self.eta, schedule.prediction)
        top = schedule.levels[1].double()
        return flow_step(x, said, now, after, self.flow_kind, self.level, top)

    def loss(self, plan: Any, active: Sequence[int], last: int, of: Callable[[Tensor], Tensor]):
        """Mean over items (and over the copies beside them) of `of(scores)`."""
        noises = iter(self.noises)
        x = next(noises)
        weights = plan.step_weights or (1.0,) * len(active)
        for step in range(last + 1):
            alpha = plan.coupling
            said = self.guided(alpha * x + (1 - alpha) * x.detach(), step, plan)
            if step in active:
                w = weights[list(active).index(step)]
                said = w * said + (1 - w) * said.detach()
            else:
                said = said.detach()
            x_0, mean, std = self.step(x, said, step)
            if step == last and plan.reward_input == "estimate":
                x = x_0
            else:
                x = mean + std.to(mean) * next(noises) if std > 0 else mean
        weight = weights[-1] if active[-1] == len(self.schedule) - 1 else 1.0
        seen = [x, *(self.renoised(x.detach(), noise, plan, weight) for noise in self.copies)]
        return torch.stack([of(self.score(self.decode(latent))) for latent in seen]).mean()

    def renoised(self, x_0: Tensor, noise: Tensor, plan: Any, weight: float) -> Tensor:
        """The closed formulas of DRaFT-LV."""
        last = len(self.schedule) - 1
        level = self.schedule.levels[last].double()

        def said(x: Tensor) -> Tensor:
            prediction = self.guided(x, last, plan)
            return weight * prediction + (1 - weight) * prediction.detach()

        # The levels at which noise is added are rounded to float32, those of the step are not.
        if self.schedule.family == "flow":
            x = (1 - level).float() * x_0 + level.float() * noise
            return x - level * said(x)
        x = level.sqrt().float() * x_0 + (1 - level).sqrt().float() * noise
        if self.schedule.prediction == "v":
            return level.sqrt() * x - (1 - level).sqrt() * said(x)
        return (x - (1 - level).sqrt() * said(x)) / level.sqrt()
