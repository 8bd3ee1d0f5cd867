"""What the disk does: flushing, and writes it refuses (full, read-only), said to a person."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from diffusion_align.errors import UserError

# What torch raises where a file took fewer bytes than it was given.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")


@contextmanager
def writing(where: Path) -> Iterator[None]:
    """Inside, a write that fails becomes an error that says what, where and what to do.

    Raises:
        UserError: the disk is full or `where` cannot be written. Bugs stay what they are.
    """
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        reason = refusal(error)
        if reason is None:
            raise
        raise UserError(
            f"could not be written ({reason})",
            where=str(where),
            fix="free space or choose another output; checkpoints made before are intact",
        ) from error


def refusal(error: BaseException) -> str | None:
    """Why the disk took no more, in the system's words; None where `error` is another one.

    The system's own error reaches us only from Python's writes: safetensors (Rust) and torch (C++)
    raise errors of their own for it.
    """
    if isinstance(error, ConnectionError | TimeoutError):
        return None  # somebody's server, not our disk
    if isinstance(error, OSError):
        return error.strerror or str(error)
    text = str(error)
    if isinstance(error, SafetensorError):
        return text.rpartition("I/O error: ")[2] if "I/O error" in text or "Io" in text else None
    if isinstance(error, RuntimeError) and any(name in text for name in _TORCH_WRITER):
        return "the disk takes no more data, or the file may not be made"
    return None


def flush(path: Path) -> None:
    """fsync a file or folder; folders cannot be opened on Windows, where rename is enough."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
