"""Image rewards on clips: the chosen frames, and only those."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from reward_models.base import RewardError, RewardInfo, Scores
from reward_models.catalogue import load
from reward_models.table import LoadOptions, Row
from reward_models.video.files import probe_video, read_frames
from reward_models.video.reward import FrameReward, frames_for, score_video_file
from reward_models.video.temporal import load_flicker
from tests.reward_models.video.video_samples import write_numbered

INFO = RewardInfo("weighed", "image", True, "0 to 1", "Apache-2.0", "here", needs_prompt=True)


class Weighed:
    """mean(x^2) times the length of the prompt; `red` is a sub-score. Remembers its calls."""

    def __init__(self, info: RewardInfo = INFO) -> None:
        self.info = info
        self.calls: list[tuple[int, list[str], Any]] = []

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.calls.append((len(media), list(prompts), metadata))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        values = media.square().mean(dim=(1, 2, 3)) * lengths
        truncated = sum(len(prompt) > 3 for prompt in prompts)
        return Scores(values, {"red": media[:, 0].mean(dim=(1, 2))}, truncated)


def clips(count: int = 3, frames: int = 6) -> Tensor:
    return torch.rand(count, frames, 3, 5, 4, generator=torch.Generator().manual_seed(0))


PROMPTS = ["a", "bb", "ccc"]


def of_frames(frames: Tensor, prompt: str) -> list[float]:
    """What `Weighed` thinks of [n, 3, H, W], worked out frame by frame."""
    return [float((frame.double() ** 2).mean()) * len(prompt) for frame in frames]


@pytest.mark.parametrize(
    ("frames", "chosen"), [("all", range(6)), ("first", [0]), ("uniform:3", [1, 3, 5])]
)
def test_the_score_is_the_pooled_score_of_the_chosen_frames(
    frames: str, chosen: Sequence[int]
) -> None:
    media = clips()
    for kind in ("mean", "min", "softmin:0.2"):
        scores = FrameReward(Weighed(), frames, kind).score(media, PROMPTS)
        for row, prompt in enumerate(PROMPTS):
            values = of_frames(media[row, list(chosen)], prompt)
            mean, low = sum(values) / len(values), min(values)
            soft = -0.2 * math.log(sum(math.exp(-v / 0.2) for v in values) / len(values))
            expected = {"mean": mean, "min": low, "softmin:0.2": soft}[kind]
            assert scores.values[row].item() == pytest.approx(expected, abs=1e-6)
            assert scores.parts["frame_mean"][row].item() == pytest.approx(mean, abs=1e-6)
            assert scores.parts["frame_min"][row].item() == pytest.approx(low, abs=1e-6)
            if kind == "mean":
                red = media[row, list(chosen), 0].mean().item()
                assert scores.parts["red"][row].item() == pytest.approx(red, abs=1e-6)


def test_frames_are_scored_in_batches_of_bounded_size_with_their_prompts() -> None:
    inner = Weighed()
    small = FrameReward(inner, "uniform:3", batch_size=4)
    scores = small.score(clips(), PROMPTS)
    assert [count for count, _, _ in inner.calls] == [4, 4, 1]
    assert [p for _, prompts, _ in inner.calls for p in prompts] == [
        p for prompt in PROMPTS for p in [prompt] * 3
    ]
    large = FrameReward(Weighed(), "uniform:3", batch_size=100).score(clips(), PROMPTS)
    assert torch.allclose(scores.values, large.values)


def test_a_long_prompt_is_counted_once() -> None:
    scores = FrameReward(Weighed(), "all").score(clips(), ["a", "long prompt", "bb"])
    assert scores.truncated == 1


@pytest.mark.parametrize("frames", ["uniform:2", "random:2", "first"])
@pytest.mark.parametrize("pool", ["mean", "softmin:0.1"])
def test_only_the_chosen_frames_get_a_gradient(frames: str, pool: str) -> None:
    reward = FrameReward(Weighed(), frames, pool)
    media = clips().requires_grad_()
    reward.score(media, PROMPTS).values.sum().backward()
    assert media.grad is not None
    chosen = reward.indices(6)
    others = [number for number in range(6) if number not in chosen]
    assert (media.grad[:, chosen].abs().amax(dim=(2, 3, 4)) > 0).all()
    assert torch.equal(media.grad[:, others], torch.zeros_like(media.grad[:, others]))
    if pool == "mean":  # d mean(x^2) w / n = 2 x w / (n 3 H W)
        weights = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
        expected = 2 * media.detach()[:, chosen] * weights / (len(chosen) * 3 * 5 * 4)
        assert torch.allclose(media.grad[:, chosen], expected)


def test_a_broken_clip_is_nan_and_takes_no_part() -> None:
    media = clips()
    whole = FrameReward(Weighed(), "uniform:2").score(media, PROMPTS)
    media[1, 3, 0, 0, 0] = math.nan
    media.requires_grad_()
    inner = Weighed()
    scores = FrameReward(inner, "uniform:2").score(media, PROMPTS)
    assert scores.values.isnan().tolist() == [False, True, False]
    assert torch.allclose(scores.values[[0, 2]], whole.values[[0, 2]])
    assert "bb" not in inner.calls[0][1]
    scores.values[[0, 2]].sum().backward()
    assert media.grad is not None and media.grad.isfinite().all() and not media.grad[1].any()


def test_a_frame_that_the_reward_cannot_score_makes_its_clip_nan() -> None:
    class Picky(Weighed):
        def score(self, media: Tensor, prompts: Sequence[str], **about: Any) -> Scores:
            scores = super().score(media, prompts, **about)
            return Scores(scores.values.masked_fill(scores.values > 0.5, math.nan), scores.parts)

    media = clips() * 0.5
    media[1, 2] = 1.0
    values = FrameReward(Picky(), "all").score(media, ["a"] * 3).values
    assert values.isnan().tolist() == [False, True, False]


def test_a_key_names_the_clip_of_a_random_choice() -> None:
    media = clips(1, 40).expand(3, -1, -1, -1, -1)
    inner = Weighed()
    reward = FrameReward(inner, "random:2", seed=1)
    keyed = reward.score(media, ["a"] * 3, metadata=[{"key": "x"}, {"key": "y"}, {"key": "x"}])
    assert keyed.values[0] == keyed.values[2] != keyed.values[1]
    # the same whatever stands beside it in the batch
    alone = reward.score(media[:1], ["a"], metadata=[{"key": "y"}])
    assert alone.values[0] == keyed.values[1]
    assert inner.calls[0][2] == [{"key": name} for name in "xxyyxx"]
    plain = reward.score(media, ["a"] * 3).values
    assert plain[0] == plain[1] == plain[2]
    with pytest.raises(RewardError, match="metadata of 1 clips for 3"):
        reward.score(media, ["a"] * 3, metadata=[{}])


def test_the_info_says_what_it_is() -> None:
    info = FrameReward(Weighed(), "uniform:8", "softmin:0.1").info
    assert info.name == "weighed@uniform:8/softmin:0.1"
    assert (info.modality, info.differentiable, info.needs_prompt) == ("video", True, True)
    assert info.components == ("weighed",)
    composite = RewardInfo("0.5*a + b", "image", False, "", "", "", components=("a", "b"))
    assert FrameReward(Weighed(composite)).info.components == ("a", "b")
    assert not FrameReward(Weighed(composite)).info.differentiable


def test_what_is_no_image_reward_is_refused() -> None:
    clip_info = RewardInfo("moves", "video", True, "", "", "")
    group_info = RewardInfo("judge", "image", True, "", "", "", scope="group")
    with pytest.raises(RewardError, match="reward moves: scores clips already"):
        FrameReward(Weighed(clip_info))
    with pytest.raises(RewardError, match="reward judge: compares samples"):
        FrameReward(Weighed(group_info))
    for wrong in ({"frames": "last"}, {"pool": "max"}, {"batch_size": 0}):
        with pytest.raises(RewardError):
            FrameReward(Weighed(), **wrong)  # type: ignore[arg-type]


def test_a_real_reward_on_a_clip_is_its_mean_over_frames() -> None:
    reward = load("tiny-clip")
    media = torch.rand(2, 5, 3, 40, 40, generator=torch.Generator().manual_seed(1))
    prompts = ["a red circle", "a large blue square"]
    expected = [reward.score(clip, [p] * 5).values.mean() for clip, p in zip(media, prompts)]
    found = FrameReward(reward, "all").score(media, prompts)
    assert torch.allclose(found.values, torch.stack(expected), atol=1e-5)


def test_score_frames_is_score_of_what_was_chosen() -> None:
    media = clips(1)
    reward = FrameReward(Weighed(), "uniform:3", "min")
    expected = reward.score(media, ["bb"])
    found = reward.score_frames(media[0, reward.indices(6)].split(2), "bb")
    assert torch.allclose(found.values, expected.values)
    assert found.parts.keys() == expected.parts.keys()
    with pytest.raises(RewardError, match="no frame"):
        reward.score_frames([], "bb")


# --- files


def flicker() -> Any:
    return load_flicker(Row(RewardInfo("flicker", "video", True, "", "", ""), ""), LoadOptions())


def test_frames_for_says_what_a_reward_looks_at() -> None:
    assert frames_for(FrameReward(Weighed(), "uniform:4"), 8) == [1, 3, 5, 7]
    random = FrameReward(Weighed(), "random:3", seed=2)
    assert frames_for(random, 50, key="x") == random.choice.indices(50, seed=2, key="x")
    assert frames_for(flicker(), 4) == [0, 1, 2, 3]
    with pytest.raises(RewardError, match=r"reward weighed: scores images, not clips\n.*FrameRew"):
        frames_for(Weighed(), 4)


class Whole(Weighed):
    """A user's own reward of clips."""

    def __init__(self) -> None:
        super().__init__(RewardInfo("whole", "video", False, "", "", ""))

    def score(
        self,
        media: Tensor,
        prompts: Sequence[str],
        *,
        fps: float | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> Scores:
        self.calls.append((media.shape[1], list(prompts), fps))
        return Scores(media.mean(dim=(1, 2, 3, 4)))


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_numbered(tmp_path_factory.mktemp("video") / "a.mp4", 20, rate=10)


def test_a_file_is_scored_like_its_frames(video: Path) -> None:
    whole = read_frames(video, range(20))[None]
    chosen = FrameReward(Weighed(), "uniform:5", batch_size=2)
    found = score_video_file(video, chosen, "bb")
    assert torch.allclose(found.values, chosen.score(whole, ["bb"]).values)
    assert [count for count, _, _ in chosen.image_reward.calls[:3]] == [2, 2, 1]  # type: ignore[attr-defined]
    temporal = flicker()
    expected = temporal.score(whole, [""]).values
    assert torch.allclose(score_video_file(video, temporal).values, expected, atol=1e-6)
    users = Whole()
    assert torch.allclose(score_video_file(video, users, "p").values, whole.mean())
    assert users.calls == [(20, ["p"], probe_video(video).fps)]


def test_only_the_frames_that_a_reward_looks_at_are_decoded(
    video: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reward_models.video import reward as module

    asked: list[list[int]] = []

    def walk(path: Path, indices: Sequence[int]) -> Any:
        asked.append(list(indices))
        return original(path, indices)

    original = module.walk_frames
    monkeypatch.setattr(module, "walk_frames", walk)
    score_video_file(video, FrameReward(Weighed(), "uniform:2"), "p")
    assert asked == [[5, 15]]


def test_a_file_that_has_no_temporal_score_is_named(tmp_path: Path) -> None:
    path = write_numbered(tmp_path / "short.mp4", 1)
    with pytest.raises(RewardError, match=r"short.mp4: reward flicker: a clip of 1 frame has no"):
        score_video_file(path, flicker())
    with pytest.raises(RewardError, match=r"none.mp4: no such file"):
        score_video_file(tmp_path / "none.mp4", flicker())
