"""Is this file the published one? Hashed once, then remembered.

Weight files reach gigabytes, so a digest that was right is remembered with the file's path, size
and time of change: in the process, and for large files in `verified.json` below `home()` as well.
A file whose size or time differs is hashed again. Whoever can forge the time of a file can write
below the home folder too, so this guards against damage and mix-ups, not against its owner.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any
from uuid import uuid4

from reward_models.base import RewardError

STAMPS = "verified.json"
# Smaller files are hashed in every process: that takes milliseconds, and leaves no trace.
STAMPED_FROM = 32 << 20

_ALGORITHMS = {64: "sha256", 32: "md5"}  # by the length of the digest in hexadecimal

_Stamp = tuple[int, int, str]  # size, mtime_ns, digest
_known: dict[str, _Stamp] = {}


def home() -> Path:
    """The folder for files that do not come from the hub, and for what is remembered of others."""
    return Path(os.environ.get("REWARD_MODELS_HOME") or "~/.cache/reward_models").expanduser()


def verify(path: Path, expected: str) -> None:
    """Compare a file with its published sha256 or md5; an empty `expected` verifies nothing.

    Args:
        expected: hexadecimal, 64 digits of a sha256 or 32 of an md5.

    Raises:
        RewardError: naming the file, when it is not the published one or cannot be read.
    """
    if not expected:
        return
    try:
        before = _fingerprint(path)
        if _remembered(path, before, expected):
            return
        actual = digest_of(path, algorithm_of(expected))
        unchanged = _fingerprint(path) == before
    except OSError as error:
        raise RewardError(f"cannot be read: {error.strerror or error}", where=str(path)) from error
    if actual != expected:
        raise RewardError(
            f"{algorithm_of(expected)} is {actual[:12]}..., the published file has "
            f"{expected[:12]}...: it is damaged or another file under the same name",
            where=str(path),
            fix="delete it and fetch it again (your own weights need another file name)",
        )
    if unchanged:
        remember(path, expected)


def remember(path: Path, digest: str) -> None:
    """Note that this file, as it is now, has that digest. Failing to write the note is harmless."""
    size, mtime = _fingerprint(path)
    key = str(path.resolve())
    _known[key] = (size, mtime, digest)
    if size < STAMPED_FROM:
        return
    stamps = {name: entry for name, entry in _read_stamps().items() if os.path.exists(name)}
    stamps[key] = {"size": size, "mtime_ns": mtime, "digest": digest}
    temporary = home() / f".{STAMPS}.{uuid4().hex}"
    try:
        home().mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(stamps, indent=1), encoding="utf-8")
        os.replace(temporary, home() / STAMPS)
    except OSError:
        # A read-only or full disk: the next process hashes again, and nothing else is lost.
        _remove(temporary)


def digest_of(path: Path, algorithm: str) -> str:
    """The file's digest in hexadecimal; it is read once from beginning to end."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sha256_of(path: Path) -> str:
    """The file's sha256 in hexadecimal."""
    return digest_of(path, "sha256")


def algorithm_of(digest: str) -> str:
    """Which algorithm made a digest: its length tells."""
    if len(digest) not in _ALGORITHMS:
        raise ValueError(f"{digest!r} is neither a sha256 nor an md5 in hexadecimal")
    return _ALGORITHMS[len(digest)]


def _remembered(path: Path, fingerprint: tuple[int, int], digest: str) -> bool:
    key, stamp = str(path.resolve()), (*fingerprint, digest)
    if _known.get(key) == stamp:
        return True
    entry = _read_stamps().get(key) if fingerprint[0] >= STAMPED_FROM else None
    if not isinstance(entry, dict):
        return False
    if (entry.get("size"), entry.get("mtime_ns"), entry.get("digest")) != stamp:
        return False
    _known[key] = stamp
    return True


def _fingerprint(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _read_stamps() -> dict[str, Any]:
    """What earlier processes noted; nothing where there is no note, or a damaged one."""
    try:
        stamps = json.loads((home() / STAMPS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stamps if isinstance(stamps, dict) else {}


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
