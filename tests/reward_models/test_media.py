"""Reading pictures as they come, and refusing damaged ones by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.base import RewardError
from reward_models.media import read_image, to_uint8


def test_pixels_are_exact_multiples_of_a_level(tmp_path: Path, photo) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 20, 30) and image.dtype == torch.float32
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, turn: int) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # white quarter at the top left
    undo = {
        1: lambda a: a,
        2: lambda a: a[:, ::-1],
        3: lambda a: a[::-1, ::-1],
        4: lambda a: a[::-1],
        5: lambda a: a.transpose(1, 0, 2),
        6: lambda a: np.rot90(a, 1),
        7: lambda a: a[::-1, ::-1].transpose(1, 0, 2),
        8: lambda a: np.rot90(a, -1),
    }
    stored = Image.fromarray(np.ascontiguousarray(undo[turn](upright)))
    exif = Image.Exif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.png", exif=exif)
    image = read_image(tmp_path / "a.png")
    assert torch.equal(image, torch.from_numpy(upright).permute(2, 0, 1) / 255)


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    pixels = np.zeros((1, 3, 4), np.uint8)
    pixels[0, :, 0] = 255  # red
    pixels[0, :, 3] = [0, 51, 255]
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert torch.allclose(image[:, 0, 0], torch.ones(3))
    assert torch.allclose(image[:, 0, 1], torch.tensor([1.0, 0.8, 0.8]))
    assert torch.allclose(image[:, 0, 2], torch.tensor([1.0, 0.0, 0.0]))


def test_palettes_greys_and_their_transparency(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    palette.save(tmp_path / "p.png")
    expected = torch.tensor([[10, 200], [20, 100], [30, 50]]) / 255
    assert torch.allclose(read_image(tmp_path / "p.png")[:, 0], expected)
    palette.save(tmp_path / "pt.png", transparency=1)
    assert torch.equal(read_image(tmp_path / "pt.png")[:, 0, 1], torch.ones(3))
    Image.new("L", (2, 2), 51).save(tmp_path / "l.png")
    assert torch.allclose(read_image(tmp_path / "l.png"), torch.full((3, 2, 2), 0.2))
    Image.new("LA", (2, 2), (0, 102)).save(tmp_path / "la.png")
    assert torch.allclose(read_image(tmp_path / "la.png"), torch.full((3, 2, 2), 0.6))
    Image.new("1", (2, 2), 1).save(tmp_path / "1.png")
    assert torch.equal(read_image(tmp_path / "1.png"), torch.ones(3, 2, 2))


def test_sixteen_bits_are_not_cut_at_white(tmp_path: Path) -> None:
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    expected = torch.from_numpy(levels.astype(np.float32) / 65535).expand(3, 1, 4)
    assert torch.allclose(read_image(tmp_path / "a.png"), expected)
    assert torch.allclose(read_image(tmp_path / "a.tif"), expected)


def test_an_animation_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert read_image(tmp_path / "a.gif")[0].mean() > 0.9


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
@pytest.mark.parametrize("share", [0.9, 0.5, 0.1])
def test_a_cut_off_file_is_named(tmp_path: Path, photo, ending: str, share: float) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / f"cut.{ending}"
    Image.fromarray(photo(64, 64)).save(path)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(RewardError, match=f"cut.{ending}"):
        read_image(path)


def test_a_damaged_file_is_named(tmp_path: Path, photo) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "bad.png"
    Image.fromarray(photo(64, 64)).save(path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(RewardError, match=r"bad.png: the image is damaged"):
        read_image(path)


@pytest.mark.parametrize("content", [b"", b"not a picture at all", b"<svg></svg>"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(RewardError, match=r"text.png: is not an image"):
        read_image(path)


def test_pixels_of_unknown_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.ones((2, 2), np.float32)).save(tmp_path / "f.tif")
    with pytest.raises(RewardError, match="no known range"):
        read_image(tmp_path / "f.tif")


def test_missing_files_and_folders_are_told_apart(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match="no such file"):
        read_image(tmp_path / "none.png")
    with pytest.raises(RewardError, match="is a folder"):
        read_image(tmp_path)


@pytest.mark.parametrize("name", ["cat_aesthetic.png", "cat_normal.png", "hps_demo.jpg"])
def test_real_photographs_are_read(published, name: str) -> None:  # type: ignore[no-untyped-def]
    path = published(f"images/{name}")
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    pixels = (read_image(path) * 255).round().byte().permute(1, 2, 0).numpy()
    assert np.array_equal(pixels, expected)


def test_every_level_survives_the_way_to_uint8_and_halves_go_to_even() -> None:
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 255), levels)
    assert torch.equal(to_uint8(levels), levels)
    halves = torch.tensor([0.5, 1.5, 2.5, 127.5], dtype=torch.float32) / 255
    assert to_uint8(halves).tolist() == (halves.numpy() * 255).round().tolist()
    # Pixels just below half a level: adding 0.5 in float32 would lift them to the next.
    assert to_uint8(torch.tensor([0.49999997 / 255])).item() == 0
    odd = torch.tensor([float("nan"), float("inf"), float("-inf"), 1.2, -0.3])
    assert to_uint8(odd).tolist() == [0, 255, 0, 255, 0]
