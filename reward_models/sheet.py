"""A contact sheet: the best and the worst by each reward, as one picture.

    draw_sheet(rows, ["aesthetic"], Path("sheet.png"), count=8)

Of every reward a block: its best and its worst pictures with score, path and prompt; of a video the
middle frame. The font is the one that travels inside Pillow, so the sheet looks the same everywhere
(it knows Latin letters; others are drawn as boxes).
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from reward_models.base import RewardError
from reward_models.inputs import is_video
from reward_models.rows import ScoredFile
from reward_models.table_files import write_whole

Box = tuple[int, int]
Font = Any  # Pillow gives one of two classes, of which both measure and draw

_TILE = 232
_GAP = 20
_MARGIN = 36
_SCORE_LINE = 30
_TEXT_LINE = 18
_MOST_TEXT_LINES = 3
_HEAD = 54
_BETWEEN = 18  # blocks
_SIDE = 64  # a strip left of the tiles: "best", "worst"
_MOST_COLUMNS = 8

_PAPER = "#ffffff"
_MAT = "#f1f1ee"
_INK = "#1d1d1b"
_QUIET = "#77776f"
_RULE = "#dcdcd6"
_BEST = "#1f7a4d"
_WORST = "#b3402e"

_FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


@dataclass(frozen=True)
class _Choice:
    """One line of tiles.

    Args:
        title: best | worst
        rows: in the order in which they are shown, each with its score.
    """

    title: str
    colour: str
    rows: list[tuple[float, ScoredFile]]


def check_sheet(path: Path) -> None:
    """Refuse a sheet in a format that is not drawn.

    Raises:
        RewardError: naming the endings that are.
    """
    if path.suffix.lower() not in _FORMATS:
        raise RewardError(
            f"a sheet is not written as {path.suffix or 'a file without an ending'}",
            where=str(path),
            fix=f"endings: {' '.join(_FORMATS)}",
        )


def draw_sheet(
    rows: Sequence[ScoredFile], names: Sequence[str], path: Path, *, count: int = 8
) -> None:
    """Draw the `count` best and worst rows by every reward of `names`.

    Where there are fewer than 2 * count scores, none is shown twice. Equal scores keep the order
    of the rows. Rewards that scored nothing have no block.

    Raises:
        RewardError: nothing has a score, the ending is unknown, or the file cannot be written.
    """
    check_sheet(path)
    blocks = [(name, best_and_worst(rows, name, count)) for name in names]
    blocks = [(name, choice) for name, choice in blocks if choice[0]]
    if not blocks:
        raise RewardError("nothing has a score, so there is nothing to draw", where=str(path))
    shown = [row.prompt for _, (best, worst) in blocks for _, row in (*best, *worst)]
    sheet = _Sheet(max(len(best) for _, (best, _) in blocks), shown)
    lines: list[tuple[str, str, list[_Choice]]] = []
    for name, (best, worst) in blocks:
        scored = sum(row.scores.get(name) is not None for row in rows)
        choices = [_Choice("best", _BEST, best)]
        if worst:
            choices.append(_Choice("worst", _WORST, worst))
        lines.append((name, f"{len(best)} best, {len(worst)} worst of {scored}", choices))
    buffer = io.BytesIO()
    sheet.draw(lines).save(buffer, _FORMATS[path.suffix.lower()])
    write_whole(path, buffer.getvalue())


def best_and_worst(
    rows: Sequence[ScoredFile], name: str, count: int
) -> tuple[list[tuple[float, ScoredFile]], list[tuple[float, ScoredFile]]]:
    """(the best, from the highest down; the worst, from the lowest up), no row in both."""
    scored = [(value, row) for row in rows if (value := row.scores.get(name)) is not None]
    order = sorted(scored, key=lambda pair: -pair[0])  # stable: equal scores keep their order
    best = order[: min(count, (len(order) + 1) // 2)]
    worst = order[::-1][: min(count, len(order) // 2)]
    return best, worst


class _Sheet:
    """Sizes and fonts of a sheet with so many tiles beside each other."""

    def __init__(self, tiles: int, prompts: Sequence[str]) -> None:
        lines = -(-tiles // _MOST_COLUMNS)
        self.columns = -(-tiles // lines)  # lines of equal length
        self.width = 2 * _MARGIN + _SIDE + self.columns * (_TILE + _GAP) - _GAP
        self.fonts: dict[str, Font] = {
            "title": ImageFont.load_default(size=26),
            "score": ImageFont.load_default(size=19),
            "text": ImageFont.load_default(size=14),
        }
        most = max(len(self._prompt_lines(prompt)) for prompt in prompts)
        self.caption = _SCORE_LINE + _TEXT_LINE * most
        self.play = _play_sign(28)

    def _prompt_lines(self, prompt: str) -> list[str]:
        return wrapped(prompt, self.fonts["text"], _TILE, lines=_MOST_TEXT_LINES)

    def draw(self, blocks: Sequence[tuple[str, str, list[_Choice]]]) -> Image.Image:
        """The whole sheet of (reward, what is shown of it, lines of tiles)."""
        height = 2 * _MARGIN - _GAP + _BETWEEN * (len(blocks) - 1)
        for _, _, choices in blocks:
            height += _HEAD + sum(self._height(choice) for choice in choices)
        sheet = Image.new("RGB", (self.width, height), _PAPER)
        pen = ImageDraw.Draw(sheet)
        y = _MARGIN
        for name, facts, choices in blocks:
            y = self._heading(pen, name, facts, y)
            for choice in choices:
                y = self._tiles(sheet, pen, choice, y)
            y += _BETWEEN
        return sheet

    def _height(self, choice: _Choice) -> int:
        lines = -(-len(choice.rows) // self.columns)
        return lines * (_TILE + self.caption + _GAP)

    def _heading(self, pen: ImageDraw.ImageDraw, name: str, facts: str, y: int) -> int:
        right = self.width - _MARGIN
        facts_width = pen.textlength(facts, self.fonts["text"])
        room = right - _MARGIN - facts_width - _GAP
        title = ellipsis(name, self.fonts["title"], room)
        pen.text((_MARGIN, y + 24), title, _INK, self.fonts["title"], anchor="ls")
        pen.text((right, y + 24), facts, _QUIET, self.fonts["text"], anchor="rs")
        pen.line((_MARGIN, y + 36, right, y + 36), _RULE)
        return y + _HEAD

    def _tiles(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, choice: _Choice, top: int
    ) -> int:
        bottom = top + self._height(choice)
        pen.rectangle((_MARGIN, top, _MARGIN + 3, bottom - _GAP - 1), choice.colour)
        pen.text((_MARGIN + 14, top + 14), choice.title, choice.colour, self.fonts["text"], "ls")
        for index, (score, row) in enumerate(choice.rows):
            line, column = divmod(index, self.columns)
            x = _MARGIN + _SIDE + column * (_TILE + _GAP)
            y = top + line * (_TILE + self.caption + _GAP)
            pen.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), _MAT)
            self._picture(sheet, pen, row, (x, y))
            pen.rectangle((x, y, x + _TILE - 1, y + _TILE - 1), outline=_RULE)
            self._caption(pen, score, row, choice.colour, (x, y + _TILE))
        return bottom

    def _picture(
        self, sheet: Image.Image, pen: ImageDraw.ImageDraw, row: ScoredFile, corner: Box
    ) -> None:
        x, y = corner
        try:
            picture = thumbnail(Path(row.path), _TILE)
        except RewardError:  # gone or damaged since it was scored
            middle = (x + _TILE // 2, y + _TILE // 2)
            pen.text(middle, "cannot be read now", _QUIET, self.fonts["text"], anchor="mm")
            return
        sheet.paste(picture, (x + (_TILE - picture.width) // 2, y + (_TILE - picture.height) // 2))
        if is_video(Path(row.path)):
            sheet.paste(self.play, (x + 10, y + _TILE - 10 - self.play.height), self.play)

    def _caption(
        self, pen: ImageDraw.ImageDraw, score: float, row: ScoredFile, colour: str, corner: Box
    ) -> None:
        x, y = corner
        font = self.fonts["text"]
        pen.text((x, y + 24), f"{score:.4g}", colour, self.fonts["score"], anchor="ls")
        score_width = pen.textlength(f"{score:.4g}", self.fonts["score"])
        path = short_path(row.path, font, _TILE - score_width - 12)
        pen.text((x + _TILE - 1, y + 24), path, _QUIET, font, anchor="rs")
        for number, line in enumerate(self._prompt_lines(row.prompt)):
            low = y + _SCORE_LINE + 15 + _TEXT_LINE * number
            pen.text((x, low), line, _INK, font, anchor="ls")


def _play_sign(size: int) -> Image.Image:
    """A white arrow in a dark disc, RGBA; drawn large and made small, for smooth edges."""
    large = Image.new("RGBA", (4 * size, 4 * size))
    pen = ImageDraw.Draw(large)
    pen.ellipse((0, 0, 4 * size - 1, 4 * size - 1), _INK, _PAPER, width=size // 5)
    pen.polygon(
        [(1.55 * size, 1.1 * size), (1.55 * size, 2.9 * size), (3 * size, 2 * size)], _PAPER
    )
    return large.resize((size, size), Image.Resampling.LANCZOS)


def thumbnail(path: Path, size: int) -> Image.Image:
    """A picture, or the middle frame of a video, that fits in size x size pixels.

    Raises:
        RewardError: it cannot be read.
    """
    from reward_models.media import read_image, to_uint8

    if is_video(path):
        from reward_models.video.files import probe_video, read_frames

        pixels = read_frames(path, [probe_video(path).frames // 2])[0]
    else:
        pixels = read_image(path)
    picture = Image.fromarray(to_uint8(pixels).permute(1, 2, 0).numpy())
    scale = size / max(picture.size)
    box = (max(1, round(picture.width * scale)), max(1, round(picture.height * scale)))
    # Pixels of small pictures stay pixels: smoothing would hide what the reward saw.
    filtering = Image.Resampling.NEAREST if scale >= 2 else Image.Resampling.LANCZOS
    return picture.resize(box, filtering, reducing_gap=None if scale > 1 else 3.0)


def ellipsis(text: str, font: Font, room: float) -> str:
    """`text`, or as much of its beginning as fits with an ellipsis behind it."""
    if font.getlength(text) <= room:
        return text
    low, high = 0, len(text)
    while low < high:
        middle = (low + high + 1) // 2
        fits = font.getlength(f"{text[:middle].rstrip()}…") <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return f"{text[:low].rstrip()}…"


def short_path(path: str, font: Font, room: float) -> str:
    """The end of a path: as many of its last folders as fit before its name."""
    parts = Path(path).parts
    for first in range(len(parts)):
        text = "/".join(parts[first:]) if first else path
        if font.getlength(text) <= room:
            return text
    name = parts[-1] if parts else path
    return ellipsis(name[::-1], font, room)[::-1]


def wrapped(text: str, font: Font, room: float, *, lines: int) -> list[str]:
    """A text cut into lines at its blanks; the last one ends with an ellipsis if more follows."""
    done: list[str] = []
    words = text.split()
    while words and len(done) < lines - 1:
        taken = 1
        while taken < len(words) and font.getlength(" ".join(words[: taken + 1])) <= room:
            taken += 1
        done.append(ellipsis(" ".join(words[:taken]), font, room))
        words = words[taken:]
    if words:
        done.append(ellipsis(" ".join(words), font, room))
    return done
