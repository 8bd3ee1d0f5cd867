"""Reading pictures from disk as float32 [3, H, W] in [0, 1], and the way back to uint8.

Files come as cameras and editors leave them: turned by an EXIF flag, with transparency, palettes,
16 bits or grey. Each is brought to upright RGB; transparency is laid over white, the page that
people judge pictures on. Colour profiles are ignored, as in every published scorer. A file that
cannot be read whole raises and is named: half a decoded photograph must not get a score.
"""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from reward_models.base import RewardError

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})

# What Pillow's decoders raise on damaged files (UnidentifiedImageError is an OSError).
_DECODING_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def read_image(path: str | os.PathLike[str]) -> Tensor:
    """Read one picture (of an animation the first frame).

    Returns:
        float32 [3, H, W] in [0, 1], upright, RGB, transparency over white.

    Raises:
        RewardError: naming the file, when it is missing, damaged, cut off or no picture.
    """
    path = Path(path)
    if not path.is_file():
        what = "is a folder, not an image" if path.is_dir() else "no such file"
        raise RewardError(what, where=str(path))
    try:
        with Image.open(path) as image:
            pixels = _to_rgb(ImageOps.exif_transpose(image))
    except UnidentifiedImageError as error:
        raise RewardError("is not an image that can be read", where=str(path)) from error
    except _DECODING_ERRORS as error:
        raise RewardError(
            f"the image is damaged or cut off ({error})",
            where=str(path),
            fix="replace the file, or take it out of the list",
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()


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


def _to_rgb(image: Image.Image) -> NDArray[Any]:
    """float32 [H, W, 3] in [0, 1] of a decoded picture in whatever mode."""
    if image.mode == "F":
        raise ValueError("floating-point pixels have no known range")
    if image.mode.startswith("I"):
        grey = np.asarray(image).astype(np.float32) / 65535
        if grey.min() < 0 or grey.max() > 1:
            raise ValueError("32-bit pixels have no known range")
        return np.repeat(grey[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        rgba = np.asarray(image.convert("RGBA")).astype(np.float32) / 255
        alpha = rgba[:, :, 3:]
        return rgba[:, :, :3] * alpha + (1 - alpha)
    return np.asarray(image.convert("RGB")).astype(np.float32) / 255
