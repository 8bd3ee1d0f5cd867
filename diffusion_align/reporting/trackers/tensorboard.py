"""TensorBoard: scalars, pictures and the config in `<run>/tensorboard`.

A resumed run writes another event file that begins by purging whatever was logged past its
checkpoint (`purge_step`), so the curves are those of one uninterrupted run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from diffusion_align.reporting.trackers.base import Picture, Row, Sitting, finite, tracker_package

FLUSH_SECONDS = 10


class TensorBoardTracker:
    """Writes event files; the run folder alone identifies the run."""

    run_id = None

    def __init__(self, sitting: Sitting) -> None:
        package = tracker_package("torch.utils.tensorboard", extra="tensorboard")
        folder = sitting.folder / "tensorboard"
        # TensorBoard drops what has this step or a later one; the checkpoint's own step stays.
        purge = sitting.step + 1 if folder.exists() and sitting.step else None
        if folder.exists() and not sitting.step:
            purge = 0  # no checkpoint was made yet: the run begins anew
        self._writer = package.SummaryWriter(
            str(folder), purge_step=purge, flush_secs=FLUSH_SECONDS
        )
        self._text("config", sitting.config, sitting.step)
        self._text("environment", sitting.environment, sitting.step)

    def log(self, row: Row) -> None:
        """Every number under its own name."""
        for name, value in finite(row).items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Each under `samples/`; TensorBoard's pictures have no captions, so these are a table."""
        for picture in pictures:
            with Image.open(picture.path) as image:
                pixels = np.asarray(image.convert("RGB"))
            self._writer.add_image(picture.name, pixels, step, dataformats="HWC")
        rows = [f"| {p.name} | {_cell(p.caption)} |" for p in pictures if p.caption]
        if rows:
            table = "\n".join(["| picture | caption |", "|---|---|", *rows])
            self._writer.add_text("samples/captions", table, step)

    def close(self) -> None:
        """Write what is waiting and close the file."""
        self._writer.close()

    def _text(self, name: str, content: Mapping[str, Any], step: int) -> None:
        if content:
            lines = json.dumps(content, indent=2, ensure_ascii=False, default=str).splitlines()
            # Four spaces make it code for TensorBoard's Markdown.
            self._writer.add_text(name, "\n".join(f"    {line}" for line in lines), step)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
