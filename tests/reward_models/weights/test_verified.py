"""Digests: a file is hashed once, and again only when it has changed."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest

from reward_models.base import RewardError
from reward_models.weights import verified
from reward_models.weights.verified import verify

CONTENT = b"0123456789"
SHA256 = hashlib.sha256(CONTENT).hexdigest()
MD5 = hashlib.md5(CONTENT).hexdigest()


@pytest.fixture(autouse=True)
def hashed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """An empty home and memory; the list of files that were hashed."""
    monkeypatch.setenv("REWARD_MODELS_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(verified, "_known", {})
    monkeypatch.setattr(verified, "STAMPED_FROM", 1)
    files: list[Path] = []
    original = verified.digest_of

    def counted(path: Path, algorithm: str) -> str:
        files.append(path)
        return original(path, algorithm)

    monkeypatch.setattr(verified, "digest_of", counted)
    return files


@pytest.fixture
def path(tmp_path: Path) -> Path:
    made = tmp_path / "weights.pt"
    made.write_bytes(CONTENT)
    return made


def new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verified, "_known", {})


@pytest.mark.parametrize("digest", [SHA256, MD5])
def test_the_published_file_passes_and_another_one_is_named(path: Path, digest: str) -> None:
    verify(path, digest)
    path.write_bytes(CONTENT + b"x")
    with pytest.raises(RewardError, match=rf"weights.pt: (sha256|md5) is \w+..., .*{digest[:12]}"):
        verify(path, digest)


def test_a_file_is_hashed_once_in_a_process(path: Path, hashed: list[Path], tmp_path: Path) -> None:
    link = tmp_path / "link.pt"
    link.symlink_to(path)
    for name in (path, path, link):
        verify(name, SHA256)
    assert hashed == [path]
    verify(path, MD5)  # another claim is another question
    assert hashed == [path, path]


def test_a_file_is_hashed_once_over_all_processes(
    path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    verify(path, SHA256)
    new_process(monkeypatch)
    verify(path, SHA256)
    assert hashed == [path]
    stamps = json.loads((tmp_path / "home" / verified.STAMPS).read_text())
    status = path.stat()
    entry = {"size": len(CONTENT), "mtime_ns": status.st_mtime_ns, "digest": SHA256}
    assert stamps == {str(path): entry}
    assert os.listdir(tmp_path / "home") == [verified.STAMPS]


@pytest.mark.parametrize("content", [CONTENT[:-1], b"9876543210"])
def test_a_changed_file_is_hashed_again(
    path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, content: bytes
) -> None:
    verify(path, SHA256)
    before = path.stat().st_mtime_ns
    path.write_bytes(content)
    os.utime(path, ns=(before, before if len(content) != len(CONTENT) else before + 1))
    for _ in range(2):
        with pytest.raises(RewardError, match="damaged"):
            verify(path, SHA256)
        new_process(monkeypatch)
    assert len(hashed) == 3


def test_a_failure_is_not_remembered_as_a_success(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        with pytest.raises(RewardError):
            verify(path, "0" * 64)
        new_process(monkeypatch)


def test_small_files_leave_no_trace(
    path: Path, hashed: list[Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(verified, "STAMPED_FROM", len(CONTENT) + 1)
    verify(path, SHA256)
    verify(path, SHA256)
    new_process(monkeypatch)
    verify(path, SHA256)
    assert hashed == [path, path] and not (tmp_path / "home").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"PATH": 3}', '{"PATH": {"size": "x"}}', "\0"]
)
def test_a_damaged_note_is_written_anew(
    path: Path, hashed: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str
) -> None:
    notes = tmp_path / "home" / verified.STAMPS
    notes.parent.mkdir()
    notes.write_text(content.replace("PATH", str(path)))
    verify(path, SHA256)
    new_process(monkeypatch)
    verify(path, SHA256)
    assert hashed == [path] and json.loads(notes.read_text())[str(path)]["digest"] == SHA256


def test_notes_of_files_that_are_gone_are_dropped(path: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.pt"
    other.write_bytes(CONTENT)
    verify(other, SHA256)
    other.unlink()
    verify(path, SHA256)
    assert list(json.loads((tmp_path / "home" / verified.STAMPS).read_text())) == [str(path)]


def test_a_home_that_cannot_be_written_is_harmless(path: Path, tmp_path: Path) -> None:
    (tmp_path / "home").write_text("a file where the folder should be")
    verify(path, SHA256)
    assert (tmp_path / "home").is_file()


def test_a_digest_of_no_known_length_is_a_mistake_of_ours(path: Path) -> None:
    with pytest.raises(ValueError, match="neither"):
        verify(path, "abc")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(RewardError, match=r"none.pt: cannot be read: No such file"):
        verify(tmp_path / "none.pt", SHA256)
