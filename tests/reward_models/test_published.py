"""Published scores beside ours: found, compared, and honestly absent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import typer
from typer.testing import CliRunner

from diffusion_align.commands.doctor import doctor
from reward_models import published as checks
from reward_models.base import Scores
from reward_models.catalogue import find
from reward_models.published import (
    PUBLISHED,
    check_published,
    contradicted,
    library_versions,
)
from reward_models.weights import sha256_of


class Constant:
    """A reward that gives every picture one score."""

    def __init__(self, value: float) -> None:
        self.value = value
        self.asked: list[tuple[torch.Size, list[str]]] = []

    def score(self, media: torch.Tensor, prompts: list[str], **_: Any) -> Scores:
        self.asked.append((media.shape, list(prompts)))
        return Scores(torch.full((len(media),), self.value))


def test_without_weights_every_finding_names_the_command_that_fetches_them() -> None:
    findings = list(check_published())
    assert len(findings) == len(PUBLISHED)
    for finding in findings:
        assert finding.value is None and finding.agrees is None
        name = {"hpsv2": "HPS_v2_compressed.pt", "hpsv2.1": "HPS_v2.1_compressed.pt"}
        assert f"hf download xswu/HPSv2 {name[finding.published.reward]}" in finding.problem


@pytest.mark.parametrize(("value", "agrees"), [(0.2876, True), (0.2866, True), (0.2806, False)])
def test_our_score_of_the_real_picture_is_held_against_the_published_one(  # type: ignore[no-untyped-def]
    published, monkeypatch: pytest.MonkeyPatch, value: float, agrees: bool
) -> None:
    picture: Path = published("images/hps_demo.jpg")
    reward = Constant(value)
    asked: list[dict[str, object]] = []
    installed = SimpleNamespace(installed=True, files=find("hpsv2").files)
    monkeypatch.setattr(checks, "find", lambda name: installed)
    monkeypatch.setattr(checks, "load", lambda name, **how: asked.append(how["settings"]) or reward)  # type: ignore[func-returns-value]
    findings = list(check_published(picture=picture))
    known = [f for f in findings if f.published.value is not None]
    assert [f.agrees for f in known] == [agrees] * 2
    assert [f.agrees for f in findings if f.published.value is None] == [None]
    assert contradicted(findings) == ([] if agrees else ["hpsv2"])
    assert asked == [{"antialias": True}, {"antialias": False}, {}]
    shape, prompts = reward.asked[0]
    assert shape[:2] == (1, 3) and prompts == ["A cat with two horns on its head"]


@pytest.mark.parametrize(
    ("smooth", "rough", "code"), [(0.2876, 0.31, 0), (0.25, 0.2879, 0), (0.25, 0.31, 1)]
)
def test_the_figure_need_come_out_in_one_setting_only(  # type: ignore[no-untyped-def]
    published, monkeypatch: pytest.MonkeyPatch, smooth: float, rough: float, code: int
) -> None:
    """Of a scorer that depends on the setting, both scores are printed; one of them may differ."""
    cli = typer.Typer()
    cli.command()(doctor)
    installed = SimpleNamespace(installed=True, files=find("hpsv2").files)
    monkeypatch.setattr(checks, "find", lambda name: installed)

    def load(name: str, *, settings: dict[str, object], **_: Any) -> Constant:
        return Constant(smooth if settings.get("antialias", True) else rough)

    monkeypatch.setattr(checks, "load", load)
    picture = str(published("images/hps_demo.jpg"))
    done = CliRunner().invoke(cli, ["--rewards", "--picture", picture, "--device", "cpu"])
    assert done.exit_code == code, done.output
    assert f"antialias=True: published 0.2876, ours {smooth:.4f}" in done.output
    assert f"antialias=False: published 0.2876, ours {rough:.4f}" in done.output
    assert ("WRONG in every setting: hpsv2" in done.output) == bool(code)


def test_what_could_not_be_scored_contradicts_nothing() -> None:
    assert contradicted(check_published()) == []


def test_another_picture_of_that_name_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    picture = tmp_path / "hps_demo.jpg"
    picture.write_bytes(b"not the picture")
    monkeypatch.setattr(checks, "find", lambda name: replace(find(name), weights=None, tower=""))
    for finding in check_published(picture=picture):
        assert finding.value is None and "hps_demo.jpg" in finding.problem


def test_the_demo_picture_is_the_one_whose_sum_is_known(published) -> None:  # type: ignore[no-untyped-def]
    picture = published("images/hps_demo.jpg")
    assert sha256_of(picture) == PUBLISHED[0].picture.sha256


def test_versions_of_what_a_score_depends_on_are_told() -> None:
    assert library_versions()["torch"] in (torch.__version__, torch.__version__.partition("+")[0])
