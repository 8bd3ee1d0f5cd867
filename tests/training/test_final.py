"""`final/`: new weights take no earlier report away, and equal ones change nothing."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from diffusion_align.errors import UserError
from diffusion_align.training.final import write_final


def weights(value: float, metadata: dict[str, str] | None = None) -> Callable[[Path], None]:
    def save(folder: Path) -> None:
        (folder / "unet").mkdir()
        save_file({"w": torch.full((2,), value)}, folder / "unet" / "w.safetensors", metadata)
        (folder / "config.json").write_text("{}")

    return save


def files(folder: Path) -> set[str]:
    return {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}


WEIGHTS = {"config.json", "unet/w.safetensors"}


def test_a_report_goes_aside_with_its_weights(tmp_path: Path) -> None:
    final, said = tmp_path / "final", list[str]()
    for number in range(1, 4):
        write_final(final, weights(number), said.append)
        assert files(final) == WEIGHTS
        (final / "report.html").write_text(f"report {number}")
    assert (tmp_path / "final.old-1" / "report.html").read_text() == "report 1"
    assert (tmp_path / "final.old-2" / "report.html").read_text() == "report 2"
    assert files(tmp_path / "final.old-2") == {*WEIGHTS, "report.html"}
    assert len(said) == 2 and str(tmp_path / "final.old-2") in said[1]


def test_plain_weights_are_replaced(tmp_path: Path) -> None:
    final, said = tmp_path / "final", list[str]()
    for number in (1, 2):
        write_final(final, weights(number), said.append)
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and said == []


def test_equal_weights_leave_everything_untouched(tmp_path: Path) -> None:
    final, said = tmp_path / "final", list[str]()
    write_final(final, weights(1.0), said.append)
    (final / "report.html").write_text("report")
    before = {p: os.stat(p).st_mtime_ns for p in [final, *final.rglob("*")]}
    write_final(final, weights(1.0, {"order": "of metadata"}), said.append)
    assert {p: os.stat(p).st_mtime_ns for p in [final, *final.rglob("*")]} == before
    assert [path.name for path in tmp_path.iterdir()] == ["final"] and said == []


def test_damaged_weights_are_not_the_same(tmp_path: Path) -> None:
    final = tmp_path / "final"
    write_final(final, weights(1.0), lambda text: None)
    (final / "unet" / "w.safetensors").write_bytes(b"cut")
    write_final(final, weights(1.0), lambda text: None)
    assert files(final) == WEIGHTS
    assert len((final / "unet" / "w.safetensors").read_bytes()) > 3


def test_a_failed_write_leaves_the_earlier_one(tmp_path: Path) -> None:
    final = tmp_path / "final"
    write_final(final, weights(1.0), lambda text: None)
    (final / "report.html").write_text("report")

    def full(folder: Path) -> None:
        weights(2.0)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        write_final(final, full, lambda text: None)
    assert files(final) == {*WEIGHTS, "report.html"}
    assert [path.name for path in tmp_path.iterdir()] == ["final"]
