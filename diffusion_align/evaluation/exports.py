"""The files of a comparison that other programs read, and the grid for a quick look."""

from __future__ import annotations

import csv
import io
import json
import os
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion_align.data.images import save_grid
from diffusion_align.errors import UserError
from diffusion_align.evaluation.comparison import Comparison, Side
from diffusion_align.secrecy.redaction import redact, redact_value

GRID_PROMPTS = 8
GRID_SEEDS = 3

COLUMNS = (
    "prompt_index",
    "prompt",
    "seed",
    "reward",
    "role",
    "base",
    "tuned",
    "difference",
    "base_picture",
    "tuned_picture",
)


def write_text(path: Path, text: str) -> Path:
    """Write UTF-8 text whole or not at all, without secrets.

    Raises:
        UserError: naming a file that cannot be written.
    """
    text = redact(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        temporary = Path(name)
        try:
            with os.fdopen(handle, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            temporary.chmod(0o644)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write this file ({error.strerror})", where=str(path)) from error
    return path


def write_summary(comparison: Comparison) -> Path:
    """`summary.json`: one entry per reward, part of a reward (`name/part`) and diversity."""
    summary = redact_value(comparison.summary())
    text = json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False)
    return write_text(comparison.folder / "summary.json", text + "\n")


def write_scores(comparison: Comparison) -> Path:
    """`scores.csv`: one row per reward and pair; a score that does not exist is an empty cell.

    A text that a spreadsheet would run as a formula (it begins with = + - or @) gets a `'` before
    it. Diversity belongs to a prompt, not to a picture: its rows have no seed and no pictures.
    """
    buffer = io.StringIO()
    table = csv.writer(buffer)
    table.writerow(COLUMNS)
    for result in comparison.results:
        for p, prompt in enumerate(comparison.prompts):
            for s, (base, tuned) in enumerate(zip(result.base[p], result.tuned[p], strict=True)):
                of_picture = result.role != "diversity"
                table.writerow(
                    [
                        p,
                        _text(redact(prompt.text)),
                        s if of_picture else "",
                        _text(redact(result.name)),
                        result.role,
                        *(_cell(value) for value in (base, tuned, tuned - base)),
                        *(
                            _picture(comparison, side, p, s) if of_picture else ""
                            for side in _SIDES
                        ),
                    ]
                )
    return write_text(comparison.folder / "scores.csv", buffer.getvalue())


_SIDES: tuple[Side, Side] = ("base", "tuned")


def _picture(comparison: Comparison, side: Side, prompt: int, seed: int) -> str:
    return comparison.picture(side, prompt, seed).relative_to(comparison.folder).as_posix()


def _text(words: str) -> str:
    """`words`, which a spreadsheet takes for text: it would run `=HYPERLINK(...)` as a formula."""
    return f"'{words}" if words.startswith(("=", "+", "-", "@", "\t", "\r", "\n")) else words


def _cell(value: float) -> str:
    return repr(float(value)) if np.isfinite(value) else ""


def write_grid(comparison: Comparison) -> Path:
    """`grid.png`: the first prompts of the list, not the best ones, base beside tuned."""
    prompts = comparison.prompts[:GRID_PROMPTS]
    seeds = min(GRID_SEEDS, comparison.setup.seeds)
    rows = [
        [_pixels(comparison.picture(side, p, s)) for s in range(seeds) for side in _SIDES]
        for p in range(len(prompts))
    ]
    return save_grid(
        comparison.folder / "grid.png",
        rows,
        row_labels=[redact(prompt.text) for prompt in prompts],
        column_labels=list(_SIDES) * seeds,
        title=redact(comparison.headline),
        gap_before=range(2, 2 * seeds, 2),
    )


def _pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
