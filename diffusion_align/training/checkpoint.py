"""Checkpoints that are whole or not there.

A checkpoint is written to a temporary folder beside its final place, every file and folder is
flushed to the disk, and one rename makes it visible. `manifest.json` lists the sha256 of every
file; nothing is loaded before all of them agree. Only tensors and plain values are ever unpickled.

    checkpoints/step_000040/  parameters.safetensors  state.pt  meta.json  manifest.json
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from diffusion_align.errors import UserError
from diffusion_align.training.disk import flush, writing

FORMAT = 1
_PREFIX, _ASIDE = "step_", "damaged-"
_TEMPORARY, _REPLACED, _DELETING = ".writing-", ".replaced-", ".deleting-"
_FILES = ("parameters.safetensors", "state.pt", "meta.json")


@dataclass(frozen=True)
class Checkpoint:
    """Everything a run needs to go on. `state` holds tensors and plain values only."""

    step: int
    iteration: int
    seconds: float
    algorithm: str
    parameters: Mapping[str, Tensor]
    state: Mapping[str, Any]


class DamagedCheckpoint(Exception):
    """A checkpoint whose files are not what was written; the message names the file."""


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint of `step` lies."""
    return folder / f"{_PREFIX}{step:06d}"


def save_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int) -> Path:
    """Write atomically, then delete all but the `keep` newest.

    Raises:
        UserError: the disk is full or cannot be written; older checkpoints are untouched.
    """
    target = checkpoint_path(folder, checkpoint.step)
    write_atomically(target, lambda place: _write(place, checkpoint))
    for old in sorted(checkpoint_steps(folder), reverse=True)[max(keep, 1) :]:
        # Out of sight first: a crash while its files are deleted leaves no half checkpoint.
        path = checkpoint_path(folder, old)
        doomed = path.with_name(f"{_DELETING}{path.name}")
        with suppress(OSError):
            os.rename(path, doomed)
        shutil.rmtree(doomed, ignore_errors=True)
    return target


def write_atomically(
    target: Path,
    write: Callable[[Path], None],
    *,
    keep_as: Callable[[Path], Path | None] = lambda written: None,
) -> None:
    """Let `write` fill a temporary folder, flush it, and rename it to `target`.

    An existing `target` is replaced (it lies aside for the moment between two renames); there is
    never half of one.

    Args:
        keep_as: given the folder that was written, where an existing `target` is kept; None
            deletes it, and `target` itself leaves everything as it is.

    Raises:
        UserError: the disk is full or cannot be written.
    """
    temporary = target.parent / f"{_TEMPORARY}{target.name}"
    replaced = target.parent / f"{_REPLACED}{target.name}"
    with writing(target):
        try:
            _finish_replacing(replaced)
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
            write(temporary)
            for path in [*temporary.rglob("*"), temporary]:
                flush(path)
            if target.exists():
                kept = keep_as(temporary)
                if kept == target:
                    shutil.rmtree(temporary, ignore_errors=True)
                    return
                os.rename(target, kept or replaced)
                os.rename(temporary, target)
                if kept is None:
                    shutil.rmtree(replaced, ignore_errors=True)
            else:
                os.rename(temporary, target)
            flush(target.parent)
        except Exception:
            shutil.rmtree(temporary, ignore_errors=True)
            with suppress(OSError):
                _finish_replacing(replaced)
            raise


def load_newest(folder: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest sound checkpoint, or None where none was ever made.

    A damaged one is named to `say`, set aside (renamed to `damaged-step_N`, to `damaged-step_N-2`
    where that is taken, never deleted) and the next older taken.

    Raises:
        UserError: there are checkpoints and all of them are damaged.
    """
    if folder.exists():
        for leftover in [*folder.glob(f"{_TEMPORARY}*"), *folder.glob(f"{_DELETING}*")]:
            shutil.rmtree(leftover, ignore_errors=True)
        for leftover in folder.glob(f"{_REPLACED}*"):
            _finish_replacing(leftover)
    found = sorted(checkpoint_steps(folder), reverse=True)
    faults: list[str] = []
    for step in found:
        path = checkpoint_path(folder, step)
        try:
            return load_checkpoint(path)
        except DamagedCheckpoint as damage:
            faults.append(str(damage))
            say(f"{damage}; looking for an older checkpoint")
            with writing(path):
                os.rename(path, _free(folder / f"{_ASIDE}{path.name}"))
    if faults:
        raise UserError(
            "no checkpoint of this run is sound",
            where=str(folder),
            fix="\n".join([*faults, "begin again with --new"]),
        )
    return None


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint after checking every file's sha256.

    Raises:
        DamagedCheckpoint: naming the file that is missing or altered.
    """
    manifest = _read_json(path / "manifest.json")
    for name in _FILES:
        file = path / name
        if not file.is_file():
            raise DamagedCheckpoint(f"{file}: missing")
        try:
            found = _sha256(file)
        except OSError as error:
            raise DamagedCheckpoint(f"{file}: cannot be read ({error.strerror})") from None
        if found != manifest.get(name):
            raise DamagedCheckpoint(f"{file}: damaged (its sha256 is not that of the manifest)")
    meta = _read_json(path / "meta.json")
    if meta.get("format") != FORMAT:
        raise DamagedCheckpoint(
            f"{path / 'meta.json'}: format {meta.get('format')!r}, not {FORMAT}"
        )
    return Checkpoint(
        step=meta["step"],
        iteration=meta["iteration"],
        seconds=meta["seconds"],
        algorithm=meta["algorithm"],
        parameters=load_file(path / "parameters.safetensors"),
        state=torch.load(path / "state.pt", map_location="cpu", weights_only=True),
    )


def _write(place: Path, checkpoint: Checkpoint) -> None:
    # One after another, so that a crash at any point leaves a folder without a manifest.
    tensors = {
        name: value.detach().cpu().contiguous() for name, value in checkpoint.parameters.items()
    }
    save_file(tensors, place / "parameters.safetensors")
    torch.save(dict(checkpoint.state), place / "state.pt")
    meta = {
        "format": FORMAT,
        "step": checkpoint.step,
        "iteration": checkpoint.iteration,
        "seconds": checkpoint.seconds,
        "algorithm": checkpoint.algorithm,
    }
    (place / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
    manifest = {name: _sha256(place / name) for name in _FILES}
    (place / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def _finish_replacing(replaced: Path) -> None:
    """End what a crash between two renames left: what was there is back, or is deleted."""
    target = replaced.with_name(replaced.name[len(_REPLACED) :])
    if replaced.exists() and not target.exists():
        os.rename(replaced, target)
    shutil.rmtree(replaced, ignore_errors=True)


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the checkpoints that are visible in `folder`, in no order, sound or not."""
    names = [path.name for path in folder.glob(f"{_PREFIX}*")] if folder.exists() else []
    return [int(name[len(_PREFIX) :]) for name in names if name[len(_PREFIX) :].isdecimal()]


def _free(path: Path) -> Path:
    """`path`, or where that is taken `path-2`, `path-3` ..."""
    free, number = path, 2
    while free.exists():
        free, number = path.with_name(f"{path.name}-{number}"), number + 1
    return free


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}: missing") from None
    except (OSError, ValueError) as error:
        raise DamagedCheckpoint(f"{path}: damaged ({error})") from None
    if not isinstance(content, dict):
        raise DamagedCheckpoint(f"{path}: damaged (no object)")
    return content


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
