"""dL/dlatents from dL/dpixels: equal to autograd, in memory that does not grow with the clip.

The oracle is autograd through the VAE's own `decode`, in float64.
"""

from __future__ import annotations

import re
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion_align import Policy, UserError
from diffusion_align.policy import causal
from reward_models.video.frames import FrameChoice

CLIPS = ["wan", "cogvideox", "easyanimate"]


@pytest.fixture(scope="module")
def wide(folders: dict[str, Path], transformers_of: dict[str, Path]) -> dict[str, Policy]:
    """Policies in float64."""
    places = {**folders, **transformers_of}
    names = ("eps", "xl", "sd3", "flux", *CLIPS)
    return {name: Policy.load(places[name], dtype="float64") for name in names}


def random_latents(policy: Policy, items: int, frames: int = 5, side: int = 2) -> Tensor:
    """float64 latents small enough that some pixels are inside [0, 1] and some are clamped."""
    generator = torch.Generator().manual_seed(1)
    channels = policy.pipeline.vae.config.get("z_dim") or policy.pipeline.vae.config.latent_channels
    shapes = {
        "wan2.1": (items, channels, frames, side, side),
        "cogvideox": (items, frames, channels, side, side),
        "easyanimate5.1": (items, channels, frames, side, side),
    }
    shape = shapes.get(policy.family.name, (items, channels, 8, 8))
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def vaes_own(policy: Policy, x: Tensor) -> Tensor:
    """Pixels as the pipelines write the formula, by the VAE's own `decode`."""
    vae = policy.pipeline.vae
    if policy.family.name == "wan2.1":
        mean, std = (
            torch.tensor(values, dtype=x.dtype).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = vae.decode(x * std + mean).sample.transpose(1, 2)
    elif policy.family.name == "cogvideox":
        z = x.transpose(1, 2) / vae.config.scaling_factor
        pixels = vae.decode(z).sample.transpose(1, 2)
    elif policy.family.name == "easyanimate5.1":
        pixels = vae.decode(x / vae.config.scaling_factor).sample.transpose(1, 2)
    else:
        shift = vae.config.shift_factor or 0.0
        pixels = vae.decode(x / vae.config.scaling_factor + shift).sample
    return (pixels * 0.5 + 0.5).clamp(0, 1)


def own_gradient(pixels: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """A loss that couples all pixels: dL/dpixels, and dL/dx by autograd."""
    leaf = pixels.detach().requires_grad_()
    weights = torch.linspace(-1, 1, leaf.numel(), dtype=leaf.dtype).view_as(leaf)
    (wanted,) = torch.autograd.grad((leaf * weights).sum().sin() + leaf.square().sum(), leaf)
    return wanted, torch.autograd.grad(pixels, x, wanted)[0]


def relative(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("chunk", [None, 2])
@pytest.mark.parametrize("name", ["eps", "xl", "sd3", "flux", *CLIPS])
def test_it_equals_autograd_through_the_vaes_own_decoder(
    wide: dict[str, Policy], name: str, chunk: int | None
) -> None:
    policy = wide[name]
    x = random_latents(policy, 3).requires_grad_()
    pixels = vaes_own(policy, x)
    with torch.no_grad():
        assert relative(policy.decode(x), pixels) < 1e-12
    wanted, expected = own_gradient(pixels, x)
    assert float(expected.norm()) > 0
    with torch.no_grad():  # it needs no gradient mode of its own
        found = policy.decode_gradient(x, wanted, chunk=chunk)
    assert found.dtype == torch.float64 and not found.requires_grad
    assert relative(found, expected) < 1e-8


@pytest.mark.parametrize("count", [1, 3, 7, 8])
@pytest.mark.parametrize("name", CLIPS)
def test_of_clips_of_any_length(wide: dict[str, Policy], name: str, count: int) -> None:
    policy = wide[name]
    if name == "cogvideox" and count == 8:
        count = 9  # 8 latent frames are no clip that it makes
    x = random_latents(policy, 1, frames=count).requires_grad_()
    pixels = vaes_own(policy, x)
    assert pixels.shape[1] == 1 + 4 * (count - 1)
    wanted, expected = own_gradient(pixels, x)
    with torch.no_grad():
        assert relative(policy.decode(x), pixels) < 1e-12
    assert relative(policy.decode_gradient(x, wanted), expected) < 1e-8
    again = policy.decode(x, checkpoint=True)
    assert relative(torch.autograd.grad(again, x, wanted)[0], expected) < 1e-8


@pytest.mark.parametrize("frames", [[0], [4], [0, 2], [1, 3, 4]])
@pytest.mark.parametrize("name", CLIPS)
def test_of_chosen_latent_frames(wide: dict[str, Policy], name: str, frames: list[int]) -> None:
    policy = wide[name]
    x = random_latents(policy, 2).requires_grad_()
    chosen = [t for i in frames for t in ([0] if i == 0 else range(4 * i - 3, 4 * i + 1))]
    pixels = vaes_own(policy, x)[:, chosen]
    with torch.no_grad():
        assert relative(policy.decode(x, frames=frames), pixels) < 1e-12
    wanted, expected = own_gradient(pixels, x)
    assert relative(policy.decode_gradient(x, wanted, frames=frames), expected) < 1e-8


@pytest.mark.parametrize("word", ["first", "uniform:2", "uniform:9"])
@pytest.mark.parametrize("name", CLIPS)
def test_every_word_for_latent_frames_is_a_choice_of_every_family(
    wide: dict[str, Policy], name: str, word: str
) -> None:
    policy = wide[name]
    x = random_latents(policy, 1)
    frames = FrameChoice.parse(word).indices(policy.latent_frames(x.shape[1:]))
    with torch.no_grad():
        shown = policy.decode(x, frames=frames)
    assert shown.shape[1] == sum(1 if i == 0 else 4 for i in frames)
    found = policy.decode_gradient(x, torch.ones_like(shown), frames=frames)
    reached = found.movedim(policy.family.frames.axis, 1).flatten(2).any(dim=2)[0]  # type: ignore
    # Nothing behind the chunk of the last wanted frame has a say in it. CogVideoX's group norms
    # average over a chunk, and its first one has three latent frames.
    spans = causal.CAUSAL[policy.family.decode].spans(5)
    end = next(stop for start, stop in spans if start <= frames[-1] < stop)
    assert reached.tolist() == [i < end for i in range(5)]


@pytest.mark.parametrize("frames", [[], [5], [-1], [2, 1], [1, 1]])
@pytest.mark.parametrize("name", CLIPS)
def test_frames_that_cannot_be_chosen_are_refused(
    wide: dict[str, Policy], name: str, frames: list[int]
) -> None:
    x = random_latents(wide[name], 1)
    said = re.escape(f"latent frames {frames} are not ascending within 0 ... 4")
    with pytest.raises(ValueError, match=said):
        wide[name].decode(x, frames=frames)
    with pytest.raises(ValueError, match=said):
        wide[name].decode_gradient(x, torch.zeros(1, 17, 3, 16, 16), frames=frames)


@pytest.mark.parametrize("name", ["eps", "xl", "sd3", "flux"])
def test_pictures_have_no_frames_to_choose(wide: dict[str, Policy], name: str) -> None:
    x = random_latents(wide[name], 1)
    said = f"{wide[name].family.name} makes images: there are no frames to choose"
    with pytest.raises(ValueError, match=said):
        wide[name].decode(x, frames=[0])
    with pytest.raises(ValueError, match=said):
        wide[name].decode_gradient(x, torch.zeros(1, 3, 16, 16), frames=[0])


def test_cogvideox_has_no_clips_of_an_even_number_of_latent_frames(
    wide: dict[str, Policy],
) -> None:
    with pytest.raises(ValueError, match="odd"):
        wide["cogvideox"].decode(random_latents(wide["cogvideox"], 1, frames=4))


def test_a_clip_is_not_decoded_behind_the_last_chosen_frame(
    wide: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = wide["wan"]
    calls: list[int] = []
    rule = causal.CAUSAL["wan"]

    def counted(vae: Any, z: Tensor, before: Any) -> Any:
        calls.append(z.shape[2])
        return rule.step(vae, z, before)

    monkeypatch.setitem(causal.CAUSAL, "wan", replace(rule, step=counted))
    policy.decode(random_latents(policy, 1), frames=[0, 1])
    assert calls == [1, 1]


def test_tiles_of_clips_are_refused(transformers_of: dict[str, Path]) -> None:
    policy = Policy.load(transformers_of["wan"])
    policy.pipeline.vae.enable_tiling()
    x = random_latents(policy, 1).float()
    with pytest.raises(UserError, match="vae_tiling"):
        policy.decode(x)
    with pytest.raises(UserError, match="vae_tiling"):
        policy.decode_gradient(x, torch.zeros(1, 17, 3, 16, 16))


def test_slices_are_one_clip_at_a_time(
    transformers_of: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = Policy.load(transformers_of["wan"])
    x = random_latents(policy, 2, frames=2).float()
    together = policy.decode(x)
    items: list[int] = []
    rule = causal.CAUSAL["wan"]

    def counted(vae: Any, z: Tensor, before: Any) -> Any:
        items.append(len(z))
        return rule.step(vae, z, before)

    monkeypatch.setitem(causal.CAUSAL, "wan", replace(rule, step=counted))
    policy.pipeline.vae.enable_slicing()
    torch.testing.assert_close(policy.decode(x), together, atol=1e-5, rtol=0)
    assert set(items) == {1}


@pytest.mark.parametrize("name", CLIPS)
def test_clips_are_encoded_by_the_posteriors_mean(wide: dict[str, Policy], name: str) -> None:
    policy = wide[name]
    vae = policy.pipeline.vae
    generator = torch.Generator().manual_seed(0)
    clips = torch.rand(2, 9, 3, 16, 16, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        x = policy.encode_pixels(clips)
        z = vae.encode(clips.transpose(1, 2) * 2 - 1).latent_dist.mean
        expected = (vae.decode(z).sample.transpose(1, 2) * 0.5 + 0.5).clamp(0, 1)
        assert policy.latent_frames(x.shape[1:]) == 3
        torch.testing.assert_close(policy.decode(x), expected, atol=1e-6, rtol=0)


# --- memory ------------------------------------------------------------------------------------


class Meter:
    """Bytes that autograd holds for backward passes: now, and at most."""

    def __init__(self) -> None:
        self.now = 0
        self.most = 0

    @contextmanager
    def on(self) -> Iterator[Meter]:
        with torch.autograd.graph.saved_tensors_hooks(lambda t: _Held(t, self), lambda h: h.tensor):
            yield self


class _Held:
    def __init__(self, tensor: Tensor, meter: Meter) -> None:
        self.tensor = tensor
        self.size = tensor.numel() * tensor.element_size()
        self.meter = meter
        meter.now += self.size
        meter.most = max(meter.most, meter.now)

    def __del__(self) -> None:
        self.meter.now -= self.size


def held_by_replay(policy: Policy, items: int, frames: int) -> int:
    x = random_latents(policy, items, frames=frames)
    with torch.no_grad():
        gradient = torch.ones_like(policy.decode(x))
    with Meter().on() as meter:
        policy.decode_gradient(x, gradient)
    assert meter.now == 0
    return meter.most


def held_by_autograd(policy: Policy, items: int, frames: int, *, checkpoint: bool = False) -> int:
    x = random_latents(policy, items, frames=frames).requires_grad_()
    with Meter().on() as meter:
        pixels = policy.decode(x, checkpoint=checkpoint)
        held = meter.now
    del pixels
    return held


@pytest.mark.parametrize("name", CLIPS)
def test_what_it_holds_does_not_grow_with_the_clip_or_the_batch(
    wide: dict[str, Policy], name: str
) -> None:
    policy = wide[name]
    short, long = held_by_replay(policy, 1, 3), held_by_replay(policy, 1, 9)
    assert long <= 1.001 * held_by_replay(policy, 1, 5) and short > 0
    assert held_by_replay(policy, 3, 5) <= 1.001 * long
    assert held_by_autograd(policy, 1, 9) > 2.5 * held_by_autograd(policy, 1, 3)
    assert long < 0.5 * held_by_autograd(policy, 1, 9)


def test_of_images_it_holds_one_item(wide: dict[str, Policy]) -> None:
    policy = wide["eps"]
    assert held_by_replay(policy, 4, 0) == held_by_replay(policy, 1, 0)
    assert held_by_autograd(policy, 4, 0) > 3 * held_by_autograd(policy, 1, 0)


@pytest.mark.parametrize("name", CLIPS)
def test_checkpointing_holds_no_activations(wide: dict[str, Policy], name: str) -> None:
    policy = wide[name]
    plain = held_by_autograd(policy, 1, 5)
    assert held_by_autograd(policy, 1, 5, checkpoint=True) < 0.1 * plain


def test_the_boundaries_kept_grow_with_the_logarithm_of_the_clip(
    wide: dict[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = wide["wan"]
    rule = causal.CAUSAL["wan"]
    alive: weakref.WeakSet[Any] = weakref.WeakSet()
    most = [0]

    def watched(vae: Any, z: Tensor, before: Any) -> Any:
        pixels, after = rule.step(vae, z, before)
        alive.add(after.tensors[0])
        most[0] = max(most[0], len(alive))
        return pixels, after

    monkeypatch.setitem(causal.CAUSAL, "wan", replace(rule, step=watched))
    x = random_latents(policy, 1, frames=32, side=1)
    policy.decode_gradient(x, torch.ones(1, 125, 3, 8, 8, dtype=torch.float64))
    assert 5 <= most[0] <= 8
