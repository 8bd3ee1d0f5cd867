"""Pictures inside the report: inlined up to a budget, files beside it beyond.

One HTML file that holds everything is easy to send; one of 200 MB is not. Pictures up to 256
pixels are inlined as the PNGs they are. Larger ones are inlined as small JPEGs, and enlarging one
opens the PNG beside the report.
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

INLINE_BUDGET = 25_000_000
FULL_UP_TO = 256  # pixels: up to here the thumbnail is the picture itself
THUMBNAIL_SIDE = 320
JPEG_QUALITY = 88


@dataclass(frozen=True)
class Thumbnail:
    """`src` of the small picture and of the full one: a data URI or a relative path."""

    small: str
    full: str


class Thumbnails:
    """Hands out thumbnails of one report until its budget of inlined characters is spent."""

    def __init__(self, folder: Path, budget: int = INLINE_BUDGET) -> None:
        self._folder = folder
        self._left = budget
        self.beside = 0

    def of(self, relative: Path) -> Thumbnail:
        """The thumbnail of the PNG at `relative` inside the report's folder.

        Pictures whose thumbnail lies beside the report are counted in `beside`.
        """
        link = relative.as_posix()
        if self._left <= 0:
            self.beside += 1
            return Thumbnail(link, link)
        path = self._folder / relative
        with Image.open(path) as image:
            is_small = max(image.size) <= FULL_UP_TO
            data, kind = (path.read_bytes(), "png") if is_small else (_jpeg(image), "jpeg")
        uri = f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"
        if len(uri) > self._left:
            self._left = 0
            self.beside += 1
            return Thumbnail(link, link)
        self._left -= len(uri)
        return Thumbnail(uri, uri if is_small else link)


def _jpeg(image: Image.Image) -> bytes:
    small = image.convert("RGB")
    small.thumbnail((THUMBNAIL_SIDE, THUMBNAIL_SIDE), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    small.save(buffer, format="JPEG", quality=JPEG_QUALITY)
    return buffer.getvalue()
