"""Checkpoints are whole or not there."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion_align.errors import UserError
from diffusion_align.training import checkpoint as module
from diffusion_align.training.checkpoint import (
    Checkpoint,
    DamagedCheckpoint,
    load_checkpoint,
    load_newest,
    save_checkpoint,
)


def make(step: int) -> Checkpoint:
    return Checkpoint(
        step=step,
        iteration=step // 2,
        seconds=1.5,
        algorithm="Fake",
        parameters={"layer.weight": torch.full((2, 3), float(step))},
        state={"random": [1, 2], "nested": {"t": torch.arange(3)}, "none": None},
    )


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    said: list[str] = []
    return load_newest(folder, said.append), said


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, make(4), keep=2)
    assert names(path) == ["manifest.json", "meta.json", "parameters.safetensors", "state.pt"]
    found = load_checkpoint(path)
    assert (found.step, found.iteration, found.seconds, found.algorithm) == (4, 2, 1.5, "Fake")
    assert torch.equal(found.parameters["layer.weight"], torch.full((2, 3), 4.0))
    assert found.state["random"] == [1, 2] and found.state["none"] is None
    assert torch.equal(found.state["nested"]["t"], torch.arange(3))


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (2, 4, 10, 6):
        save_checkpoint(tmp_path, make(step), keep=2)
    assert names(tmp_path) == ["step_000006", "step_000010"]


def test_no_checkpoints_is_none(tmp_path: Path) -> None:
    assert newest(tmp_path / "missing") == (None, [])


@pytest.mark.parametrize("victim", ["save_file", "torch.save", "flush", "os.rename", "_sha256"])
@pytest.mark.parametrize("kill", [True, False])
def test_a_crash_in_the_middle_of_a_save_leaves_the_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, victim: str, kill: bool
) -> None:
    """Killed (nothing of ours runs any more) or out of disk (OSError)."""
    save_checkpoint(tmp_path, make(2), keep=1)

    class Killed(BaseException):
        pass

    def fail(*args: Any, **options: Any) -> None:
        raise Killed if kill else OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        target = "diffusion_align.training.checkpoint." + victim
        patched.setattr(target, fail)
        if kill:
            patched.setattr(module.shutil, "rmtree", lambda *a, **k: None)
        with pytest.raises(Killed if kill else UserError):
            save_checkpoint(tmp_path, make(4), keep=1)
    found, said = newest(tmp_path)
    assert found is not None and found.step == 2 and said == []
    assert names(tmp_path) == ["step_000002"]  # leftovers are gone
    save_checkpoint(tmp_path, make(4), keep=1)
    assert names(tmp_path) == ["step_000004"]


def test_a_damaged_newest_is_named_set_aside_and_skipped(tmp_path: Path) -> None:
    for step in (2, 4):
        save_checkpoint(tmp_path, make(step), keep=2)
    victim = tmp_path / "step_000004" / "state.pt"
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 1
    victim.write_bytes(bytes(data))
    found, said = newest(tmp_path)
    assert found is not None and found.step == 2
    assert len(said) == 1 and str(victim) in said[0] and "sha256" in said[0]
    assert names(tmp_path) == ["damaged-step_000004", "step_000002"]
    # A later save prunes by sound checkpoints only.
    save_checkpoint(tmp_path, make(4), keep=2)
    assert names(tmp_path) == ["damaged-step_000004", "step_000002", "step_000004"]


def test_what_was_set_aside_is_never_deleted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(2), keep=3)
    for number in range(3):
        path = save_checkpoint(tmp_path, make(4), keep=3)
        (path / "meta.json").write_text(f"damage {number}", encoding="utf-8")
        found, _ = newest(tmp_path)
        assert found is not None and found.step == 2
    aside = ["damaged-step_000004", "damaged-step_000004-2", "damaged-step_000004-3"]
    assert names(tmp_path) == [*aside, "step_000002"]
    for number, name in enumerate(aside):
        text = (tmp_path / name / "meta.json").read_text(encoding="utf-8")
        assert text == f"damage {number}"


@pytest.mark.parametrize("name", ["state.pt", "parameters.safetensors", "meta.json"])
def test_missing_and_truncated_files_are_named(tmp_path: Path, name: str) -> None:
    path = save_checkpoint(tmp_path, make(2), keep=2)
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(DamagedCheckpoint, match=name):
        load_checkpoint(path)
    (path / name).unlink()
    with pytest.raises(DamagedCheckpoint, match="missing"):
        load_checkpoint(path)


def test_all_damaged_is_an_error_that_names_each(tmp_path: Path) -> None:
    for step in (2, 4):
        path = save_checkpoint(tmp_path, make(step), keep=2)
        (path / "manifest.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError) as caught:
        newest(tmp_path)
    text = str(caught.value)
    assert "step_000002" in text and "step_000004" in text and "--new" in text


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    """Even with a manifest that agrees with it."""

    class Bomb:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'boom'}",)

    path = save_checkpoint(tmp_path, make(2), keep=2)
    torch.save({"x": Bomb()}, path / "state.pt")
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.pt"] = module._sha256(path / "state.pt")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(pickle.UnpicklingError):
        load_checkpoint(path)
    assert not (tmp_path / "boom").exists()


def test_the_same_step_can_be_saved_again(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, make(2), keep=2)
    save_checkpoint(tmp_path, make(2), keep=2)
    assert names(tmp_path) == ["step_000002"]


def test_every_file_is_on_the_disk_before_the_name_and_the_name_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power cut needs: contents flushed, then the rename, then the folder that holds it."""
    events: list[tuple[str, str]] = []
    paths: dict[int, str] = {}
    plain_open, plain_sync, plain_rename = os.open, os.fsync, os.rename

    def opening(path: Any, *rest: Any, **options: Any) -> int:
        descriptor = plain_open(path, *rest, **options)
        paths[descriptor] = str(path)
        return descriptor

    def syncing(descriptor: int) -> None:
        events.append(("sync", paths.get(descriptor, "?")))
        plain_sync(descriptor)

    def renaming(source: Any, target: Any) -> None:
        events.append(("rename", str(target)))
        plain_rename(source, target)

    monkeypatch.setattr(os, "open", opening)
    monkeypatch.setattr(os, "fsync", syncing)
    monkeypatch.setattr(os, "rename", renaming)
    target = save_checkpoint(tmp_path, make(2), keep=1)
    renamed = events.index(("rename", str(target)))
    writing = tmp_path / ".writing-step_000002"
    flushed = {path for kind, path in events[:renamed] if kind == "sync"}
    assert flushed == {str(writing), *(str(writing / name) for name in names(target))}
    if os.name == "posix":
        assert events[renamed + 1 :] == [("sync", str(tmp_path))]


@pytest.mark.parametrize("moment", [1, 2])
def test_a_crash_while_a_checkpoint_is_replaced_loses_neither(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int
) -> None:
    """Killed before the first or the second rename: what was there, or what replaces it."""
    save_checkpoint(tmp_path, make(2), keep=1)
    plain, calls = os.rename, 0

    class Killed(BaseException):
        pass

    def rename(source: Any, target: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == moment:
            raise Killed
        plain(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(os, "rename", rename)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, make(2), keep=1)
    found, said = newest(tmp_path)
    assert found is not None and found.step == 2 and said == []
    assert names(tmp_path) == ["step_000002"]


@pytest.mark.parametrize("manifest", ["{}", '{"state.pt": 3}'])
def test_a_manifest_that_names_too_little_is_damage(tmp_path: Path, manifest: str) -> None:
    path = save_checkpoint(tmp_path, make(2), keep=2)
    (path / "manifest.json").write_text(manifest, encoding="utf-8")
    with pytest.raises(DamagedCheckpoint, match=r"parameters\.safetensors: damaged"):
        load_checkpoint(path)


def test_a_crash_while_an_old_checkpoint_is_deleted_leaves_no_half_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Killed(BaseException):
        pass

    def half(path: Path, **options: Any) -> None:
        if any(path.glob("*")):
            (path / "manifest.json").unlink()
            raise Killed

    save_checkpoint(tmp_path, make(2), keep=1)
    with monkeypatch.context() as patched:
        patched.setattr(module.shutil, "rmtree", half)
        with pytest.raises(Killed):
            save_checkpoint(tmp_path, make(4), keep=1)
    visible = [path for path in tmp_path.iterdir() if path.name.startswith("step_")]
    assert [load_checkpoint(path).step for path in visible] == [4]
    found, said = newest(tmp_path)
    assert found is not None and found.step == 4 and said == []
    assert names(tmp_path) == ["step_000004"]
