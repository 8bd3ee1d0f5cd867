"""The supervised step against its closed form, in a linear world."""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion_align.algorithms.plan import Plan
from diffusion_align.algorithms.supervised import Supervised, SupervisedOptions
from diffusion_align.data.captioned import Captioned
from diffusion_align.data.prompts import Prompt
from diffusion_align.errors import OptionError, UserError

STEPS = 10


@dataclass(frozen=True)
class Flat:
    """Picture i has other levels in every pixel than the others; its caption has i + 1 letters."""

    count: int

    @property
    def captions(self) -> tuple[str, ...]:
        return tuple("x" * (i + 1) for i in range(self.count))

    @property
    def fingerprint(self) -> str:
        return f"{self.count}"

    def __len__(self) -> int:
        return self.count

    def pixels(self, index: int, height: int, width: int) -> Tensor:
        return torch.arange(12.0).view(3, 2, 2).add(index) / (12 + self.count)


class Watched:
    """A toy policy that encodes pictures and remembers what its denoiser was asked."""

    def __new__(cls, toy: ModuleType) -> Any:
        policy = toy.ToyPolicy()
        asked: list[tuple[Tensor, Tensor, tuple[str, ...], Tensor]] = []
        encoded: list[int] = []
        predict = policy.predict

        def watching(x_t: Tensor, timestep: Tensor, cond: Any, *, guidance_scale: float) -> Tensor:
            assert guidance_scale == 1.0
            output = predict(x_t, timestep, cond, guidance_scale=guidance_scale)
            asked.append((x_t.detach(), timestep, cond.prompts, output.detach()))
            return output

        def encode_pixels(pixels: Tensor) -> Tensor:
            encoded.append(len(pixels))
            return pixels.mean(1, keepdim=True) * 2 - 1

        policy.predict, policy.encode_pixels = watching, encode_pixels
        policy.info.modality = "image"
        policy.asked, policy.encoded = asked, encoded
        return policy


def made(toy: ModuleType, *, count: int = 6, seed: int = 0, **options: Any) -> tuple[Any, Any]:
    policy = Watched(toy)
    chosen = SupervisedOptions(pictures="-", **options)
    schedule = policy.schedule(STEPS)
    pictures: Any = Flat(count)
    return policy, Supervised(policy, chosen, schedule=schedule, seed=seed, pictures=pictures)


def learn(policy: Any, supervised: Supervised, iteration: int, scale: float, group: Any = None):
    """(sum of losses, gradient of W, gradient of b, mean metric, number of losses)."""
    for parameter in policy.trainable_parameters():
        parameter.grad = None
    losses, told = [], []
    for loss, metrics in supervised.losses(iteration, scale, group):
        loss.backward()
        losses.append(loss.item())
        told.append(metrics["supervised/loss"].item())
    net = policy.denoiser
    return sum(losses), net.weight.grad, net.bias.grad, float(np.mean(told)), len(losses)


def alpha_bar(timestep: float) -> float:
    """Of Stable Diffusion's table, written out here once more."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return float(np.cumprod(1 - betas)[int(timestep)])


def closed_form(policy: Any) -> tuple[float, np.ndarray, np.ndarray]:
    """Error and its gradients in W and b, in float64, from what the denoiser was given."""
    net = policy.denoiser
    w, b = net.weight.detach().double().numpy(), net.bias.detach().double().numpy()
    errors, in_w, in_b = [], [], []
    for x_t, timesteps, captions, _ in policy.asked:
        for x, t, caption in zip(x_t, timesteps.tolist(), captions, strict=True):
            index = len(caption) - 1
            x_0 = Flat(6).pixels(index, 2, 2).double().mean(0).flatten().numpy() * 2 - 1
            a, s = alpha_bar(t) ** 0.5, (1 - alpha_bar(t)) ** 0.5
            flat = x.double().flatten().numpy()
            eps = (flat - a * x_0) / s
            residual = w @ flat + b + 0.01 * len(caption) - eps
            errors.append((residual**2).mean())
            in_w.append(2 * np.outer(residual, flat) / 4)
            in_b.append(2 * residual / 4)
    return float(np.mean(errors)), np.mean(in_w, axis=0), np.mean(in_b, axis=0)


def test_loss_and_gradient_are_those_of_the_denoising_regression(toy: ModuleType) -> None:
    policy, supervised = made(toy, batch_size=5, weight=0.3)
    loss, in_w, in_b, told, _ = learn(policy, supervised, 4, 0.5)
    error, want_w, want_b = closed_form(policy)
    assert loss == pytest.approx(0.5 * 0.3 * error, rel=1e-4)
    assert told == pytest.approx(error, rel=1e-4)
    np.testing.assert_allclose(in_w, 0.15 * want_w, rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(in_b, 0.15 * want_b, rtol=1e-3, atol=1e-5)


def test_the_noise_is_standard_normal_and_timesteps_are_all_those_of_the_sampler(
    toy: ModuleType,
) -> None:
    policy, supervised = made(toy, batch_size=6)
    for iteration in range(100):
        list(supervised.losses(iteration, 1.0))
    noise, times = [], []
    for x_t, timesteps, captions, _ in policy.asked:
        for x, t, caption in zip(x_t, timesteps.tolist(), captions, strict=True):
            x_0 = Flat(6).pixels(len(caption) - 1, 2, 2).mean(0) * 2 - 1
            a = alpha_bar(t)
            noise.append(((x[0] - a**0.5 * x_0) / (1 - a) ** 0.5).flatten())
            times.append(t)
    drawn = torch.cat(noise).double()
    # 2400 numbers: five standard errors
    assert abs(drawn.mean()) < 5 / 2400**0.5
    assert abs(drawn.var() - 1) < 5 * (2 / 2400) ** 0.5
    visited = policy.schedule(STEPS).timesteps.tolist()
    counts = np.array([times.count(t) for t in visited])
    assert counts.sum() == len(times) == 600
    assert ((counts - 60) ** 2 / 60).sum() < 27.9  # chi-square of 9 degrees at 0.001
    assert len({tuple(row.tolist()) for row in noise}) == 600


@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_forwards_of_fewer_pictures_change_nothing(toy: ModuleType, chunk: int) -> None:
    whole = learn(*made(toy, batch_size=5), 3, 1.0)
    policy, supervised = made(toy, batch_size=5, pictures_per_loss=chunk)
    parts = learn(policy, supervised, 3, 1.0)
    assert parts[4] == supervised.loss_count() == -(-5 // chunk)
    assert max(len(x_t) for x_t, *_ in policy.asked) == chunk
    for one, other in zip(parts[:4], whole[:4], strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(("size", "batch"), [(2, 4), (3, 5), (3, 2), (4, 6)])
def test_ranks_together_learn_what_one_process_learns(
    toy: ModuleType, size: int, batch: int
) -> None:
    alone = learn(*made(toy, batch_size=batch), 2, 1.0)
    ranks = []
    for rank in range(size):
        group = SimpleNamespace(rank=rank, size=size, lockstep=False)
        policy, supervised = made(toy, batch_size=batch, pictures_per_loss=1)
        ranks.append(learn(policy, supervised, 2, 1.0, group))
        assert ranks[-1][4] == supervised.loss_count(group)
    assert len({rank[4] for rank in ranks}) == 1
    for place in range(4):  # DDP averages gradients, the loop averages metrics
        mean = np.mean([np.asarray(rank[place]) for rank in ranks], axis=0)
        np.testing.assert_allclose(mean, np.asarray(alone[place]), rtol=1e-4, atol=1e-6)


def test_every_picture_comes_once_before_any_comes_twice(toy: ModuleType) -> None:
    policy, supervised = made(toy, batch_size=4, every=3)
    seen: list[str] = []
    for iteration in range(18):
        if supervised.due(iteration):
            list(supervised.losses(iteration, 1.0))
    for _, _, captions, _ in policy.asked:
        seen += captions
    assert len(seen) == 24
    for start in range(0, 24, 6):
        assert len(set(seen[start : start + 6])) == 6
    assert seen[:6] != seen[6:12]  # the deck is shuffled for each pass


def test_the_first_of_so_many_iterations_is_due(toy: ModuleType) -> None:
    _, supervised = made(toy, every=4)
    assert [i for i in range(10) if supervised.due(i)] == [0, 4, 8]


def test_an_iteration_is_the_same_in_a_run_that_began_there(toy: ModuleType) -> None:
    _, first = made(toy, batch_size=3)
    for iteration in range(7):
        list(first.losses(iteration, 1.0))
    policy, again = made(toy, batch_size=3)
    again.load_state_dict(first.state_dict())
    late = [(loss.item(), m["supervised/loss"].item()) for loss, m in again.losses(7, 1.0)]
    assert late == [(loss.item(), m["supervised/loss"].item()) for loss, m in first.losses(7, 1.0)]
    # In a batch a latent's last bits would hang on its neighbours, which differ after a restart.
    assert set(policy.encoded) == {1}
    _, other = made(toy, batch_size=3, seed=1)
    assert late[0] != next((loss.item(), 0.0) for loss, _ in other.losses(7, 1.0))


def test_a_picture_is_encoded_once(toy: ModuleType) -> None:
    policy, supervised = made(toy, batch_size=6)
    for iteration in range(5):
        list(supervised.losses(iteration, 1.0))
    assert len(policy.encoded) == 6


def test_its_noise_is_that_of_no_sample_of_the_plan(toy: ModuleType) -> None:
    policy, supervised = made(toy, batch_size=2)
    list(supervised.losses(3, 1.0))
    plan = Plan([Prompt("a"), Prompt("b")], 2, 2, seed=0)
    planned = {
        float(stream.standard_normal(dtype=np.float32))
        for stream in plan.noise_streams(plan.items(3), 3)
    }
    for x_t, timesteps, captions, _ in policy.asked:
        for x, t, caption in zip(x_t, timesteps.tolist(), captions, strict=True):
            x_0 = float((Flat(6).pixels(len(caption) - 1, 2, 2).mean(0) * 2 - 1)[0, 0])
            first = (float(x[0, 0, 0]) - alpha_bar(t) ** 0.5 * x_0) / (1 - alpha_bar(t)) ** 0.5
            assert min(abs(first - noise) for noise in planned) > 1e-4


def test_other_pictures_are_refused_on_resume(toy: ModuleType) -> None:
    _, supervised = made(toy)
    _, other = made(toy, count=7)
    with pytest.raises(UserError, match="not the pictures or captions that the run began with"):
        other.load_state_dict(supervised.state_dict())


@pytest.mark.parametrize(
    ("guidance", "given", "told"),
    [("embedded", 3.5, 3.5), ("embedded", None, 2.5), ("cat", 3.5, 1.0), ("two", None, 1.0)],
)
def test_a_network_that_is_told_its_guidance_is_fitted_at_the_one_it_samples_with(
    toy: ModuleType, guidance: str, given: float | None, told: float
) -> None:
    policy = toy.ToyPolicy()
    policy.family = SimpleNamespace(guidance=guidance)
    policy.info.modality, policy.info.guidance_scale = "image", 2.5
    asked: list[float] = []
    predict = policy.predict

    def watching(x_t: Tensor, timestep: Tensor, cond: Any, *, guidance_scale: float) -> Tensor:
        asked.append(guidance_scale)
        return predict(x_t, timestep, cond, guidance_scale=1.0)

    policy.predict = watching
    policy.encode_pixels = lambda pixels: pixels.mean(1, keepdim=True)
    pictures: Any = Flat(4)
    supervised = Supervised(
        policy,
        SupervisedOptions(pictures="-", batch_size=2),
        schedule=policy.schedule(STEPS),
        guidance_scale=given,
        pictures=pictures,
    )
    list(supervised.losses(0, 1.0))
    assert asked == [told]


def test_its_cost_and_its_line(toy: ModuleType) -> None:
    policy, supervised = made(toy, batch_size=4, every=5, weight=0.5)
    list(supervised.losses(0, 1.0))
    assert supervised.calls == 3 * policy.calls  # a backward counts as two forwards
    assert supervised.describe() == [
        "supervised step: one iteration in 5, 4 of 6 pictures, weight 0.5"
    ]


@pytest.mark.parametrize(
    ("option", "value"),
    [("every", 0), ("weight", 0.0), ("weight", float("nan")), ("batch_size", 0), ("pictures", " ")],
)
def test_options_out_of_range_are_refused(option: str, value: Any) -> None:
    given = {"pictures": "small-world", option: value}
    with pytest.raises(OptionError, match=option):
        SupervisedOptions(**given)


def test_pictures_of_the_small_world_are_read_by_name(toy: ModuleType) -> None:
    policy = Watched(toy)
    policy.info.height = policy.info.width = 16
    options = SupervisedOptions(pictures="small-world:5", batch_size=2)
    supervised = Supervised(policy, options, schedule=policy.schedule(STEPS))
    assert isinstance(supervised.pictures, Captioned)
    assert len(supervised.pictures) == 5
