"""Pictures on disk: exact, whole or absent; grids that stay inside their cells."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from diffusion_align.data.images import PAPER, draw_grid, save_grid, to_uint8, wrap, write_png
from diffusion_align.errors import UserError


def test_pixels_are_rounded_clamped_and_read_back_exactly(tmp_path: Path) -> None:
    levels = torch.arange(256).float() / 255
    pixels = levels.reshape(1, 16, 16).repeat(3, 1, 1)
    path = write_png(tmp_path / "new" / "folder" / "a.png", pixels)
    with Image.open(path) as image:
        assert image.mode == "RGB"
        assert np.array_equal(np.asarray(image)[..., 1].ravel(), np.arange(256))
    assert to_uint8(np.array([-0.5, 0.5019, 2.0, np.nan])).tolist() == [0, 128, 255, 0]


def test_bytes_are_kept_and_channels_stay_in_place(tmp_path: Path) -> None:
    pixels = np.zeros((3, 2, 4), dtype=np.uint8)
    pixels[0, 0, 3] = 200
    with Image.open(write_png(tmp_path / "a.png", pixels)) as image:
        assert image.size == (4, 2)
        assert image.getpixel((3, 0)) == (200, 0, 0)


def test_a_failed_write_leaves_the_old_picture_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_png(tmp_path / "a.png", torch.zeros(3, 4, 4))
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"a\.png: cannot write the picture \(No space left"):
        write_png(path, torch.ones(3, 4, 4))
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


def test_a_folder_that_is_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(UserError, match="cannot write here"):
        write_png(tmp_path / "x" / "a.png", torch.zeros(3, 4, 4))


def test_a_clip_is_a_strip_of_four_of_its_frames(tmp_path: Path) -> None:
    clip = torch.linspace(0, 1, 9).view(9, 1, 1, 1).expand(9, 3, 2, 2)
    with Image.open(write_png(tmp_path / "clip.png", clip)) as strip:
        assert strip.size == (8, 2)
        shown = [strip.convert("L").getpixel((x, 0)) for x in (0, 2, 4, 6)]
    assert shown == [round(255 * i / 8) for i in (0, 3, 5, 8)]


@pytest.mark.parametrize("shape", [(1, 4, 4), (4, 4), (2, 1, 4, 4)])
def test_other_shapes_are_refused(tmp_path: Path, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"\[3, H, W\]"):
        write_png(tmp_path / "a.png", torch.zeros(shape))


def test_wrapped_lines_fit_and_keep_every_word() -> None:
    font = ImageFont.load_default(size=14)
    text = "a large red circle above a small blue square on a white background"
    lines = wrap(text, font, 120, 20)
    assert " ".join(lines) == text
    assert len(lines) > 3
    assert all(font.getlength(line) <= 120 for line in lines)


def test_long_words_are_broken_and_long_texts_cut_with_an_ellipsis() -> None:
    font = ImageFont.load_default(size=14)
    lines = wrap("x" * 300 + " tail", font, 90, 3)
    assert len(lines) == 3
    assert lines[-1].endswith("…")
    assert all(font.getlength(line) <= 90 for line in lines)
    assert wrap("   ", font, 90, 3) == []


def test_small_pictures_are_enlarged_by_a_whole_factor_and_stay_sharp(tmp_path: Path) -> None:
    black, white = torch.zeros(3, 64, 64), torch.ones(3, 64, 64)
    path = save_grid(
        tmp_path / "grid.png",
        [[black, white], [white, black]],
        row_labels=["a prompt", "an unreasonably long prompt " * 40],
        column_labels=["base", "tuned"],
        title="before and after",
    )
    with Image.open(path) as image:
        grid = np.asarray(image)
    black_pixels = (grid == 0).all(axis=2)
    # Two black pictures of 128 x 128 and no half tones at their edges.
    assert black_pixels.sum() == 2 * 128 * 128


def test_labels_never_reach_into_the_pictures() -> None:
    pixels = torch.full((3, 32, 32), 0.5)
    drawn = [
        draw_grid([[pixels]], row_labels=[label], column_labels=["base"])
        for label in ("", "W" * 500, "多" * 80)
    ]
    boxes = [np.argwhere((np.asarray(image) == 128).all(axis=2)) for image in drawn]
    assert all(len(box) == 128 * 128 for box in boxes)
    assert drawn[0].getpixel((0, 0)) == PAPER


def test_ragged_or_unlabelled_grids_are_refused() -> None:
    pixels = torch.zeros(3, 8, 8)
    with pytest.raises(ValueError, match="every row needs 2"):
        draw_grid([[pixels, pixels], [pixels]], row_labels=["", ""], column_labels=["", ""])
    with pytest.raises(ValueError, match="one label per row"):
        draw_grid([[pixels]], row_labels=[], column_labels=[""])
    with pytest.raises(ValueError, match="at least one picture"):
        draw_grid([], row_labels=[], column_labels=[])
