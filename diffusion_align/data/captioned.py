"""Pictures with captions, to fit a model to: a folder, a table, or the small world.

    pictures/                    pictures and their captions, in one of two ways:
        a.png  a.txt                 a text file of the same name beside each picture, or
        metadata.jsonl               one table with the columns path (file_name ...) and prompt
                                     (caption, text ...), as `sample` writes it (prompts.jsonl)
    pictures.jsonl               such a table (.jsonl, .csv, .parquet); paths count from its folder
    small-world, small-world:N   N captions never held out, drawn by code

Everything is looked at before a picture is decoded, and every problem is reported at once. Pictures
are read when they are needed, so that a large set costs nothing at the start.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from diffusion_align.data.prompts import SHOWN_PROBLEMS, decode_text, load_prompts
from diffusion_align.errors import UserError

SMALL_WORLD = "small-world"


@dataclass(frozen=True)
class Captioned:
    """N pictures with their captions.

    Attributes:
        name: what was asked for.
        captions: N texts.
        files: N pictures; None where the small world draws them.
    """

    name: str
    captions: tuple[str, ...]
    files: tuple[Path, ...] | None = None

    def __len__(self) -> int:
        return len(self.captions)

    def pixels(self, index: int, height: int, width: int) -> Tensor:
        """One picture: float32 [3, height, width] in [0, 1], see `cover`.

        Raises:
            RewardError: the file is missing or damaged; it is named.
        """
        if self.files is None:
            return cover(_drawn(self.captions[index], index, max(height, width)), height, width)
        from reward_models.media import read_image

        return cover(read_image(self.files[index]), height, width)

    @property
    def fingerprint(self) -> str:
        """Of captions, names and sizes of the files, and their order; not of where they lie."""
        files = [] if self.files is None else [[f.name, f.stat().st_size] for f in self.files]
        text = json.dumps([list(self.captions), files])
        return hashlib.sha256(text.encode()).hexdigest()


def read_captioned(source: str | Path) -> Captioned:
    """What `source` holds: see the top of this file.

    Raises:
        UserError: nothing of that name, pictures without a caption or captions without a picture
            (all of them), several tables in a folder, videos.
        RewardError: rows of a table that cannot be used, with their lines.
    """
    name = str(source)
    if name.partition(":")[0] == SMALL_WORLD:
        prompts = load_prompts(name)
        if name.startswith(f"{SMALL_WORLD}:heldout"):
            raise UserError(
                "these captions are held out: nothing is fitted to them",
                where=name,
                fix="write small-world or small-world:N",
            )
        return Captioned(name, tuple(prompt.text for prompt in prompts))
    path = Path(source).expanduser()
    if path.is_dir():
        table = _table_in(path)
        return _from_table(name, table) if table else _from_folder(name, path)
    if not path.is_file():
        raise UserError(
            "no such folder or table of pictures",
            where=name,
            fix="give a folder of pictures, a .jsonl, .csv or .parquet table, or small-world",
        )
    return _from_table(name, path)


def cover(picture: Tensor, height: int, width: int) -> Tensor:
    """A picture scaled until it just covers height x width, and its middle cut out.

    Scaling is bicubic, with antialiasing where it shrinks; a picture of that size stays as it is.

    Args:
        picture: float32 [3, h, w] in [0, 1].

    Returns:
        float32 [3, height, width] in [0, 1].
    """
    own_height, own_width = picture.shape[-2:]
    scale = max(height / own_height, width / own_width)
    size = max(height, round(own_height * scale)), max(width, round(own_width * scale))
    if size != (own_height, own_width):
        picture = functional.interpolate(picture[None], size=size, mode="bicubic", antialias=True)[
            0
        ].clamp(0.0, 1.0)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    return picture[:, top : top + height, left : left + width]


def _drawn(caption: str, index: int, size: int) -> Tensor:
    """One scene of a caption, the same whenever it is drawn: float32 [3, size, size]."""
    from reward_models.small_world import parse_caption, random_scene, render

    rng = np.random.default_rng(np.random.Philox(key=index))
    return torch.from_numpy(render(random_scene(parse_caption(caption), rng), size))


def _table_in(folder: Path) -> Path | None:
    from reward_models.table_files import TABLE_SUFFIXES

    tables = sorted(
        path
        for path in folder.iterdir()
        if path.suffix.lower() in TABLE_SUFFIXES and not path.name.startswith(".")
    )
    if len(tables) > 1:
        raise UserError(
            f"which table has the captions? {', '.join(path.name for path in tables)}",
            where=str(folder),
            fix="give the table itself",
        )
    return tables[0] if tables else None


def _from_table(name: str, table: Path) -> Captioned:
    from reward_models.inputs import find_items
    from reward_models.table_files import kind_of

    if not kind_of(table):
        raise UserError(
            "this is no table of pictures", where=str(table), fix="use .jsonl, .csv or .parquet"
        )
    items = find_items([table])
    problems = [
        f"{item.where}: {what}" for item in items if (what := _fault(item.path, item.prompt))
    ]
    _refuse(problems, str(table), "rows that cannot be learnt from")
    return Captioned(
        name, tuple(str(item.prompt) for item in items), tuple(item.path for item in items)
    )


def _from_folder(name: str, folder: Path) -> Captioned:
    from reward_models.inputs import find_images

    files = find_images([folder])
    captions = [_beside(file) for file in files]
    problems = [
        f"{file.relative_to(folder)}: {what}"
        for file, caption in zip(files, captions, strict=True)
        if (what := _fault(file, caption))
    ]
    _refuse(problems, str(folder), "pictures without a caption (a .txt of the same name)")
    return Captioned(name, tuple(map(str, captions)), tuple(files))


def _beside(picture: Path) -> str | None:
    text = picture.with_suffix(".txt")
    if not text.is_file():
        return None
    return " ".join(decode_text(text.read_bytes(), str(text)).split())


def _fault(picture: Path, caption: str | None) -> str:
    from reward_models.inputs import is_video

    if is_video(picture):
        return "a video, not a picture"
    if not picture.is_file():
        return f"no such file: {picture}"
    if caption is None or not caption.strip():
        return "no caption"
    return ""


def _refuse(problems: Sequence[str], where: str, what: str) -> None:
    if not problems:
        return
    shown = list(problems[:SHOWN_PROBLEMS])
    if len(problems) > SHOWN_PROBLEMS:
        shown.append(f"... and {len(problems) - SHOWN_PROBLEMS} more")
    raise UserError(f"{what} ({len(problems)})", where=where, fix="\n".join(shown))
