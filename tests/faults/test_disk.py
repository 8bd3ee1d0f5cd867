"""A full disk and a folder that may not be written: a sentence, sound checkpoints, no loss."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from leftovers import differing, leftovers, sound_checkpoints
from small_runs import RUNS

from diffusion_align.algorithms import catalogue

SAID = 2
NAMES = catalogue.names()
SHORT, LONG = 16, 48  # steps


def fill_at_each(name: str, writes: list[str], bench: Any, folder: Path, steps: int) -> None:
    """The disk takes nothing any more at each of these writes in turn, and space again after it."""
    whole, _, _ = bench.uninterrupted(name, steps=steps)
    for write in writes:
        before = sound_checkpoints(folder)
        # The second of its kind where there will be one, so that there is something to lose.
        nth = 1 if write.startswith("write .") or write == "write final" else 2
        fault = {"deed": "full", "name": write, "nth": nth}
        ended = bench.run(name, folder, fault=fault, steps=steps)
        assert ended.status == SAID, f"{write}: {ended.said}"
        assert "could not be written (" in ended.said, ended.said
        assert f"error: {folder}" in ended.said, ended.said
        assert "free space or choose another output" in ended.said
        after = sound_checkpoints(folder)
        assert not before or max(after.values()) >= max(before.values())
        assert not list(folder.rglob(".writing-*"))
    ended = bench.run(name, folder, steps=steps)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


def all_writes(name: str, bench: Any) -> list[str]:
    """Every kind of file that a run writes."""
    _, events, _ = bench.uninterrupted(name, steps=LONG)
    kinds = dict.fromkeys(event for event in events if event.startswith("write "))
    return [kind for kind in kinds if kind != "write weights.pt"]  # it is in final


@pytest.mark.parametrize("name", NAMES)
def test_the_disk_is_full_at_a_row_and_at_a_checkpoint(
    name: str, bench: Any, tmp_path: Path
) -> None:
    fill_at_each(name, ["write metrics.jsonl", "write state.pt"], bench, tmp_path / "run", SHORT)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_disk_is_full_at_each_file_in_turn(name: str, bench: Any, tmp_path: Path) -> None:
    fill_at_each(name, all_writes(name, bench), bench, tmp_path / "run", LONG)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that another user could reach: only its own permissions keep anybody out."""
    place = Path(tempfile.mkdtemp(prefix="diffusion-align-faults-"))
    place.chmod(0o755)
    yield place
    for folder in [place, *(path for path in place.rglob("*") if path.is_dir())]:
        folder.chmod(0o755)
    shutil.rmtree(place)


def writable(folder: Path) -> None:
    for place in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        place.chmod(0o755)


@pytest.mark.parametrize("name", NAMES)
def test_an_output_that_becomes_read_only_is_named_and_nothing_is_lost(
    name: str, bench: Any, open_folder: Path
) -> None:
    whole, _, _ = bench.uninterrupted(name)
    folder = open_folder / "run"
    # In the third iteration; after the fourth a checkpoint is due.
    updates = RUNS[name].updates
    fault = {"deed": "readonly", "name": "update", "nth": 3 * updates}
    ended = bench.run(name, folder, fault=fault)
    assert ended.status == SAID, ended.said
    assert "could not be written (Permission denied)" in ended.said
    assert f"error: {folder}" in ended.said and "choose another output" in ended.said
    writable(folder)
    assert list(sound_checkpoints(folder).values()) == [2 * updates]
    ended = bench.run(name, folder)
    assert ended.status == 0, ended.said
    assert differing(whole, leftovers(folder)) == []


@pytest.mark.parametrize("name", NAMES[:1])
def test_an_output_that_was_always_read_only_is_refused_at_once(
    name: str, bench: Any, open_folder: Path
) -> None:
    ended = bench.run(name, open_folder / "run", fault={"deed": "readonly", "nth": 1})
    assert ended.status == SAID, ended.said
    assert "Permission denied" in ended.said and str(open_folder / "run") in ended.said


@pytest.mark.slow
def test_a_disk_that_is_really_full(bench: Any, tmp_path: Path) -> None:
    """A file system of 300 kB, filled but for what a checkpoint needs."""
    whole, _, _ = bench.uninterrupted("ddpo")
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=300k", "none", str(disk)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not permitted here")
    try:
        folder = disk / "run"
        kill = {"deed": "kill", "name": "rename step", "nth": 2}
        assert bench.run("ddpo", folder, fault=kill).status < 0
        (disk / "ballast").write_bytes(b"\0" * (shutil.disk_usage(disk).free - 4096))
        ended = bench.run("ddpo", folder)
        assert ended.status == SAID, ended.said
        assert "could not be written (" in ended.said
        assert sound_checkpoints(folder)
        (disk / "ballast").unlink()
        assert bench.run("ddpo", folder).status == 0
        assert differing(whole, leftovers(folder)) == []
    finally:
        subprocess.run(["umount", str(disk)], check=True)
