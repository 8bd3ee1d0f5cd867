"""Reading pictures from disk: levels, or float32 [3, H, W] in [0, 1], and the way back to uint8.

Files come as cameras and editors leave them: turned by an EXIF flag, with transparency, palettes,
16 bits, ink colours or grey. Each is brought to upright RGB; transparency is laid over white, the
page that people judge pictures on. Of an animation the first frame is read. Colour profiles are
ignored, as in every published scorer; CMYK is (1 - ink) * (1 - black), and a CMYK JPEG counts as
inverted, which is how Adobe writes it. A file that cannot be read whole raises and is named: half
a decoded photograph must not get a score. A file is what its content says, not its ending.
"""

from __future__ import annotations

import os
import struct
import threading
import warnings
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from reward_models.base import RewardError
from reward_models.pixels import Picture, stack

# The endings of what is read below. (.mpo is a JPEG with more pictures behind the first; .pfm is
# not here, because its pixels have no known range.)
IMAGE_SUFFIXES = frozenset(
    {".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".mpo", ".webp", ".gif", ".bmp"}
    | {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".avifs"}
    | {".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"}
)

# Pillow knows more, and would for instance hand a PostScript file named .png to Ghostscript.
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")

# What Pillow's decoders raise on damaged files (UnidentifiedImageError is an OSError).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    RuntimeError,
    struct.error,
    zlib.error,
)

DECODED_BYTES = 8
"""Of one pixel while it is decoded, at most: Pillow's own four, and as many of the levels."""

# `warnings.catch_warnings` changes the whole process: readers in several threads take turns.
_OPENING = threading.Lock()

_TIFF_BITS, _TIFF_PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read one picture (of an animation the first frame).

    Returns:
        float32 [3, H, W] in [0, 1], upright, RGB, transparency over white.

    Raises:
        RewardError: as `read_picture`.
    """
    return stack([read_picture(path)])[0]


def read_picture(
    path: str | os.PathLike[str], reserve: Callable[[int], None] | None = None
) -> Picture:
    """Read one picture (of an animation the first frame) as the levels of its file.

    Args:
        reserve: told how many bytes decoding takes, when the head was read and nothing more.

    Raises:
        RewardError: naming the file, when it is missing, empty, damaged, cut off, no picture, has
            pixels of unknown range, or more of them than Pillow decodes (twice
            `PIL.Image.MAX_IMAGE_PIXELS`; then none is decoded).
    """
    path = Path(path)
    where = str(path)
    if not path.is_file():
        what = "is a folder, not an image" if path.is_dir() else "no such file"
        raise RewardError(what, where=where)
    try:
        with _open(path) as image:
            if reserve is not None:
                reserve(image.width * image.height * DECODED_BYTES)
            image.load()
            # In place: a copy of a large photograph is not free.
            ImageOps.exif_transpose(image, in_place=True)
            return Picture(_levels(image, where))
    except Image.DecompressionBombError as error:
        raise RewardError(
            f"is not decoded, it may be a decompression bomb ({error})",
            where=where,
            fix="make it smaller; of files that you trust, PIL.Image.MAX_IMAGE_PIXELS admits more",
        ) from error
    except UnidentifiedImageError as error:
        what = "is an empty file" if not path.stat().st_size else "is not an image that can be read"
        raise RewardError(
            what, where=where, fix=f"{', '.join(_formats())} are read, if their head is whole"
        ) from error
    except _DECODING_ERRORS as error:
        raise RewardError(
            f"the image is damaged or cut off ({error})",
            where=where,
            fix="replace the file, or take it out of the list",
        ) from error


def to_uint8(images: Tensor) -> Tensor:
    """The nearest uint8 picture of images in [0, 1], values outside clamped, on their device.

    Halves go to the even level, as in the published JPEG rewards and in diffusers' own pictures.
    (Adding 0.5 and cutting is biased upwards, and in float32 takes 0.49999997 to 1.) NaN has no
    colour: it is drawn black rather than left to the platform's cast. uint8 is kept.
    """
    if images.dtype == torch.uint8:
        return images
    clean = images.detach().float().nan_to_num(nan=0.0, posinf=1.0, neginf=0.0)
    return (clean.clamp(0, 1) * 255).round().to(torch.uint8)


@cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow has."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _open(path: Path) -> Image.Image:
    """Read a file's head. A picture of too many pixels is refused here, before it is decoded."""
    with _OPENING, warnings.catch_warnings():
        # Pillow warns of large pictures that it does read, and of odd tags.
        warnings.simplefilter("ignore")
        return Image.open(path, formats=_formats())


def _levels(image: Image.Image, where: str) -> Tensor:
    """What a `Picture` holds, of a decoded picture in whatever mode."""
    if image.mode == "F":
        raise _unknown_range("floating-point pixels", where)
    if image.mode.startswith("I"):
        return _deep_grey(image, where)[..., None]
    mode = "RGBA" if image.has_transparency_data else "RGB"
    # `convert` copies even where nothing is to be done.
    return torch.from_numpy(np.array(image if image.mode == mode else image.convert(mode)))


def _deep_grey(image: Image.Image, where: str) -> Tensor:
    """float32 [H, W] in [0, 1] of grey with more than 8 bits, which Pillow hands over as it lies.

    TIFF may store 12 bits, or white as zero; both reach us unscaled.
    """
    white, inverted = 65535, False
    tags = getattr(image, "tag_v2", None)
    if tags is not None:
        if image.mode == "I":  # 32 bits, or signed ones
            raise _unknown_range("32-bit or signed pixels", where)
        white = 2 ** int(np.max(tags.get(_TIFF_BITS, 16))) - 1
        inverted = tags.get(_TIFF_PHOTOMETRIC) == _WHITE_IS_ZERO
    levels = np.asarray(image).astype(np.float32)
    if levels.min() < 0 or levels.max() > white:
        raise _unknown_range("32-bit pixels", where)
    grey = torch.from_numpy(levels / white)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):  # PNG: the one level that is see-through
        grey[torch.from_numpy(levels == transparent)] = 1
    return 1 - grey if inverted else grey


def _unknown_range(what: str, where: str) -> RewardError:
    return RewardError(
        f"has {what}, which have no known range",
        where=where,
        fix="save it with 8 or 16 bits per channel",
    )
