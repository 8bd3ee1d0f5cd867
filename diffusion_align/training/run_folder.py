"""The run folder: config.yaml (written by the command line), run.json, env.json, metrics.jsonl,
samples/, checkpoints/step_*/ and final/.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from diffusion_align.errors import UserError
from diffusion_align.secrecy.redaction import redact_value
from diffusion_align.training.disk import flush, writing

_ENVIRONMENT = "env.json"
_RECORDED = (
    "diffusion-align",
    "torch",
    "diffusers",
    "transformers",
    "peft",
    "accelerate",
    "safetensors",
    "numpy",
)


@dataclass(frozen=True)
class RunFolder:
    """Where one run keeps its files."""

    path: Path

    @property
    def record(self) -> Path:
        return self.path / "run.json"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        return self.path / "final"

    def samples(self, step: int) -> Path:
        """Folder of the pictures of one step."""
        return self.path / "samples" / f"step_{step:06d}"

    def holds_a_run(self) -> bool:
        """Whether something was trained here; a config.yaml alone is no run."""
        return self.metrics.exists() or self.checkpoints.exists()

    def rows(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl; a last line cut short by a crash is left out."""
        if not self.metrics.exists():
            return []
        rows: list[dict[str, Any]] = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                break
            if not isinstance(row, dict) or "step" not in row:
                break
            rows.append(row)
        return rows

    def flush(self) -> None:
        """Bring the metrics written so far to the disk, so that no checkpoint outlives its rows."""
        if self.metrics.exists():
            with writing(self.metrics):
                flush(self.metrics)

    def cut(self, step: int) -> None:
        """Forget metrics and samples past `step`: the resumed run makes them again."""
        if self.metrics.exists():
            kept = [row for row in self.rows() if row["step"] <= step]
            text = "".join(json.dumps(row) + "\n" for row in kept)
            _replace(self.metrics, text)
        for folder in (self.path / "samples").glob("step_*"):
            if folder.name[5:].isdecimal() and int(folder.name[5:]) > step:
                with writing(folder):
                    shutil.rmtree(folder)


def open_run_folder(
    output: str | Path | None, *, name: str = "run", resume: bool = False, new: bool = False
) -> RunFolder:
    """The folder of a run that begins or goes on. Calling it twice is harmless.

    Args:
        output: the folder; None takes the next free ``runs/<name>-001``.
        resume: go on with the run in it.
        new: a run in it is moved aside to ``<folder>.old-1`` (never deleted).

    Raises:
        UserError: a run is there and neither was asked for, both were, there is nothing to
            resume, or the folder cannot be written.
    """
    if resume and new:
        raise UserError("resume and new exclude each other", where="train")
    if output is None:
        if resume:
            raise UserError("resume needs the folder of the run", where="output")
        folder = RunFolder(_free(Path("runs"), f"{name}-{{:03d}}"))
    else:
        folder = RunFolder(Path(output).expanduser())
    if folder.path.exists() and not folder.path.is_dir():
        raise UserError("this is a file, not a run folder", where=str(folder.path))
    if resume and not folder.holds_a_run():
        raise UserError(
            "there is no run to resume in this folder",
            where=str(folder.path),
            fix="leave --resume out to begin one",
        )
    if folder.holds_a_run() and not resume:
        if not new:
            raise _occupied(folder)
        aside = _free(folder.path.parent, f"{folder.path.name}.old-{{}}")
        with writing(folder.path):
            os.replace(folder.path, aside)
    try:
        folder.path.mkdir(parents=True, exist_ok=True)
        (folder.path / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot write here ({error.strerror})",
            where=str(folder.path),
            fix="choose another folder with output=...",
        ) from error
    return folder


def _free(parent: Path, pattern: str) -> Path:
    number = 1
    while (parent / pattern.format(number)).exists():
        number += 1
    return parent / pattern.format(number)


def _occupied(folder: RunFolder) -> UserError:
    rows = folder.rows()
    done = f" (step {rows[-1]['step']})" if rows else ""
    config = folder.path / "config.yaml"
    command = f"diffusion-align train {config if config.exists() else 'CONFIG'}"
    where = "" if config.exists() else f" output={folder.path}"
    return UserError(
        f"this folder already holds a run{done}",
        where=str(folder.path),
        fix=f"go on with it:        {command}{where} --resume\n"
        f"put it aside, begin:  {command}{where} --new\n"
        "in Python:            train(..., resume=True) or train(..., new=True)",
    )


def environment(device: str, processes: int = 1) -> dict[str, Any]:
    """Versions and machine, nothing from the process's environment. device: the main one's."""
    import torch

    versions: dict[str, str | None] = {}
    for package in _RECORDED:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = None
    return {
        "python": sys.version.split()[0],
        "platform": platform.platform(),
        "device": device,
        "processes": processes,
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "packages": versions,
    }


def write_environment(folder: RunFolder, device: str, processes: int = 1) -> None:
    """env.json: what `environment` tells."""
    content = redact_value(environment(device, processes))
    _replace(folder.path / _ENVIRONMENT, json.dumps(content, indent=2) + "\n")


def changed_environment(folder: RunFolder, device: str, processes: int = 1) -> list[str]:
    """`what: old -> new` of everything in env.json that may change the last bits of a number."""
    before, now = _read(folder.path / _ENVIRONMENT), environment(device, processes)
    for content in (before, now):  # which device of a kind it is changes nothing
        content["device"] = str(content.get("device", "")).partition(":")[0] or None
    then = before.pop("packages", {})
    compared = ("python", "device", "processes", "threads")
    pairs = {name: (before.get(name), now[name]) for name in compared}
    if isinstance(then, dict):
        pairs |= {name: (then.get(name), found) for name, found in now["packages"].items()}
    return [
        f"{name}: {old} -> {new}" for name, (old, new) in pairs.items() if old not in (None, new)
    ]


def write_record(folder: RunFolder, algorithm: str, record: Mapping[str, Any]) -> None:
    """run.json: `{"algorithm": "ddpo", "trained_on": [reward names], "prompts": [texts]}`.

    It is what a comparison needs to know of a run, also of one that was made without a config.
    """
    content = redact_value({"algorithm": algorithm, **record})
    text = json.dumps(content, indent=2, ensure_ascii=False)
    _replace(folder.record, text + "\n")


def check_record(folder: RunFolder, record: Mapping[str, Any]) -> None:
    """Refuse to go on with a run that learnt from something else, config or no config.

    Raises:
        UserError: run.json names other rewards, prompts or judgements.
    """
    before = _read(folder.record)
    now = json.loads(json.dumps(redact_value(record)))  # as it would be read back
    if changed := [name for name in before if name in now and before[name] != now[name]]:
        raise UserError(
            f"the run in this folder has another record: {', '.join(changed)}",
            where=str(folder.record),
            fix="resume with what it was begun with, or begin another run with new=True (--new)",
        )


def _replace(path: Path, text: str) -> None:
    """Write a small file whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    with writing(path):
        temporary.write_text(text, encoding="utf-8")
        flush(temporary)
        os.replace(temporary, path)


def _read(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none that can be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
