"""How much scoring holds at once: bytes are counted, of batches, of pictures and of their readers.

The oracle for scores is batch size 1; for a continued run, the file of one that was never stopped.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from reward_models import scoring
from reward_models.base import Reward
from reward_models.inputs import Item
from reward_models.media import DECODED_BYTES, read_image, read_picture
from reward_models.pixels import FLOAT_BYTES, Picture, stack
from reward_models.plugin import FunctionReward
from reward_models.read_ahead import Reserve, read_ahead
from reward_models.scoring import score_files

SIZES = ((60, 40), (20, 30), (60, 40), (100, 80), (40, 60), (60, 40), (20, 30))
ROOM = 3 * 60 * 40 * FLOAT_BYTES
"""Three pictures of the commonest size as float32, and less than one of the largest."""


@pytest.fixture
def pictures(tmp_path: Path, photo) -> list[Path]:  # type: ignore[no-untyped-def]
    """Twenty of four sizes and three kinds of pixels, one of them damaged."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index in range(20):
        pixels = photo(*SIZES[index % len(SIZES)], seed=index)
        path = folder / f"{index:02d}.png"
        if index % 5 == 3:
            Image.fromarray(pixels[..., 0].astype(np.uint16) * 250 + index).save(path)
        elif index % 5 == 4:
            Image.fromarray(np.dstack([pixels, 255 - pixels[..., :1]]), "RGBA").save(path)
        else:
            Image.fromarray(pixels).save(path)
    (folder / "07.png").write_bytes((folder / "07.png").read_bytes()[:200])
    return sorted(folder.iterdir())


@pytest.fixture
def small_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "LARGEST_GROUP", ROOM)
    monkeypatch.setattr(scoring, "read_ahead", partial(read_ahead, room=ROOM))


def sharp(images: Tensor, prompts: Sequence[str]) -> Tensor:
    lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
    return images.std(dim=(1, 2, 3)) + lengths / 100


class Alive:
    """Bytes of pictures that were read and not let go, and that their readers reserved."""

    def __init__(self) -> None:
        self.held = self.most = self.largest = 0
        self._lock = threading.RLock()

    def read(self, path: Path, reserve: Reserve) -> Picture:
        picture = read_picture(path, reserve)
        size = picture.levels.numel() * picture.levels.element_size()
        with self._lock:
            self.held += size
            self.most = max(self.most, self.held)
            self.largest = max(self.largest, size)
        weakref.finalize(picture, self._let_go, size)
        return picture

    def _let_go(self, size: int) -> None:
        with self._lock:
            self.held -= size


@pytest.mark.usefixtures("small_room")
def test_pictures_that_wait_and_are_scored_stay_within_the_room(
    pictures: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    alive, batches = Alive(), list[int]()

    def watched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        batches.append(images.numel() * images.element_size())
        time.sleep(0.03)  # readers get on meanwhile, as far as they may
        return sharp(images, prompts)

    monkeypatch.setattr(scoring, "read_picture", alive.read)
    score_files(pictures, {"r": FunctionReward(watched)}, batch_size=64)
    assert alive.held == 0
    one_of_the_largest = 100 * 80 * FLOAT_BYTES
    assert max(batches) == one_of_the_largest
    # Two of the commonest size, never more than the room: what differs in size counts as well.
    assert sorted(set(batches))[-2] == 2 * 60 * 40 * FLOAT_BYTES < ROOM
    # Those that wait to be scored hold at most a third of their bytes as float32, those that are
    # read ahead at most half of what they reserved; and there may be one more of each.
    assert alive.largest < alive.most <= ROOM // 3 + ROOM // 2 + 2 * alive.largest


@pytest.mark.usefixtures("small_room")
def test_a_picture_of_many_prompts_is_not_copied_for_all_of_them_at_once(
    pictures: list[Path],
) -> None:
    batches: list[int] = []

    def watched(images: Tensor, prompts: Sequence[str]) -> Tensor:
        batches.append(len(images))
        return sharp(images, prompts)

    items = [Item(pictures[0], "x" * count) for count in range(7)]
    rows = score_files(items, {"r": FunctionReward(watched)}, batch_size=16)
    assert batches == [3, 3, 1]
    alone = [sharp(read_image(pictures[0])[None], ["x" * count]).item() for count in range(7)]
    assert [row.scores["r"] for row in rows] == pytest.approx(alone, abs=1e-6)


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("batch_size", [3, 16, 64])
def test_scores_in_cut_groups_are_those_of_each_picture_alone(
    pictures: list[Path], batch_size: int
) -> None:
    table: dict[str, Reward] = {"r": FunctionReward(sharp)}
    alone = score_files(pictures, table, prompts="a cat", batch_size=1)
    together = score_files(pictures, table, prompts="a cat", batch_size=batch_size)
    for one, other in zip(alone, together, strict=True):
        assert (one.path, one.error) == (other.path, other.error)
        if not one.error:
            assert other.scores["r"] == pytest.approx(one.scores["r"], abs=1e-6)
    assert sum(bool(row.error) for row in alone) == 1


@pytest.mark.usefixtures("small_room")
@pytest.mark.parametrize("kept", [0, 1, 6, 8, 15, 16, 19])
def test_a_run_that_was_killed_anywhere_goes_on_to_the_same_bytes(
    pictures: list[Path], tmp_path: Path, kept: int
) -> None:
    """The reward feels its batch: had the groups been cut elsewhere, scores would differ."""

    def crowded(images: Tensor, prompts: Sequence[str]) -> Tensor:
        return images.mean(dim=(1, 2, 3)) + len(images) + images.mean()

    table: dict[str, Reward] = {"r": FunctionReward(crowded)}
    whole, part = tmp_path / "whole.jsonl", tmp_path / "part.jsonl"
    score_files(pictures, table, out=whole, batch_size=16)
    lines = whole.read_bytes().splitlines(keepends=True)
    part.write_bytes(b"".join(lines[:kept]))
    score_files(pictures, table, out=part, batch_size=16)
    assert part.read_bytes() == whole.read_bytes()


def test_progress_is_told_before_a_file_is_tried_again(
    pictures: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finished result only damaged files are read again, after the first report."""
    for path in pictures[::2]:
        path.write_bytes(b"")
    out, events = tmp_path / "out.jsonl", list[str]()
    table: dict[str, Reward] = {"r": FunctionReward(sharp)}
    score_files(pictures, table, out=out, batch_size=2)
    before = out.read_bytes()

    def read(path: Path, reserve: Reserve) -> Picture:
        events.append(path.name)
        return read_picture(path, reserve)

    def progress(done: int, total: int) -> None:
        assert total == len(pictures)
        events.append(f"{done} done")

    monkeypatch.setattr(scoring, "read_picture", read)
    score_files(pictures, table, out=out, batch_size=2, progress=progress)
    assert events[0] == "0 done" and events[-1] == "20 done"
    assert [event for event in events if "done" in event] == [f"{n} done" for n in range(0, 21, 2)]
    tried = sorted(event for event in events if "done" not in event)
    assert tried == sorted({path.name for path in pictures[::2]} | {"07.png"})
    # They are tried as the work goes on: not all before anything is reported to be done.
    assert events.index("2 done") < events.index("18.png")
    assert out.read_bytes() == before


def test_a_reader_reserves_before_it_decodes(
    tmp_path: Path, photo, monkeypatch: pytest.MonkeyPatch
) -> None:  # type: ignore[no-untyped-def]
    Image.fromarray(photo(30, 20)).save(tmp_path / "a.png")
    events: list[object] = []
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda image: events.append("decoded"))
    monkeypatch.setattr("reward_models.media._levels", lambda image, where: torch.zeros(1, 1, 1))
    read_picture(tmp_path / "a.png", events.append)
    assert events[:2] == [30 * 20 * DECODED_BYTES, "decoded"]


@pytest.mark.parametrize("channels", [3, 4])
def test_levels_become_the_picture_that_is_defined(channels: int) -> None:
    """Colour / 255 over white, in numpy; exact, for scores must not move by how pixels wait."""
    rng = np.random.default_rng(channels)
    levels = rng.integers(0, 256, (7, 5, channels), dtype=np.uint8)
    expected = levels[..., :3].astype(np.float32) / np.float32(255)
    if channels == 4:
        alpha = levels[..., 3:].astype(np.float32) / np.float32(255)
        expected = expected * alpha + (1 - alpha)
    batch = stack([Picture(torch.from_numpy(levels))] * 2)
    assert batch.shape == (2, 3, 7, 5) and batch.dtype == torch.float32
    for image in batch:
        assert np.array_equal(image.permute(1, 2, 0).numpy(), expected)


def test_eight_bits_wait_as_bytes_and_sixteen_keep_their_precision(tmp_path: Path) -> None:
    levels = np.arange(65_536, dtype=np.uint16).reshape(256, 256)
    Image.fromarray(levels).save(tmp_path / "deep.png")
    Image.fromarray((levels // 256).astype(np.uint8)).save(tmp_path / "flat.png")
    deep, flat = read_picture(tmp_path / "deep.png"), read_picture(tmp_path / "flat.png")
    assert flat.levels.dtype == torch.uint8 and flat.levels.shape == (256, 256, 3)
    assert len(stack([deep])[0, 0].unique()) == 65_536
    assert np.array_equal(stack([deep])[0, 2].numpy(), levels.astype(np.float32) / 65_535)
