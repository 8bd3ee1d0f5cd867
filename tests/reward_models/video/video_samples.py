"""Videos for tests, written with PyAV, whose frames tell their number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from torch import Tensor

av = pytest.importorskip("av")

Pixels = NDArray[np.uint8]
BITS = 8


def numbered(number: int, width: int = 64, height: int = 48) -> Pixels:
    """uint8 [H, W, 3]: the number as eight black and white bars over a strip of noise."""
    frame = np.zeros((height, width, 3), np.uint8)
    for bit in range(BITS):
        frame[:, bit * width // BITS : (bit + 1) * width // BITS] = 255 * (number >> bit & 1)
    noise = np.random.default_rng(number).integers(0, 256, (height // 3, width, 1))
    frame[-(height // 3) :] = noise.astype(np.uint8)
    return frame


def number_of(frame: Tensor) -> int:
    """What `numbered` wrote, read from float [3, H, W]."""
    row = frame.mean(dim=0)[frame.shape[1] // 3]
    width = len(row)
    return sum(
        int(row[bit * width // BITS + width // BITS // 2] > 0.5) << bit for bit in range(BITS)
    )


def write_video(
    path: Path,
    frames: Sequence[Pixels],
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    source: str = "rgb24",
    options: Mapping[str, str] | None = None,
    container: Mapping[str, str] | None = None,
    rate: Fraction | int = 24,
    milliseconds: Sequence[int] | None = None,
    tags: tuple[int, int] | None = None,
) -> Path:
    """Encode frames; skips the test where this PyAV has no such encoder.

    Args:
        pixels, source: pixel formats of the file and of the arrays.
        milliseconds: when each frame is shown, for a variable rate.
        tags: (colour matrix, colour range), as FFmpeg counts them.
    """
    try:
        av.Codec(codec, "w")
    except Exception:
        pytest.skip(f"this PyAV has no encoder {codec}")
    with av.open(f"file:{path}", "w", container_options=dict(container or {})) as file:
        stream = file.add_stream(codec, rate=rate, options=dict(options or {}))
        planar = source == "yuv444p"  # uint8 [3, H, W]
        stream.height, stream.width = frames[0].shape[1:] if planar else frames[0].shape[:2]
        stream.pix_fmt = pixels
        if tags:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for place, array in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(array, format=source)
            if tags:
                frame.colorspace, frame.color_range = tags
            frame.pts = place if milliseconds is None else milliseconds[place]
            if milliseconds is not None:
                frame.time_base = Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def write_numbered(path: Path, count: int = 30, **how: object) -> Path:
    """A clip whose frame i shows i."""
    return write_video(path, [numbered(i) for i in range(count)], **how)  # type: ignore[arg-type]


def write_sound(path: Path, codec: str = "aac") -> Path:
    """One second of silence."""
    with av.open(f"file:{path}", "w") as file:
        stream = file.add_stream(codec, rate=16000, layout="mono")
        samples = np.zeros((1, 16000), np.float32)
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        frame.rate = 16000
        file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path
