"""Weights & Biases: one run that every sitting continues, by its id.

W&B drops whatever is logged at a step lower than its last, which a resumed run would do: it repeats
the steps between its checkpoint and its end. So W&B's own step counts calls, and `step` is a metric
that all others are drawn over. Repeated steps appear twice at one place of the curve (as equal
numbers, where the run is deterministic); W&B offers no way to remove them. metrics.jsonl has them
once.

W&B would also keep the command line, the console's output, the code and the packages of the
process. All of these may carry secrets past the redactor and are switched off.

Source: https://docs.wandb.ai/guides/track/log/customize-logging-axes,
https://docs.wandb.ai/guides/runs/resuming.
"""

from __future__ import annotations

from collections.abc import Sequence
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


class WandbTracker:
    """A run of W&B. `WANDB_MODE=offline` keeps it in the run folder until `wandb sync`."""

    def __init__(self, sitting: Sitting) -> None:
        self._wandb = wandb = tracker_package("wandb", extra="wandb")
        try:
            self._run: Any = wandb.init(
                project=PROJECT,
                name=sitting.folder.name,
                dir=str(sitting.folder),
                id=sitting.run_id,
                resume="allow",
                config=sitting.described,
                settings=wandb.Settings(
                    console="off",
                    disable_code=True,
                    disable_git=True,
                    x_disable_meta=True,
                    x_disable_machine_info=True,
                    x_save_requirements=False,
                ),
            )
        except Exception as error:  # its own, or pydantic's of a setting in the environment
            raise UserError(
                f"W&B did not begin: {error}",
                where="train.trackers",
                fix="log in (wandb login, or WANDB_API_KEY in the environment), or set "
                "WANDB_MODE=offline;\nlook at the other WANDB_... variables too",
            ) from error
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @property
    def run_id(self) -> str:
        """W&B's id of the run."""
        return str(self._run.id)

    def log(self, row: Row) -> None:
        """The numbers, `step` among them."""
        self._run.log(finite(row))

    def pictures(self, step: int, pictures: Sequence[Picture]) -> None:
        """Each with its caption, under its own name."""
        media: dict[str, Any] = {
            picture.name: self._wandb.Image(str(picture.path), caption=picture.caption or None)
            for picture in pictures
        }
        if media:
            self._run.log({"step": step, **media})

    def close(self) -> None:
        """Send what is waiting and end the sitting."""
        self._run.finish()
