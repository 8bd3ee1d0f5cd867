"""trackio: a local dashboard without an account (`trackio show --project diffusion-align`).

A run is found again by its name, which therefore carries a few random letters. trackio keeps every
row that it is given: the steps that a resumed run repeats appear twice, at the same step.

Source: https://huggingface.co/docs/trackio, `trackio.init(resume="allow")`.
"""

from __future__ import annotations

import sys
import uuid
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

from diffusion_align.errors import UserError
from diffusion_align.reporting.trackers.base import (
    PROJECT,
    Picture,
    Row,
    Sitting,
    finite,
    tracker_package,
)


class TrackioTracker:
    """A run of trackio, in the folder that `TRACKIO_DIR` names (default: Hugging Face's cache)."""

    def __init__(self, sitting: Sitting) -> None:
        self._trackio = trackio = tracker_package("trackio", extra="trackio")
        _require_writable(trackio)
        name = sitting.run_id or f"{sitting.folder.name}-{uuid.uuid4().hex[:6]}"
        with redirect_stdout(sys.stderr):  # stdout is for results
            self._run: Any = trackio.init(
                project=PROJECT,
                name=name,
                resume="allow",
                config=sitting.described,
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )
        self._name = name

    @property
    def run_id(self) -> str:
        """The run's name."""
        return self._name

    def log(self, row: Row) -> None:
        """The numbers, at their step."""
        numbers = {name: value for name, value in finite(row).items() if name != "step"}
        self._run.log(numbers, step=int(row["step"]))

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Each with its caption, under its own name."""
        media = {
            picture.name: self._trackio.Image(str(picture.path), caption=picture.caption or None)
            for picture in pictures
        }
        if media:
            self._run.log(media, step=step)

    def close(self) -> None:
        """Write what is waiting."""
        with redirect_stdout(sys.stderr):
            self._trackio.finish()  # the run's own finish would be called again at exit


def _require_writable(trackio: Any) -> None:
    """trackio keeps its own errors to itself: without this check every row could be lost unseen."""
    place = getattr(getattr(trackio, "utils", None), "TRACKIO_DIR", None)
    if place is None:
        return
    try:
        Path(place).mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise UserError(
            f"trackio cannot write there ({error.strerror})",
            where=str(place),
            fix="set TRACKIO_DIR to a folder that can be written",
        ) from error
