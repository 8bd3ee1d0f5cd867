"""A policy small enough to see through, rewards with known answers, and a finished comparison."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion_align.data.images import write_png
from diffusion_align.data.prompts import Prompt
from diffusion_align.diffusion.schedules import Schedule, ddim_schedule
from diffusion_align.evaluation.comparison import (
    Comparison,
    Result,
    Setup,
    arranged,
    find_alarms,
    find_notes,
    picture_name,
)
from diffusion_align.policy.catalogue import ModelInfo
from diffusion_align.policy.families import FAMILIES
from reward_models.base import RewardInfo, Scores

SIZE = 16
LATENT = (4, 2, 2)


@dataclass(frozen=True)
class FakeConditioning:
    prompts: tuple[str, ...]
    negative_prompts: tuple[str, ...]
    latent_shape: tuple[int, ...] = LATENT

    def __len__(self) -> int:
        return len(self.prompts)

    def take(self, indices: Any) -> FakeConditioning:
        order = [int(i) for i in indices]
        return replace(
            self,
            prompts=tuple(self.prompts[i] for i in order),
            negative_prompts=tuple(self.negative_prompts[i] for i in order),
        )


class FakePolicy:
    """Predicts a share of x plus `shift`, which is what was learnt: the reference has none."""

    def __init__(self, shift: float = 0.0) -> None:
        self.denoiser: nn.Module = nn.Sequential(nn.Identity(), nn.Dropout(0.9))
        self.denoiser.train()
        self.shift = shift
        self.device = torch.device("cpu")
        self.family = FAMILIES[0]
        self.info = ModelInfo("fake", "stable-diffusion", "", 3, 2.0, SIZE, SIZE, "", "")
        self.references: list[str] = []
        self.start_noise: list[Tensor] = []
        self._is_reference = False

    def encode(
        self,
        prompts: Sequence[str],
        *,
        negative_prompts: Sequence[str] | None = None,
        guidance_scale: float,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
    ) -> FakeConditioning:
        return FakeConditioning(tuple(prompts), tuple(negative_prompts or [""] * len(prompts)))

    def schedule(
        self, steps: int, *, height: int | None = None, width: int | None = None
    ) -> Schedule:
        config = {
            "num_train_timesteps": 1000,
            "beta_start": 0.00085,
            "beta_end": 0.012,
            "beta_schedule": "scaled_linear",
            "prediction_type": "epsilon",
            "timestep_spacing": "leading",
            "steps_offset": 1,
            "set_alpha_to_one": False,
            "clip_sample": False,
        }
        return ddim_schedule(config, steps)

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, ...]:
        return LATENT

    def initial_noise(self, noise: Tensor) -> Tensor:
        self.start_noise.append(noise)
        return noise

    def predict(
        self, x_t: Tensor, timestep: Tensor, cond: FakeConditioning, *, guidance_scale: float
    ) -> Tensor:
        words = torch.tensor([len(text) / 50 for text in cond.prompts]).view(-1, 1, 1, 1)
        learnt = 0.0 if self._is_reference else self.shift
        return self.denoiser(0.5 * x_t + words) - learnt

    def decode(self, x_0: Tensor, *, chunk: int | None = None) -> Tensor:
        pixels = torch.sigmoid(x_0[:, :3])
        return pixels.repeat_interleave(SIZE // 2, 2).repeat_interleave(SIZE // 2, 3)

    @contextmanager
    def reference(self, kind: str = "start") -> Iterator[None]:
        self.references.append(kind)
        self._is_reference = True
        try:
            yield
        finally:
            self._is_reference = False


class Brightness:
    """Mean of all pixels; parts: itself again, and the red channel."""

    def __init__(self, sign: float = 1.0, scope: Any = "item") -> None:
        self.sign = sign
        self.calls: list[tuple[int, list[str], Any]] = []
        self.info = RewardInfo("brightness", "image", True, "0 to 1", "", "", scope=scope)

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.calls.append((len(media), list(prompts), metadata))
        values = self.sign * media.mean(dim=(1, 2, 3))
        red = self.sign * media[:, 0].mean(dim=(1, 2))
        return Scores(values, {"whole": values.clone(), "red": red})


@pytest.fixture
def fake_policy() -> type[FakePolicy]:
    return FakePolicy


@pytest.fixture
def brightness() -> type[Brightness]:
    return Brightness


@pytest.fixture
def make_comparison(tmp_path: Path) -> Callable[..., Comparison]:
    """Builds a comparison from tables of scores, with random pictures on disk."""

    def make(
        scores: Mapping[str, tuple[np.ndarray, np.ndarray]],
        *,
        prompts: Sequence[str | Prompt] = (),
        trained_on: Sequence[str] = (),
        parts: Sequence[str] = (),
        diversity: tuple[np.ndarray, np.ndarray] | None = None,
        side: int = 8,
    ) -> Comparison:
        count, seeds = next(iter(scores.values()))[0].shape
        items = [Prompt(p) if isinstance(p, str) else p for p in prompts]
        items += [Prompt(f"prompt number {p}") for p in range(len(items), count)]
        rng = np.random.default_rng(0)
        for which in ("base", "tuned"):
            for p in range(count):
                for s in range(seeds):
                    pixels = rng.integers(0, 255, (3, side, side), dtype=np.uint8)
                    write_png(tmp_path / picture_name(which, p, s), pixels)
        results = arranged(scores, {name: "" for name in scores if name not in parts}, trained_on)
        if diversity is not None:
            results.append(Result("diversity", "diversity", "pixel space", *diversity))
        return Comparison(
            setup=Setup("fake", "runs/x", "DDIM (eta 0)", 3, 2.0, side, side, seeds, 0),
            prompts=tuple(items),
            results=tuple(results),
            trained_on=tuple(trained_on),
            alarms=find_alarms(results),
            notes=find_notes(
                results, trained_on=trained_on, prompts=items, training_prompts=[], seeds=seeds
            ),
            folder=tmp_path,
        )

    return make
