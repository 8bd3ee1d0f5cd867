"""Opens the trackers of a run and feeds them; each run keeps what its trackers call it.

`trackers.json` in the run folder holds `{"wandb": "k3v9x2a1"}`, so that a later sitting goes on
with the same runs. A checkpoint may hold the same: the folder's word counts, the checkpoint's fills
gaps.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml

from diffusion_align.errors import UserError, did_you_mean
from diffusion_align.reporting.trackers.base import Picture, Row, Sitting, Tracker
from diffusion_align.reporting.trackers.jsonl import JsonlTracker
from diffusion_align.secrecy.redaction import redact, redact_value

REMEMBERED = "trackers.json"
CAPTIONS = "prompts.jsonl"

_TRACKERS = {
    "tensorboard": "tensorboard:TensorBoardTracker",
    "wandb": "wandb:WandbTracker",
    "trackio": "trackio:TrackioTracker",
}


class Trackers:
    """metrics.jsonl and the trackers that were asked for.

    A tracker that fails on the way is told to `say`, closed and left out: a run does not die of its
    dashboard. metrics.jsonl is no dashboard: where it cannot be written, the run stops.
    """

    def __init__(
        self,
        always: Tracker,
        others: Mapping[str, Tracker],
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._always, self._others, self._say = always, dict(others), say

    @property
    def run_ids(self) -> dict[str, str]:
        """Name of a tracker -> what it calls this run."""
        known = {name: tracker.run_id for name, tracker in self._others.items()}
        return {name: run_id for name, run_id in known.items() if run_id is not None}

    def log(self, row: Row) -> None:
        """One row to all of them."""
        self._always.log(row)
        if not self._others:
            return
        clean = redact_value(row)
        self._each("take a row", lambda tracker: tracker.log(clean))

    def pictures(self, step: int, folder: Path) -> None:
        """The pictures in `folder`, with the captions of its `prompts.jsonl` where there is one."""
        if not self._others:
            return
        try:
            pictures = _pictures(folder)
        except (OSError, ValueError, KeyError, TypeError) as error:
            self._say(
                f"the trackers get no pictures of step {step}, {folder} is damaged: "
                f"{type(error).__name__}: {error}"
            )
            return
        self._each("take pictures", lambda tracker: tracker.pictures(step, pictures))

    def close(self) -> None:
        """Close all of them."""
        self._each("be closed", lambda tracker: tracker.close())
        self._others.clear()
        self._always.close()

    def _each(self, what: str, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._others.items()):
            try:
                act(tracker)
            except Exception as error:  # whatever another library raises: training goes on
                del self._others[name]
                self._say(
                    f"the tracker {name} could not {what} and is left out from here on "
                    f"(metrics.jsonl has everything): {type(error).__name__}: {error}"
                )


def open_trackers(
    names: Sequence[str],
    folder: Path,
    *,
    step: int = 0,
    run_ids: Mapping[str, str] | None = None,
    options: Mapping[str, Any] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Trackers:
    """metrics.jsonl in `folder`, and the named trackers, told of the run's config.

    Args:
        names: tensorboard, wandb, trackio.
        folder: of the run; its config.yaml, run.json and env.json are what trackers are told.
        step: optimiser steps done; rows past it that were logged already come again.
        run_ids: what trackers called this run, as a checkpoint remembers it.
        options: of the training, for a run without a config.yaml.
        say: takes a line for the person who watches.

    Raises:
        UserError: an unknown name, one whose package is not installed (with the pip command), or
            one that cannot begin.
    """
    remembered = {**(run_ids or {}), **_read(folder / REMEMBERED)}
    others: dict[str, Tracker] = {}
    if names:
        config, environment = _config(folder, options or {}), _read(folder / "env.json")
    for name in names:
        known = remembered.get(name)
        sitting = Sitting(folder, step, known, config, redact_value(environment))
        try:
            others[name] = _open(name, sitting)
        except UserError:
            for opened in others.values():
                with suppress(Exception):  # the error that ends the run matters more
                    opened.close()
            raise
        if (given := others[name].run_id) is not None:
            if known is not None:
                say(f"{name}: going on with run {given}")
            remembered[name] = given
    if remembered:
        _write(folder / REMEMBERED, remembered)
    return Trackers(JsonlTracker(folder / "metrics.jsonl"), others, say)


def _open(name: str, sitting: Sitting) -> Tracker:
    if name not in _TRACKERS:
        near = did_you_mean(name, _TRACKERS)
        fix = f"did you mean {near} ?" if near else f"known: {', '.join(sorted(_TRACKERS))}"
        raise UserError(f"unknown tracker {name!r}", where="train.trackers", fix=fix)
    module, _, kind = _TRACKERS[name].partition(":")
    build: Callable[[Sitting], Tracker] = getattr(import_module(f"{__package__}.{module}"), kind)
    try:
        return build(sitting)
    except UserError:
        raise
    except Exception as error:  # whatever another library raises where it cannot begin
        raise UserError(
            f"the tracker {name} did not begin: {type(error).__name__}: {error}",
            where="train.trackers",
            fix=f"mend what it says, or leave {name} out: metrics.jsonl is written all the same",
        ) from error


def _config(folder: Path, options: Mapping[str, Any]) -> dict[str, Any]:
    """The run's config.yaml; a run made in Python is described by its options and its run.json."""
    path = folder / "config.yaml"
    content: Any = None
    if path.is_file():
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        record = _read(folder / "run.json")
        record["prompts"] = len(record.get("prompts", []))
        content = {"train": dict(options), **record}
    clean: dict[str, Any] = redact_value(content)
    return clean


def _pictures(folder: Path) -> list[Picture]:
    captions = {}
    path = folder / CAPTIONS
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            captions[row["path"]] = redact(row["prompt"])
    files = sorted(folder.glob("*.png"))
    return [Picture(file, captions.get(file.name, "")) for file in files]


def _read(path: Path) -> dict[str, Any]:
    """A JSON object of the run folder; empty where there is none or a crash cut it short."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: Mapping[str, str]) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, path)
