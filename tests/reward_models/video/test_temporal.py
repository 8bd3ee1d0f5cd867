"""Flicker, consistency, motion, and why a frozen picture does not win."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from reward_models.backbones import load_tower
from reward_models.base import RewardError, RewardInfo
from reward_models.catalogue import load
from reward_models.table import LoadOptions, Row
from reward_models.video.motion import displacement, grey_copy
from reward_models.video.temporal import (
    FLICKER,
    MOTION,
    TemporalReward,
    consistency_measure,
    load_consistency,
    load_flicker,
    load_motion,
    load_steady_motion,
    measure,
    steady_motion,
)

BUILDERS: dict[str, Callable[[Row, LoadOptions], TemporalReward]] = {
    "flicker": load_flicker,
    "consistency": load_consistency,
    "motion": load_motion,
    "steady-motion": load_steady_motion,
}
TARGET = 0.02


def build(name: str, dtype: str = "float32") -> TemporalReward:
    info = RewardInfo(name, "video", True, "", "", "")
    row = Row(info, "x:y", tower="tiny-clip", settings={"target": TARGET})
    return BUILDERS[name](row, LoadOptions(dtype=dtype))


def moving(
    share: float, frames: int = 3, *, size: int = 96, angle: float = 0.6, seed: int = 0
) -> Tensor:
    """As `_moving`, which is slow."""
    return _moving(share, frames, size, angle, seed).clone()


@cache
def _moving(share: float, frames: int, size: int, angle: float, seed: int) -> Tensor:
    """A textured plane (1/f spectrum) that moves by `share` of the diagonal a frame.

    float64 [F, 3, size, size] in [0, 1]; moved exactly, by its Fourier transform.
    """
    period = 2 * size
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(3, period, period, generator=generator, dtype=torch.float64)
    f = torch.fft.fftfreq(period, dtype=torch.float64)
    radius = (f[:, None] ** 2 + f[None] ** 2).sqrt() * period
    spectrum = torch.fft.fft2(noise) / radius.clamp(min=1)
    spectrum[:, 0, 0] = 0
    step = share * size * math.sqrt(2)
    planes = []
    for t in range(frames):
        x, y = step * t * math.cos(angle), step * t * math.sin(angle)
        turn = torch.exp(-2j * math.pi * (f[None, :] * x + f[:, None] * y))
        planes.append(torch.fft.ifft2(spectrum * turn).real)
    clip = torch.stack(planes)
    clip = (clip - clip[0].mean()) / clip[0].std() * 0.15 + 0.5
    return clip.clamp(0, 1)[..., :size, :size]


def motion_of(clip: Tensor) -> float:
    """Share of the diagonal per frame."""
    return measure([MOTION], [clip[None]])["motion"].item()


def random_clips(clips: int = 2, frames: int = 4, size: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(clips, frames, 3, size, size, generator=generator, dtype=torch.float64)


# --- flicker


def test_flicker_is_vbenchs_on_eight_bits() -> None:
    levels = (random_clips() * 255).round()
    expected = []
    for clip in levels:
        errors = [(a - b).abs().mean() for a, b in pairwise(clip)]
        expected.append((255 - float(sum(errors)) / len(errors)) / 255)
    found = build("flicker").score((levels / 255).float(), ["", ""])
    assert found.values.tolist() == pytest.approx(expected, abs=1e-6)


def test_flicker_of_extremes() -> None:
    black, white = torch.zeros(1, 1, 3, 8, 8), torch.ones(1, 1, 3, 8, 8)
    blinking = torch.cat([black, white, black], dim=1)
    scores = build("flicker").score(torch.cat([blinking, black.expand(1, 3, -1, -1, -1)]), ["", ""])
    assert scores.values.tolist() == [0.0, 1.0]


# --- consistency


def test_consistency_is_vbenchs_formula_on_the_towers_embeddings() -> None:
    reward = build("consistency")
    clips = random_clips(frames=5).float()
    tower = load_tower("tiny-clip")
    expected = []
    for clip in clips:
        e = torch.stack([tower.embed(frame[None])[0] for frame in clip])
        cosine = torch.nn.functional.cosine_similarity
        pairs = [
            (cosine(e[t], e[0], dim=0).relu() + cosine(e[t], e[t - 1], dim=0).relu()).item() / 2
            for t in range(1, len(e))
        ]
        expected.append(sum(pairs) / len(pairs))
    assert reward.score(clips, ["", ""]).values.tolist() == pytest.approx(expected, abs=1e-5)


def test_opposite_embeddings_count_as_zero_not_less() -> None:
    e = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    pairs = consistency_measure(load_tower("tiny-clip")).pairs
    found = pairs(e[None, :-1], e[None, 1:], e[None, :1])
    assert found[0].tolist() == pytest.approx([0.0, 0.0, (0.6 + 0.8) / 2])


# --- motion


@pytest.mark.parametrize(("share", "angle"), [(0.005, 0), (0.01, 0.6), (0.02, -2), (0.06, 2.5)])
def test_motion_is_the_known_speed_of_a_texture(share: float, angle: float) -> None:
    assert motion_of(moving(share, angle=angle)) == pytest.approx(share, rel=0.2)


def test_motion_grows_with_speed() -> None:
    shares = [0, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.04, 0.06, 0.08]
    found = [motion_of(moving(share)) for share in shares]
    assert found == sorted(found) and len(set(found)) == len(found)


def test_what_stands_still_does_not_move() -> None:
    assert motion_of(moving(0)) == pytest.approx(0, abs=1e-12)
    assert motion_of(torch.zeros(3, 3, 32, 32)) == 0


@pytest.mark.parametrize("seed", range(3))
def test_changing_light_is_no_motion(seed: int) -> None:
    still = moving(0, frames=4, seed=seed)
    true = motion_of(moving(0.01, seed=seed))
    gain = torch.tensor([1.0, 0.7, 1.2, 0.8], dtype=torch.float64).view(4, 1, 1, 1)
    offset = torch.tensor([0.0, 0.2, -0.2, 0.1], dtype=torch.float64).view(4, 1, 1, 1)
    assert motion_of((still * gain).clamp(0, 1)) < 0.01 * true
    assert motion_of((still + offset).clamp(0, 1)) < 0.01 * true


def test_noise_is_little_motion_and_hides_little() -> None:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(3, 3, 96, 96, generator=generator, dtype=torch.float64)
    true = motion_of(moving(0.01))
    assert motion_of((moving(0) + 0.1 * noise).clamp(0, 1)) < 0.05 * true
    assert motion_of((moving(0.01) + 0.05 * noise).clamp(0, 1)) > 0.7 * true
    # nothing but noise: some windows are explained by chance
    assert motion_of((0.5 + 0.3 * noise).clamp(0, 1)) < 0.01


def test_motion_does_not_depend_on_the_resolution() -> None:
    small, large = moving(0.02, size=96), moving(0.02, size=192)
    assert motion_of(small) == pytest.approx(motion_of(large), rel=0.1)
    wide = moving(0.02, size=192)[..., :96, :]
    # the same speed in pixels over a shorter diagonal
    expected = 0.02 * math.hypot(192, 192) / math.hypot(192, 96)
    assert motion_of(wide) == pytest.approx(expected, rel=0.2)


def test_motion_of_half_the_picture_is_half() -> None:
    clip = moving(0.02, size=128)
    clip[..., 64:] = clip[:1, ..., 64:]
    assert motion_of(clip) == pytest.approx(0.01, rel=0.25)


def test_motion_is_per_second_where_fps_is_known() -> None:
    reward = build("motion")
    clip = moving(0.02)[None].float()
    per_frame = reward.score(clip, [""])
    per_second = reward.score(clip, [""], fps=12.5)
    assert per_second.values.item() == pytest.approx(12.5 * per_frame.values.item())
    assert per_second.parts["per_frame"] == per_frame.parts["per_frame"] == per_frame.values


def test_pictures_of_any_size_have_a_motion() -> None:
    for height, width in ((1, 1), (2, 300), (300, 3), (7, 5), (65, 64)):
        clip = torch.rand(1, 2, 3, height, width)
        assert build("motion").score(clip, [""]).values.isfinite().all()


# --- steady motion


def test_steady_motion_is_its_formula() -> None:
    found = {
        "consistency": torch.tensor([0.9, 0.8]),
        "flicker": torch.tensor([0.95, 0.5]),
        "motion": torch.tensor([0.001, 0.1]),
    }
    scores = steady_motion(found, 8.0, target=0.02)
    assert scores.values.tolist() == pytest.approx([0.9 * 0.95 * 0.4, 0.8 * 0.5])
    assert scores.parts["motion"].tolist() == pytest.approx([0.008, 0.8])


@pytest.mark.parametrize(("seed", "share"), [(0, 0.005), (1, 0.01), (2, 0.02)])
def test_neither_stillness_nor_noise_beats_steady_motion(seed: int, share: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    still = moving(0, frames=6, seed=seed)
    noise = torch.rand(still.shape, generator=generator, dtype=torch.float64)
    light = torch.tensor([1, 0.7, 1, 0.7, 1, 0.7], dtype=torch.float64).view(6, 1, 1, 1)
    jitter = (still + 0.2 * (noise - 0.5)).clamp(0, 1)
    cuts = torch.stack([moving(0, frames=1, seed=10 * seed + k)[0] for k in range(6)])
    steady = moving(share, frames=6, seed=seed)
    clips = torch.stack([steady, still, noise, still * light, jitter, cuts]).float()
    scores = build("steady-motion").score(clips, [""] * 6, fps=8.0)
    good, *bad = scores.values.tolist()
    assert good > 0.6 and bad[0] == pytest.approx(0, abs=1e-6)
    assert good > max(bad) + 0.05
    # what the composite is for: each of the two alone prefers the frozen picture
    assert scores.parts["flicker"].argmax() == scores.parts["consistency"].argmax() == 1


def test_motion_beyond_the_target_earns_nothing() -> None:
    reward = build("steady-motion")
    clips = torch.stack([moving(0.01), moving(0.06)]).float()
    scores = reward.score(clips, ["", ""], fps=24.0)
    quality = scores.parts["consistency"] * scores.parts["flicker"]
    assert (scores.parts["motion"] > TARGET).all()
    assert torch.allclose(scores.values, quality)


def test_steady_motion_needs_a_speed() -> None:
    with pytest.raises(RewardError, match=r"reward steady-motion: needs the clip's frames per"):
        build("steady-motion").score(random_clips().float(), ["", ""])
    row = Row(RewardInfo("s", "video", True, "", "", ""), "", tower="tiny-clip")
    with pytest.raises(RewardError, match="setting target is 0"):
        load_steady_motion(
            Row(row.info, "", tower="tiny-clip", settings={"target": 0.0}), LoadOptions()
        )


def test_the_catalogues_rows_are_these_scores() -> None:
    clip = moving(0.005, frames=4)[None].float()
    for name in ("flicker", "motion", "tiny-consistency", "tiny-steady-motion"):
        found = load(name).score(clip, [""], fps=8.0)
        expected = build(name.removeprefix("tiny-")).score(clip, [""], fps=8.0)
        assert torch.equal(found.values, expected.values)
        info = load(name, needs_gradient=True).info
        assert info.modality == "video"
        if name in ("flicker", "tiny-consistency"):
            assert "frozen" in info.range  # the warning
    eager = load("tiny-steady-motion", settings={"target": 1.0}).score(clip, [""], fps=8.0)
    product = eager.parts["consistency"] * eager.parts["flicker"] * eager.parts["motion"]
    assert torch.allclose(eager.values, product)


# --- gradients


def slope(function: Callable[[Tensor], Tensor], x: Tensor, seed: int) -> tuple[float, float]:
    """(the gradient along a random direction, the same by central differences), float64."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(leaf).sum(), leaf)
    h = 1e-7
    difference = (function(x + h * direction) - function(x - h * direction)).sum() / (2 * h)
    return (gradient * direction).sum().item(), difference.item()


def smooth_clips() -> Tensor:
    """Well inside [0, 1], so that no step of a difference leaves it."""
    clips = torch.stack([moving(0.02, size=32), moving(0.01, size=32, seed=1)])
    return 0.1 + 0.8 * clips


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("seed", range(2))
def test_the_gradient_is_that_of_finite_differences(name: str, seed: int) -> None:
    reward = build(name, dtype="float64")

    def score(clips: Tensor) -> Tensor:
        # `score` answers in float32; this is what it answers before
        found = measure(reward.measures, clips.split(2, dim=1))
        return reward.combine(found, 2.0).values

    exact, numeric = slope(score, smooth_clips(), seed)
    assert exact != 0 and exact == pytest.approx(numeric, rel=1e-4)


@pytest.mark.parametrize("name", BUILDERS)
def test_the_gradient_reaches_every_frame(name: str) -> None:
    clips = smooth_clips().float().requires_grad_()
    build(name).score(clips, ["", ""], fps=2.0).values.sum().backward()
    assert clips.grad is not None
    assert clips.grad.isfinite().all() and (clips.grad.abs().amax(dim=(2, 3, 4)) > 0).all()


@pytest.mark.parametrize("name", BUILDERS)
def test_the_gradient_of_a_frozen_clip_is_finite(name: str) -> None:
    clips = moving(0, size=32)[None].float().requires_grad_()
    build(name).score(clips, [""], fps=8.0).values.sum().backward()
    assert clips.grad is not None and clips.grad.isfinite().all()


# --- the contract


@pytest.mark.parametrize("name", BUILDERS)
def test_a_score_depends_neither_on_batch_mates_nor_on_pieces(name: str) -> None:
    reward = build(name)
    clips = random_clips(8, 4).float()
    together = reward.score(clips, [""] * 8, fps=8.0)
    for k in range(8):
        alone = reward.score(clips[k : k + 1], [""], fps=8.0)
        assert alone.values.item() == pytest.approx(together.values[k].item(), abs=1e-5)
    for size in (1, 2, 3):
        pieces = reward.score_frames(clips[0].split(size), fps=8.0)
        assert pieces.values.item() == pytest.approx(together.values[0].item(), abs=1e-5)
        assert pieces.parts.keys() == together.parts.keys()


@pytest.mark.parametrize("name", BUILDERS)
def test_a_clip_with_a_nan_scores_nan_and_takes_no_part(name: str) -> None:
    reward = build(name)
    clips = smooth_clips().float()
    whole = reward.score(clips, ["", ""], fps=8.0).values
    broken = clips.clone()
    broken[0, 1, 0, 3, 3] = math.nan
    broken.requires_grad_()
    scores = reward.score(broken, ["", ""], fps=8.0)
    assert scores.values[0].isnan()
    assert scores.values[1].item() == pytest.approx(whole[1].item(), abs=1e-5)
    scores.values[1].backward()
    assert broken.grad is not None
    assert broken.grad.isfinite().all() and not broken.grad[0].any()


@pytest.mark.parametrize("name", BUILDERS)
def test_one_frame_has_no_temporal_score(name: str) -> None:
    message = rf"reward {name}: a clip of 1 frame has no temporal score"
    with pytest.raises(RewardError, match=message):
        build(name).score(torch.rand(2, 1, 3, 8, 8), ["", ""], fps=8.0)
    with pytest.raises(RewardError, match=message):
        build(name).score_frames([torch.rand(1, 3, 8, 8)], fps=8.0)
    with pytest.raises(RewardError, match="a clip of 0 frames has"):
        build(name).score_frames([], fps=8.0)


@pytest.mark.parametrize("fps", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_no_rate_is_refused(fps: float) -> None:
    with pytest.raises(RewardError, match=r"reward motion: .* frames per second"):
        build("motion").score(random_clips().float(), ["", ""], fps=fps)


def test_pieces_outside_the_range_are_refused() -> None:
    with pytest.raises(RewardError, match=r"reward flicker: pixels reach from .* to 255"):
        build("flicker").score_frames([torch.linspace(0, 255, 384).view(2, 3, 8, 8)])


def test_half_precision_is_measured_in_float32() -> None:
    clips = smooth_clips()
    for name in BUILDERS:
        half = build(name).score(clips.half(), ["", ""], fps=8.0).values
        assert half.dtype == torch.float32
        assert torch.allclose(
            half, build(name).score(clips.float(), ["", ""], fps=8.0).values, atol=0.02
        )


def test_the_grey_copy_is_luma_of_bounded_size() -> None:
    grey = grey_copy(torch.tensor([1.0, 0.5, 0.25]).view(1, 3, 1, 1).expand(2, 3, 48, 200))
    assert grey.shape == (2, 1, 15, 64)
    assert torch.allclose(grey, torch.tensor(0.299 + 0.587 / 2 + 0.114 / 4))
    assert displacement(grey, grey).tolist() == [0.0, 0.0]


def test_flicker_and_motion_are_measured_in_one_walk() -> None:
    found = measure([FLICKER, MOTION], iter(moving(0.02)[None].split(1, dim=1)))
    assert found["motion"].item() == pytest.approx(motion_of(moving(0.02)))
    assert 0.8 < found["flicker"].item() < 1
