"""Pictures to files: PNGs that are never half written, and labelled grids.

Pixels are `float [3, H, W]` in [0, 1] or `uint8 [3, H, W]`, torch tensors or NumPy arrays.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from diffusion_align.errors import UserError

if TYPE_CHECKING:
    import torch

    Pixels = torch.Tensor | np.ndarray[Any, Any]

Colour = tuple[int, int, int]

PAPER: Colour = (255, 255, 255)
INK: Colour = (28, 30, 33)
FAINT: Colour = (110, 116, 124)
SMALL_PICTURE = 128  # grids show pictures below this size enlarged, by a whole factor


STRIP_FRAMES = 4


def to_uint8(pixels: Pixels) -> np.ndarray[Any, Any]:
    """`[..., 3, H, W]` in [0, 1] to `uint8`, rounded to nearest and clamped; `uint8` is kept.

    NaN has no colour: it is drawn as black rather than left to the platform's cast.
    """
    array = pixels if isinstance(pixels, np.ndarray) else pixels.detach().cpu().numpy()
    if array.dtype == np.uint8:
        return array
    clean = np.nan_to_num(array.astype(np.float32), nan=0.0, posinf=1.0, neginf=0.0)
    return (clean.clip(0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)


def to_image(pixels: Pixels) -> Image.Image:
    """One picture `[3, H, W]` as a Pillow image, or a clip `[F, 3, H, W]` as a strip of frames.

    A strip has at most `STRIP_FRAMES` of them, spread over the clip. Raises `ValueError` on any
    other shape.
    """
    array = to_uint8(pixels)
    if array.ndim == 4:
        shown = np.linspace(0, len(array) - 1, min(len(array), STRIP_FRAMES)).round().astype(int)
        array = np.concatenate(list(array[shown]), axis=-1)
    if array.ndim != 3 or array.shape[0] != 3:
        raise ValueError(f"expected pixels of shape [3, H, W], got {list(array.shape)}")
    return Image.fromarray(np.ascontiguousarray(array.transpose(1, 2, 0)))


def write_png(path: Path, pixels: Pixels | Image.Image) -> Path:
    """Write a PNG whole or not at all (temporary file beside it, then rename); makes its folder.

    Raises:
        UserError: the disk refuses; names the file.
    """
    image = pixels if isinstance(pixels, Image.Image) else to_image(pixels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.stem}.", suffix=".png", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write here ({error.strerror})", where=str(path)) from error
    temporary = Path(name)
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG")
        # mkstemp makes private files; a picture is as readable as any other output.
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise UserError(
            f"cannot write the picture ({error.strerror})",
            where=str(path),
            fix="check that the disk is not full and the folder is writable",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def wrap(text: str, font: Any, width: int, lines: int) -> list[str]:
    """`text` broken into at most `lines` lines no wider than `width` pixels, cut with an ellipsis.

    Words longer than a line are broken; nothing is ever drawn outside its cell.
    """
    remaining = " ".join(text.split())
    done: list[str] = []
    while remaining and len(done) < lines:
        piece = _fitting(remaining, font, width)
        done.append(piece.rstrip())
        remaining = remaining[len(piece) :].lstrip()
    if remaining and done:
        last = done[-1]
        while last and font.getlength(last + "…") > width:
            last = last[:-1]
        done[-1] = last.rstrip() + "…"
    return done


def _fitting(text: str, font: Any, width: int) -> str:
    """The longest beginning of `text` that fits, cut at a space where there is one."""
    if font.getlength(text) <= width:
        return text
    end = 1
    while end < len(text) and font.getlength(text[: end + 1]) <= width:
        end += 1
    # A word that ends exactly at the edge needs no cut before it.
    space = end if text[end : end + 1] == " " else text.rfind(" ", 0, end)
    return text[:space] if space > 0 else text[:end]


def draw_grid(
    rows: Sequence[Sequence[Pixels]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    gap_before: Sequence[int] = (),
) -> Image.Image:
    """A table of pictures with a label per row (wrapped) and per column.

    Args:
        rows: `rows[r][c]` is a picture `[3, H, W]`; all of one size.
        row_labels: usually the prompts; long ones are wrapped and then cut.
        column_labels: usually `base` and `tuned`.
        title: one line above everything.
        gap_before: columns with a wider gap on their left, to set groups apart.

    Raises:
        ValueError: ragged rows, labels that do not match, or no picture.
    """
    if not rows or not rows[0]:
        raise ValueError("a grid needs at least one picture")
    columns = len(rows[0])
    if any(len(row) != columns for row in rows):
        raise ValueError(f"every row needs {columns} pictures")
    if len(row_labels) != len(rows) or len(column_labels) != columns:
        raise ValueError("give one label per row and per column")

    images = [[to_image(pixels) for pixels in row] for row in rows]
    width, height = images[0][0].size
    scale = max(1, -(-SMALL_PICTURE // max(width, height)))
    width, height = width * scale, height * scale
    font_size = max(12, min(26, height // 9))
    font: Any = ImageFont.load_default(size=font_size)
    gap, margin = max(4, width // 24), max(16, width // 8)
    label_width = int(1.5 * width) + margin
    head = margin + (2 * font_size if title else 0) + 2 * font_size

    lefts: list[int] = []
    left = margin + label_width
    for column in range(columns):
        left += 3 * gap if column in gap_before else 0
        lefts.append(left)
        left += width + gap
    size = (left - gap + margin, head + len(rows) * (height + gap) - gap + margin)

    canvas = Image.new("RGB", size, PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        line = wrap(title, font, size[0] - 2 * margin, 1)[0]
        draw.text((margin, margin), line, INK, font)
    for x, label in zip(lefts, column_labels, strict=True):
        line = "".join(wrap(label, font, width, 1))
        draw.text((x + width / 2, head - font_size // 2), line, FAINT, font, anchor="ms")
    most_lines = max(1, int(height // (1.3 * font_size)))
    for index, (row, label) in enumerate(zip(images, row_labels, strict=True)):
        top = head + index * (height + gap)
        for number, line in enumerate(wrap(label, font, label_width - margin, most_lines)):
            draw.text((margin, top + int(1.3 * font_size * number)), line, INK, font)
        for x, image in zip(lefts, row, strict=True):
            # Whole factors keep the pixels of tiny pictures square and honest.
            shown = image.resize((width, height), Image.Resampling.NEAREST)
            canvas.paste(shown, (x, top))
    return canvas


def save_grid(
    path: Path,
    rows: Sequence[Sequence[Pixels]],
    *,
    row_labels: Sequence[str],
    column_labels: Sequence[str],
    title: str = "",
    gap_before: Sequence[int] = (),
) -> Path:
    """`draw_grid` written to `path` as a PNG."""
    grid = draw_grid(
        rows,
        row_labels=row_labels,
        column_labels=column_labels,
        title=title,
        gap_before=gap_before,
    )
    return write_png(path, grid)
