"""Videos among the files to score: each is read once, and every reward sees its frames."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models import clips
from reward_models.base import Reward, RewardError, RewardInfo, Scores
from reward_models.catalogue import load
from reward_models.clips import ClipView
from reward_models.inputs import Item, find_items
from reward_models.plugin import FunctionReward
from reward_models.scoring import score_files
from reward_models.video.files import read_frames
from reward_models.video.frames import FrameChoice
from reward_models.video.reward import FrameReward
from reward_models.video.temporal import TemporalReward

FRAMES = 12


def write_clip(path: Path, frames: int, *, height: int = 32, seed: int = 0) -> Path:
    """Noise that is different in every frame, MPEG-4 at 8 frames per second."""
    rng = np.random.default_rng(seed)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 48, height, "yuv420p"
        for _ in range(frames):
            pixels = rng.integers(0, 256, (height // 8, 6, 3), dtype=np.uint8)
            pixels = pixels.repeat(8, axis=0).repeat(8, axis=1)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two pictures, a clip of 12 frames, one of 3 of another size, a still one, a broken one."""
    folder = tmp_path_factory.mktemp("media")
    for index in range(2):
        Image.new("RGB", (16, 16), (60 * index, 90, 20)).save(folder / f"{index}.png")
    write_clip(folder / "long.mp4", FRAMES)
    write_clip(folder / "short.mp4", 3, height=40, seed=1)
    write_clip(folder / "single.mp4", 1)
    content = (folder / "long.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(content[: len(content) // 2])
    return folder


def brightness(name: str = "brightness") -> FunctionReward:
    return FunctionReward(lambda images, prompts: images.mean(dim=(1, 2, 3)), name=name)


def by_name(rows: Sequence[Any]) -> dict[str, Any]:
    return {Path(row.path).name: row for row in rows}


def test_images_and_videos_are_scored_in_one_run(media: Path) -> None:
    rewards: dict[str, Reward] = {"brightness": brightness(), "flicker": load("flicker")}
    rows = by_name(score_files(find_items([media]), rewards))
    assert list(rows) == ["0.png", "1.png", "cut.mp4", "long.mp4", "short.mp4", "single.mp4"]
    for name in ("0.png", "1.png"):
        assert rows[name].scores["brightness"] is not None
        assert rows[name].scores["flicker"] is None
        assert rows[name].error == "flicker: scores videos, and this is an image"
    assert "cut off" in rows["cut.mp4"].error and not rows["cut.mp4"].has_a_score
    assert rows["single.mp4"].scores["brightness"] is not None
    assert rows["single.mp4"].error == "flicker: a clip of 1 frame has no temporal score"
    for name, count in {"long.mp4": FRAMES, "short.mp4": 3}.items():
        frames = read_frames(media / name, range(count))
        chosen = FrameChoice.parse("uniform:8").indices(count)
        expected = frames[chosen].mean(dim=(1, 2, 3)).mean()
        assert rows[name].scores["brightness"] == pytest.approx(float(expected), abs=1e-6)
        flicker = 1 - (frames[1:] - frames[:-1]).abs().mean()
        assert rows[name].scores["flicker"] == pytest.approx(float(flicker), abs=1e-6)
        assert rows[name].error is None


@pytest.mark.parametrize("frames", ["all", "first", "uniform:3", "random:5"])
@pytest.mark.parametrize("pool", ["mean", "min", "softmin:0.05"])
@pytest.mark.parametrize("batch_size", [1, 16])
def test_a_file_scores_as_its_clip_does(
    media: Path, frames: str, pool: str, batch_size: int
) -> None:
    """`FrameReward` on the whole clip in memory is the oracle."""
    path = media / "long.mp4"
    whole = FrameReward(brightness(), frames, pool)
    key = [{"key": path.name}]
    clip = read_frames(path, range(FRAMES))[None]
    expected = whole.score(clip, [""], metadata=key).values
    rewards: dict[str, Reward] = {"r": brightness(), "same": whole, "flicker": load("flicker")}
    row = score_files([path], rewards, frames=frames, pool=pool, batch_size=batch_size)[0]
    assert row.scores["r"] == pytest.approx(float(expected), abs=1e-6)
    assert row.scores["same"] == pytest.approx(float(expected), abs=1e-6)


def test_a_clip_is_read_once_and_only_where_somebody_looks(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []

    def counted(path: Path, numbers: Sequence[int]) -> Tensor:
        seen.append(list(numbers))
        return read_frames(path, numbers)

    monkeypatch.setattr(clips, "read_frames", counted)
    items = [Item(media / "long.mp4", "a"), Item(media / "long.mp4", "b")]
    two: dict[str, Reward] = {"a": brightness("a"), "b": brightness("b")}
    score_files(items, two, frames="uniform:4")
    assert seen == [[1, 4, 7, 10]]
    score_files(items, {**two, "first": FrameReward(brightness(), "first")}, frames="uniform:4")
    assert seen[1:] == [[0, 1, 4, 7, 10]]
    score_files(items, {**two, "flicker": load("flicker")}, frames="uniform:4")
    assert seen[2:] == [list(range(FRAMES))]


def test_scorers_get_the_very_same_frames(media: Path) -> None:
    """What scorers on one tower recognise each other's pictures by."""
    seen: list[int] = []

    def watched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        seen.append(id(images))
        return images.mean(dim=(1, 2, 3))

    kept: list[Tensor] = []
    view = ClipView(batch_size=4)
    rewards = [FunctionReward(watched, name=name) for name in "ab"]
    clip = view.read(media / "long.mp4", rewards)
    kept += [piece for pieces in clip.pieces.values() for piece in pieces]
    for reward in rewards:
        view.score(reward, clip, ["", "another prompt"])
    assert seen == [id(piece) for piece in kept] * 4 and len(kept) == 2


def test_a_clip_too_large_to_hold_is_walked_through(
    media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewards: dict[str, Reward] = {"brightness": brightness(), "flicker": load("flicker")}
    held = score_files([media / "long.mp4"], rewards, frames="uniform:2")
    monkeypatch.setattr(clips, "LARGEST_WHOLE", 4 * 48 * 32 * 3 * 4)
    view = ClipView("uniform:2")
    assert [len(look) for look in view.read(media / "long.mp4", rewards.values()).pieces] == [2]
    walked = score_files([media / "long.mp4"], rewards, frames="uniform:2")
    assert walked[0].scores == pytest.approx(held[0].scores, abs=1e-6)


def test_a_video_reward_of_the_users_own_gets_the_whole_clip_and_its_rate(media: Path) -> None:
    class Mine:
        info = RewardInfo("mine", "video", False, "", "", "")

        def score(
            self,
            media: Tensor,
            prompts: Sequence[str],
            *,
            fps: float | None = None,
            metadata: Sequence[Mapping[str, Any]] | None = None,
        ) -> Scores:
            assert media.shape == (1, FRAMES, 3, 32, 48) and prompts == ["a prompt"]
            return Scores(torch.tensor([fps or 0.0]), {"length": torch.tensor([12.0])})

    rows = score_files([media / "long.mp4"], {"m": Mine()}, prompts="a prompt", parts=True)
    assert rows[0].scores == {"m": 8.0, "m/length": 12.0}


def test_a_temporal_reward_that_refuses_a_clip_says_so_in_its_row(media: Path) -> None:
    reward = load("motion")
    assert isinstance(reward, TemporalReward)
    rows = by_name(score_files(find_items([media / "*.mp4"]), {"motion": reward}))
    assert rows["single.mp4"].error == "motion: a clip of 1 frame has no temporal score"
    assert rows["long.mp4"].error is None


def test_a_run_over_videos_goes_on_to_the_same_file(media: Path, tmp_path: Path) -> None:
    rewards: dict[str, Reward] = {"brightness": brightness(), "flicker": load("flicker")}
    items, whole, part = find_items([media]), tmp_path / "w.jsonl", tmp_path / "p.jsonl"
    score_files(items, rewards, out=whole, batch_size=2)
    lines = whole.read_text().splitlines(keepends=True)
    for kept in range(len(lines)):
        part.write_text("".join(lines[:kept]))
        score_files(items, rewards, out=part, batch_size=2)
        assert part.read_bytes() == whole.read_bytes()


def test_an_image_that_no_video_reward_scores_is_not_read_again(
    media: Path, tmp_path: Path
) -> None:
    calls: list[int] = []

    def counted(images: Tensor, prompts: Sequence[str]) -> Tensor:
        calls.append(len(images))
        return images.mean(dim=(1, 2, 3))

    rewards: dict[str, Reward] = {"r": FunctionReward(counted), "flicker": load("flicker")}
    for _ in range(2):
        score_files([media / "0.png"], rewards, out=tmp_path / "s.jsonl")
    assert calls == [1]


@pytest.mark.parametrize("options", [{"frames": "uniform"}, {"pool": "max"}])
def test_a_wrong_choice_or_pooling_is_refused_before_anything_is_read(
    media: Path, tmp_path: Path, options: dict[str, str]
) -> None:
    with pytest.raises(RewardError, match="is no"):
        score_files([media / "0.png"], {"r": brightness()}, out=tmp_path / "o.jsonl", **options)  # type: ignore[arg-type]
    assert not (tmp_path / "o.jsonl").exists()


def test_a_long_prompt_counts_once_for_a_clip(media: Path) -> None:
    class Cutting(FunctionReward):
        def score(self, media: Tensor, prompts: Sequence[str], **unused: Any) -> Scores:
            cut = sum(len(prompt) > 5 for prompt in prompts)
            return Scores(media.mean(dim=(1, 2, 3)), truncated=cut)

    from reward_models.scoring import score_items

    reward = Cutting(lambda images, prompts: images, name="cutting")
    items = [Item(media / "long.mp4", text) for text in ("long prompt", "short", "longer too")]
    items.append(Item(media / "0.png", "long prompt"))
    for batch_size in (1, 3, 16):
        scored = score_items(items, {"r": reward}, batch_size=batch_size)
        assert scored.truncated == {"r": 3}
