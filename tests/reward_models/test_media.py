"""Reading pictures as they come, and refusing damaged ones by name."""

from __future__ import annotations

import struct
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from reward_models.base import RewardError
from reward_models.media import _FORMATS, IMAGE_SUFFIXES, read_image, to_uint8

LEVEL = 1 / 255


def png(width: int, height: int, bits: int, kind: int, rows: bytes, chunks: bytes = b"") -> bytes:
    """A PNG written by hand: Pillow writes neither 16-bit colour nor false sizes."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    data = chunk(b"IHDR", head) + chunks + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def chunk(name: bytes, content: bytes) -> bytes:
    total = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", total)


def test_pixels_are_exact_multiples_of_a_level(tmp_path: Path, photo) -> None:  # type: ignore[no-untyped-def]
    pixels = photo(20, 30)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png")
    assert image.shape == (3, 20, 30) and image.dtype == torch.float32
    assert np.array_equal((image * 255).round().byte().permute(1, 2, 0).numpy(), pixels)


@pytest.mark.parametrize("ending", ["png", "tif", "webp", "jpg"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_exif_orientation_is_undone(tmp_path: Path, turn: int, ending: str) -> None:
    upright = np.zeros((8, 16, 3), np.uint8)
    upright[:4, :8] = 255  # white quarter at the top left
    undo: dict[int, Callable[[Any], Any]] = {
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
    exact: dict[str, Any] = {"lossless": True} if ending == "webp" else {"quality": 95}
    stored.save(tmp_path / f"a.{ending}", exif=exif, **exact)
    image = read_image(tmp_path / f"a.{ending}")
    assert image.shape == (3, 8, 16)
    assert torch.allclose(image, torch.from_numpy(upright).permute(2, 0, 1) / 255, atol=3 * LEVEL)


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
    # An alpha for each colour of the palette, and one colour of many that is see-through.
    palette.save(tmp_path / "pb.png", transparency=bytes([255, 0]))
    expected[:, 1] = 1
    assert torch.allclose(read_image(tmp_path / "pb.png")[:, 0], expected)
    Image.new("RGB", (2, 2), (9, 8, 7)).save(tmp_path / "key.png", transparency=(9, 8, 7))
    assert torch.equal(read_image(tmp_path / "key.png"), torch.ones(3, 2, 2))
    palette.save(tmp_path / "p.gif", transparency=0)
    assert torch.equal(read_image(tmp_path / "p.gif")[:, 0, 0], torch.ones(3))


def test_sixteen_bits_are_not_cut_at_white(tmp_path: Path) -> None:
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    Image.fromarray(levels).save(tmp_path / "a.png")
    Image.fromarray(levels).save(tmp_path / "a.tif")
    expected = torch.from_numpy(levels.astype(np.float32) / 65535).expand(3, 1, 4)
    assert torch.allclose(read_image(tmp_path / "a.png"), expected)
    assert torch.allclose(read_image(tmp_path / "a.tif"), expected)


def test_sixteen_bit_greys_that_lie_otherwise_in_the_file(tmp_path: Path) -> None:
    levels = np.array([[0, 256, 32768, 65535]], np.uint16)
    expected = torch.from_numpy(levels.astype(np.float32) / 65535).expand(3, 1, 4)
    Image.fromarray(levels).save(tmp_path / "negative.tif", tiffinfo={262: 0})  # white is zero
    assert torch.allclose(read_image(tmp_path / "negative.tif"), 1 - expected)
    big = levels.astype(">u2").tobytes()
    Image.frombytes("I;16B", (4, 1), big).save(tmp_path / "big.tif")
    assert torch.allclose(read_image(tmp_path / "big.tif"), expected)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + big)
    assert torch.allclose(read_image(tmp_path / "a.pgm"), expected)
    see_through = chunk(b"tRNS", struct.pack(">H", 256))
    (tmp_path / "key.png").write_bytes(png(4, 1, 16, 0, b"\0" + big, see_through))
    with_hole = expected.clone()
    with_hole[:, :, 1] = 1
    assert torch.allclose(read_image(tmp_path / "key.png"), with_hole)


def test_twelve_bits_reach_white(tmp_path: Path) -> None:
    """Two pixels in three bytes, 0 and 4095 (Pillow reads such a TIFF and writes none)."""
    tags = [(256, 2), (257, 1), (258, 12), (259, 1), (262, 1), (273, 8), (277, 1), (279, 3)]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    data = b"\x00\x0f\xff\x00"
    head = b"II*\0" + struct.pack("<I", 12) + data
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    (tmp_path / "a.tif").write_bytes(head + directory)
    assert read_image(tmp_path / "a.tif")[0].tolist() == [[0.0, 1.0]]


def test_sixteen_bit_colour_is_read_at_eight(tmp_path: Path) -> None:
    row = b"\0" + struct.pack(">6H", 0, 65535, 32896, 65535, 0, 257)
    (tmp_path / "rgb.png").write_bytes(png(2, 1, 16, 2, row))
    expected = torch.tensor([[0, 255], [255, 0], [128, 1]]) / 255
    assert torch.allclose(read_image(tmp_path / "rgb.png")[:, 0], expected)
    grey_alpha = b"\0" + struct.pack(">2H", 0, 32896)
    (tmp_path / "la.png").write_bytes(png(1, 1, 16, 4, grey_alpha))
    expected = torch.full((3, 1, 1), 127 / 255)
    assert torch.allclose(read_image(tmp_path / "la.png"), expected)


@pytest.mark.parametrize("ending", ["jpg", "tif"])
def test_inks_are_mixed_to_colours(tmp_path: Path, ending: str) -> None:
    """(1 - ink) * (1 - black). Pillow writes a CMYK JPEG as Adobe does: marked, and inverted."""
    inks = (255, 128, 0, 64)
    path = tmp_path / f"a.{ending}"
    Image.new("CMYK", (16, 16), inks).save(path, quality=100)
    assert (b"Adobe" in path.read_bytes()) == (ending == "jpg")
    expected = torch.tensor([(255 - ink) * (255 - inks[3]) / 255**2 for ink in inks[:3]])
    image = read_image(path)
    assert (image - expected.view(3, 1, 1)).abs().max() <= 2 * LEVEL


@pytest.mark.parametrize("ending", ["gif", "webp", "png"])
def test_an_animation_gives_its_first_frame(tmp_path: Path, ending: str) -> None:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue", "white")]
    path = tmp_path / f"a.{ending}"
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=50)
    with Image.open(path) as stored:
        assert getattr(stored, "n_frames", 1) == 3
    image = read_image(path)
    assert image.shape == (3, 4, 4)
    assert image[0].mean() > 0.9 and image[1:].mean() < 0.1


def test_one_pixel_and_a_long_strip_are_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (1, 1), (255, 0, 51)).save(tmp_path / "one.png")
    assert torch.allclose(read_image(tmp_path / "one.png").flatten(), torch.tensor([1.0, 0, 0.2]))
    row = np.arange(30_000, dtype=np.int64) % 256
    strip = np.broadcast_to(row.astype(np.uint8)[None, :, None], (2, 30_000, 3))
    Image.fromarray(np.ascontiguousarray(strip)).save(tmp_path / "strip.png")
    image = read_image(tmp_path / "strip.png")
    assert image.shape == (3, 2, 30_000) and image[0, 1, 29_999] == row[-1].item() / 255


SIDES = (30_000, 30_000)


class Decoded(AssertionError):
    """Pixels of a picture were decoded that had to be refused before."""


@pytest.mark.parametrize(
    "content",
    [
        png(30_000, 30_000, 8, 2, b""),
        b"P6 30000 30000 255\n",
        b"GIF89a" + struct.pack("<HHBBBBHHHHB", *SIDES, 0, 0, 0, 44, 0, 0, *SIDES, 0) + b"\2\0;",
    ],
    ids=["png", "ppm", "gif"],
)
def test_a_decompression_bomb_is_refused_before_it_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    def load(*_: object) -> None:
        raise Decoded

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    path = tmp_path / "bomb.png"
    path.write_bytes(content)
    with pytest.raises(RewardError, match=r"bomb.png: is not decoded, .* decompression bomb"):
        read_image(path)
    # The meter works: what is small enough does get to the decoder.
    path.write_bytes(png(30, 30, 8, 2, b""))
    with pytest.raises(Decoded):
        read_image(path)


def test_large_pictures_below_the_limit_are_read_without_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    Image.new("L", (15, 10), 255).save(tmp_path / "large.png")  # between once and twice the limit
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(read_image(tmp_path / "large.png"), torch.ones(3, 10, 15))
    Image.new("L", (21, 10)).save(tmp_path / "larger.png")
    with pytest.raises(RewardError, match="MAX_IMAGE_PIXELS"):
        read_image(tmp_path / "larger.png")


def test_a_users_own_warning_filters_are_left_as_they_are(tmp_path: Path) -> None:
    Image.new("L", (2, 2)).save(tmp_path / "a.png")
    before = list(warnings.filters)
    read_image(tmp_path / "a.png")
    assert list(warnings.filters) == before


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "gif", "tif", "bmp"])
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


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


@pytest.mark.parametrize("content", [b"not a picture at all", b"<svg></svg>", POSTSCRIPT, b"\x89"])
def test_what_is_no_picture_is_named(tmp_path: Path, content: bytes) -> None:
    """PostScript too: Pillow on its own would run Ghostscript on it."""
    path = tmp_path / "text.png"
    path.write_bytes(content)
    with pytest.raises(RewardError, match=r"text.png: is not an image that can be read") as caught:
        read_image(path)
    assert "PNG, JPEG" in caught.value.fix


def test_an_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "zero.jpg").touch()
    with pytest.raises(RewardError, match=r"zero.jpg: is an empty file"):
        read_image(tmp_path / "zero.jpg")


def test_a_picture_is_what_it_holds_not_what_it_is_called(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), "white").save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.jpg")
    assert torch.equal(read_image(tmp_path / "a.jpg"), torch.ones(3, 2, 2))


@pytest.mark.parametrize(
    "levels",
    [
        np.ones((2, 2), np.float32),
        np.full((2, 2), 70_000, np.int32),
        np.full((2, 2), -1, np.int32),
        np.full((2, 2), 7, np.int32),
    ],
    ids=["float", "wide", "negative", "small"],
)
def test_pixels_of_unknown_range_are_refused(tmp_path: Path, levels: np.ndarray) -> None:
    Image.fromarray(levels).save(tmp_path / "f.tif")
    with pytest.raises(RewardError, match=r"f.tif: has .* no known range") as caught:
        read_image(tmp_path / "f.tif")
    assert "8 or 16 bits" in caught.value.fix


FORMATS: list[tuple[str, dict[str, Any]]] = [
    ("PNG", {}),
    ("JPEG", {}),
    ("WEBP", {}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
]


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize(("kind", "options"), FORMATS)
def test_whatever_is_wrong_with_a_file_is_a_reward_error(
    tmp_path: Path, photo: Callable[..., np.ndarray], kind: str, options: dict[str, Any]
) -> None:
    """Bytes are struck at random, most of them in the head: read or refused, nothing else."""
    path = tmp_path / "struck.png"
    exif = Image.Exif()
    exif[0x0112] = 6
    saved = {**options, **({"exif": exif} if kind in ("PNG", "JPEG", "WEBP", "TIFF") else {})}
    Image.fromarray(photo(24, 20)).save(path, kind, **saved)
    content = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        struck = bytearray(content)
        for place in rng.integers(0, min(len(content), 200), 3):
            struck[place] = rng.choice(np.array([0, 255, rng.integers(256)]))
        path.write_bytes(struck)
        try:
            image = read_image(path)
        except RewardError as error:
            refused += 1
            assert str(path) in str(error)
        else:
            assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert refused


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


def test_a_folder_takes_every_ending_of_a_format_that_is_read() -> None:
    Image.init()
    ours = {ending for ending, name in Image.registered_extensions().items() if name in _FORMATS}
    assert ours - {".pfm"} | {".mpo"} == IMAGE_SUFFIXES
    assert not {".eps", ".pdf", ".psd", ".pfm"} & IMAGE_SUFFIXES


@pytest.mark.parametrize("ending", sorted(IMAGE_SUFFIXES))
def test_a_picture_of_every_ending_is_read(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a{ending}"
    Image.init()
    if Image.registered_extensions().get(ending) not in Image.SAVE:
        pytest.skip("this Pillow does not write it")
    more: dict[str, Any] = {}
    if ending == ".mpo":
        more = {"save_all": True, "append_images": [Image.new("RGB", (8, 8), "black")]}
    Image.new("L" if ending in (".pgm", ".pbm") else "RGB", (8, 8), "white").save(path, **more)
    assert read_image(path).min() > 0.95


def test_floats_of_unknown_range_are_why_one_ending_is_left_out(tmp_path: Path) -> None:
    Image.new("F", (2, 2)).save(tmp_path / "a.pfm")
    with pytest.raises(RewardError, match=r"a\.pfm: has floating-point pixels"):
        read_image(tmp_path / "a.pfm")
