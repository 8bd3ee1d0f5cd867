"""The report: one offline page, safe with any prompt, within its size."""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from diffusion_align.data.prompts import Prompt
from diffusion_align.evaluation.charts import histogram, interval_plot
from diffusion_align.evaluation.comparison import Comparison, Result
from diffusion_align.evaluation.report import number, render_report, write_report

Make = Callable[..., Comparison]
NASTY = "<script>alert(1)</script> \"><img src=x onerror=alert(2)> {{ 7*7 }} & 'quote'"


class Page(HTMLParser):
    """Tags with their attributes, scripts, text, and rows, as a browser would read them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._in_script = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._in_script = tag == "script"

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        (self.scripts if self._in_script else self.text).append(data)

    def all(self, tag: str) -> list[dict[str, Any]]:
        return [attributes for name, attributes in self.tags if name == tag]


def tables(count: int = 24, seeds: int = 2, gain: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    base = rng.normal(5, 1, (count, seeds))
    return base, base + gain + rng.normal(0, 0.3, (count, seeds))


def test_a_prompt_is_text_and_never_markup(make_comparison: Make) -> None:
    found = make_comparison({"light": tables()}, prompts=[Prompt(NASTY, negative=NASTY)])
    page = Page(render_report(found))
    assert len(page.scripts) == 1
    assert "alert(1)" not in page.scripts[0]
    assert all(image.get("src") != "x" for image in page.all("img"))
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert NASTY in page.text  # shown as it was written, braces included
    assert NASTY in [row.get("data-prompt") for row in page.all("tr")]


def test_names_of_rewards_and_folders_are_escaped_too(make_comparison: Make) -> None:
    name = "<i>my/file.py:Reward</i>"
    found = make_comparison({name: tables()}, trained_on=[name])
    page = Page(render_report(replace(found, setup=replace(found.setup, tuned="<i>runs"))))
    assert not page.all("i")
    assert name in " ".join(page.text)
    assert "<i>runs" in page.text


def test_nothing_is_fetched_and_only_the_pages_own_script_may_run(make_comparison: Make) -> None:
    text = render_report(make_comparison({"light": tables()}))
    page = Page(text)
    assert not page.all("link")
    assert not re.search(r"https?://|\bfetch\(|XMLHttpRequest|@import|url\(", text)
    assert all("src" not in script and "type" not in script for script in page.all("script"))
    assert all(image["src"].startswith("data:") for image in page.all("img") if "src" in image)

    policy = next(m["content"] for m in page.all("meta") if "http-equiv" in m)
    digest = hashlib.sha256(page.scripts[0].encode()).digest()
    assert f"script-src 'sha256-{base64.b64encode(digest).decode()}'" in policy
    assert "default-src 'none'" in policy


def test_the_verdict_and_the_setup_are_in_the_header(make_comparison: Make) -> None:
    found = make_comparison({"light": tables()}, trained_on=["light"])
    text = " ".join(Page(render_report(found)).text)
    assert found.headline in text
    assert "Better: the whole 95 % interval lies above zero." in text
    assert "trained on" in text
    for fact in ("fake", "DDIM (eta 0)", "8 × 8", "runs/x"):
        assert fact in text


def test_alarms_and_notes_are_shown(make_comparison: Make) -> None:
    base, tuned = tables()
    found = make_comparison({"won": (base, tuned), "lost": (base, base - 1)}, trained_on=["won"])
    text = " ".join(Page(render_report(found)).text)
    assert "Possible overfitting to the reward" in text
    assert found.alarms[0] in text
    few = make_comparison({"won": tables(3)})
    assert "Only 3 prompts" in " ".join(Page(render_report(few)).text)


def test_rows_start_with_the_worst_regression_and_end_with_the_unscored(
    make_comparison: Make,
) -> None:
    base = np.zeros((4, 2))
    tuned = np.array([[1.0, 1.0], [np.nan, np.nan], [-2.0, -1.0], [0.5, 0.0]])
    found = make_comparison({"light": (base, tuned)}, prompts=["up", "none", "down", "some"])
    rows = [r["data-prompt"] for r in Page(render_report(found)).all("tr") if "data-prompt" in r]
    assert rows == ["down", "some", "up", "none"]


def test_pictures_beyond_the_budget_are_files_beside_the_page(make_comparison: Make) -> None:
    found = make_comparison({"light": tables(6, 2)})
    page = Page(render_report(found, budget=1500))
    sources = [image["src"] for image in page.all("img") if "src" in image]
    inlined = [source for source in sources if source.startswith("data:image/png")]
    beside = [source for source in sources if source not in inlined]
    assert inlined and beside
    assert sum(map(len, inlined)) <= 1500
    assert all((found.folder / source).is_file() for source in beside)
    assert f"{len(beside)} pictures lie in the folder" in " ".join(page.text)


def test_large_pictures_are_inlined_small_and_linked_in_full(make_comparison: Make) -> None:
    found = make_comparison({"light": tables(1, 1)}, side=400)
    page = Page(render_report(found))
    pair = next(button for button in page.all("button") if button.get("class") == "pair")
    assert pair["data-base-full"] == "pictures/base/p0000_s00.png"
    assert page.all("img")[0]["src"].startswith("data:image/jpeg")


def test_a_comparison_without_any_score_still_has_a_report(make_comparison: Make) -> None:
    nothing = np.full((2, 2), np.nan)
    found = make_comparison({"light": (nothing, nothing)})
    write_report(found)
    text = (found.folder / "report.html").read_text(encoding="utf-8")
    assert "light: no pair could be scored" in text
    assert "nan" not in " ".join(Page(text).text).lower()
    assert '"ci95": [\n        null,' in (found.folder / "summary.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(("count", "seeds"), [(1, 1), (1, 3), (30, 1)])
def test_all_files_are_written_for_few_prompts_or_seeds(
    make_comparison: Make, count: int, seeds: int
) -> None:
    found = make_comparison({"light": tables(count, seeds)})
    write_report(found)
    written = {path.name for path in found.folder.iterdir() if path.is_file()}
    assert written == {"report.html", "scores.csv", "summary.json", "grid.png"}


def test_a_histogram_counts_every_pair_once_and_keeps_ties_in_the_middle() -> None:
    differences = np.array([[-1.0, 0.0, 0.0, 0.0, 2.0, 0.5, np.nan, 0.5]]).T
    base = np.zeros_like(differences)
    chart = histogram(Result("light", "held-out", "", base, differences))
    assert chart is not None
    assert sum(bar.count for bar in chart.bars) == 7
    assert [(bar.side, bar.count) for bar in chart.bars if bar.side == "even"] == [("even", 3)]
    assert sum(bar.count for bar in chart.bars if bar.side == "up") == 3
    assert all(bar.x >= 0 and bar.x + bar.width <= 100 + 1e-9 for bar in chart.bars)


def test_nothing_to_draw_gives_no_chart() -> None:
    zeros = np.zeros((3, 2))
    assert histogram(Result("light", "held-out", "", zeros, zeros)) is None
    assert interval_plot([Result("light", "held-out", "", zeros, zeros)]).marks == (None,)


def test_interval_marks_share_one_axis_with_zero_in_the_middle() -> None:
    base, up = tables(gain=0.5)
    plot = interval_plot(
        [Result("a", "held-out", "", base, up), Result("b", "held-out", "", base, 2 * base - up)]
    )
    first, second = plot.marks
    assert first is not None and second is not None
    assert (first.side, second.side) == ("up", "down")
    assert 0 <= second.low < second.point < second.high < 50 < first.low < first.high <= 100
    assert first.point - 50 == pytest.approx(50 - second.point)


def test_numbers_for_people() -> None:
    assert number(-1.25, 1) == "−1.2"
    assert number(0.5, 2, signed=True) == "+0.50"
    assert number(-0.0004, 2, signed=True) == "0.00"
    assert number(float("nan"), 2) == "–"
