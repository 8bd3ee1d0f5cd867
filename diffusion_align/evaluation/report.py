"""`report.html`: the whole comparison in one file that opens from disk, without a network.

The page is rendered with autoescape on, because prompts are untrusted text; as a second lock its
content security policy allows no script but the page's own, by hash, and no connection at all.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffusion_align.evaluation.charts import SIDES, histogram, interval_plot
from diffusion_align.evaluation.comparison import Comparison, Result, Side, picture_name
from diffusion_align.evaluation.exports import write_grid, write_scores, write_summary, write_text
from diffusion_align.evaluation.statistics import decimals, outcome
from diffusion_align.evaluation.thumbnails import INLINE_BUDGET, Thumbnail, Thumbnails

FOLDER = Path(__file__).resolve().parent
NONE = "–"


@dataclass(frozen=True)
class Tile:
    """One pair of pictures of a prompt; `base_scores` and `tuned_scores` are captions."""

    seed: int
    base: Thumbnail
    tuned: Thumbnail
    base_scores: str
    tuned_scores: str


@dataclass(frozen=True)
class Row:
    """One prompt: its place in the list, mean differences by column, and its pairs."""

    index: int
    prompt: str
    negative: str
    differences: tuple[float, ...]
    tiles: tuple[Tile, ...]


def write_report(comparison: Comparison, *, budget: int = INLINE_BUDGET) -> Path:
    """Write `report.html`, `scores.csv`, `summary.json` and `grid.png`; returns the first.

    Args:
        comparison: with its pictures already in `comparison.folder`.
        budget: characters of inlined pictures; the rest are linked as files beside the report.

    Raises:
        UserError: a file cannot be written.
    """
    write_scores(comparison)
    write_grid(comparison)
    path = write_text(comparison.folder / "report.html", render_report(comparison, budget=budget))
    # Last: a folder with a summary holds a whole comparison.
    write_summary(comparison)
    return path


def render_report(comparison: Comparison, *, budget: int = INLINE_BUDGET) -> str:
    """The page as text."""
    shown = [result for result in comparison.results if not result.part_of]
    thumbnails = Thumbnails(comparison.folder, budget)
    rows = _rows(comparison, shown, thumbnails)
    script = _source("report.js.j2")
    digest = base64.b64encode(hashlib.sha256(script.encode("utf-8")).digest()).decode("ascii")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            comparison=comparison,
            setup=comparison.setup,
            plot=interval_plot(comparison.results),
            histograms=[(result, histogram(result)) for result in shown],
            columns=shown,
            column_digits=[decimals(result.paired) for result in shown],
            rows=rows,
            sides=SIDES,
            beside=thumbnails.beside,
            smooth=max(comparison.setup.height, comparison.setup.width) > 128,
            style=Markup(_source("report.css.j2")),
            script=Markup(script),
            script_hash=digest,
            made=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        )
    )


def _rows(comparison: Comparison, shown: Sequence[Result], thumbnails: Thumbnails) -> list[Row]:
    """All prompts, the worst regression of the first reward on top; unscored prompts last."""
    differences = [
        tuple(result.prompt_difference(p) for result in shown)
        for p in range(len(comparison.prompts))
    ]
    order = sorted(
        range(len(differences)),
        key=lambda p: (math.isnan(differences[p][0]), differences[p][0], p),
    )
    # In this order, so that a budget too small for all pictures is spent on the first rows.
    return [
        Row(
            index=p,
            prompt=comparison.prompts[p].text,
            negative=comparison.prompts[p].negative,
            differences=differences[p],
            tiles=tuple(
                Tile(
                    seed=s,
                    base=thumbnails.of(picture_name("base", p, s)),
                    tuned=thumbnails.of(picture_name("tuned", p, s)),
                    base_scores=_caption(shown, "base", p, s),
                    tuned_scores=_caption(shown, "tuned", p, s),
                )
                for s in range(comparison.setup.seeds)
            ),
        )
        for p in order
    ]


def _caption(shown: Sequence[Result], side: Side, prompt: int, seed: int) -> str:
    """The scores of one picture, `tiny-aesthetic 5.31 · verifier 0.75`."""
    pieces = []
    for result in shown:
        if result.role != "diversity":
            table = result.base if side == "base" else result.tuned
            value = number(table[prompt, seed], decimals(result.paired))
            pieces.append(f"{result.name} {value}")
    return " · ".join(pieces)


def number(value: float, digits: int, signed: bool = False) -> str:
    """A number for people: a true minus sign, no negative zero, a dash for none."""
    if not np.isfinite(value):
        return NONE
    text = f"{value:{'+' if signed else ''}.{digits}f}"
    if float(text) == 0:
        text = text.lstrip("+-")
    return text.replace("-", "−")


def percent(value: float) -> str:
    """A share in [0, 1] as whole percent without its sign, or a dash."""
    return f"{100 * value:.0f}" if np.isfinite(value) else NONE


def decimals_of(value: float) -> int:
    """How many decimals show two figures of `value`, none for whole numbers."""
    if value <= 0 or float(value).is_integer():
        return 0
    return max(0, 1 - math.floor(math.log10(value)))


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    environment.filters["percent"] = percent
    environment.filters["outcome"] = outcome
    environment.filters["decimals"] = decimals
    environment.globals["decimals_of"] = decimals_of
    return environment


@cache
def _source(name: str) -> str:
    """A style sheet or script as it stands (the two hold no template code)."""
    return (FOLDER / name).read_text(encoding="utf-8")
