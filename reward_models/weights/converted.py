"""Pickles are read once: their tensors are kept as safetensors and read from there.

A safetensors file is mapped into memory, so the next process starts in a fraction of the time,
and no pickle is parsed again. The copies lie in `converted/` below `home()`, one for each source
path and way of reading it. A copy carries the size and time of change of its source, and is made
again when they differ. Removing the folder costs nothing but the next conversion.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

from reward_models.weights.verified import home

if TYPE_CHECKING:
    from torch import Tensor

# Raised when the same source would come out differently: older copies are then made again.
READER = "1"

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """A pickle as it is now, and how it is read.

    Args:
        path: resolved.
        reading: whatever decides how it is read, for instance which program may be opened.
    """

    path: Path
    size: int
    mtime_ns: int
    reading: str = ""

    @classmethod
    def of(cls, path: Path, reading: str = "") -> Source:
        """Look at the file. Raises OSError."""
        status = path.stat()
        return cls(path.resolve(), status.st_size, status.st_mtime_ns, reading)

    @property
    def copy(self) -> Path:
        """Where its tensors are kept."""
        key = hashlib.sha256(f"{self.path}\n{self.reading}".encode(errors="surrogateescape"))
        return home() / "converted" / f"{self.path.stem}-{key.hexdigest()[:16]}.safetensors"

    @property
    def stamp(self) -> dict[str, str]:
        """What a copy carries in its header."""
        return {"size": str(self.size), "mtime_ns": str(self.mtime_ns), "reader": READER}


def read_copy(source: Source) -> dict[str, Tensor] | None:
    """The tensors of the source from its copy; None when there is none that is whole and current.

    A damaged copy is removed.
    """
    from safetensors import SafetensorError, safe_open

    try:
        if not source.copy.is_file():
            return None
        with safe_open(source.copy, framework="pt", device="cpu") as stored:
            header = stored.metadata() or {}
            if any(header.get(key) != value for key, value in source.stamp.items()):
                return None
            return {key: stored.get_tensor(key) for key in stored.keys()}  # noqa: SIM118
    except (SafetensorError, ValueError) as error:
        _log.warning("%s is damaged and made again (%s)", source.copy, error)
        _remove(source.copy)
    except OSError as error:
        _log.warning("%s cannot be read: %s", source.copy, error)
    return None


def write_copy(source: Source, tensors: Mapping[str, Tensor]) -> None:
    """Keep the tensors; a copy appears whole or not at all. Failing to write is not fatal."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    part = source.copy.with_name(f".{source.copy.name}.{uuid4().hex}.part")
    try:
        source.copy.parent.mkdir(parents=True, exist_ok=True)
        save_file(_apart(tensors), part, metadata=source.stamp)
        with part.open("rb+") as written:
            os.fsync(written.fileno())
        shutil.copymode(source.path, part)  # who may read the source may read its copy
        if Source.of(source.path, source.reading) != source:
            return  # it changed while it was read: nobody knows which of the two this is
        os.replace(part, source.copy)
        _log.info("%s was converted; from now on %s is read", source.path, source.copy)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        _log.warning("%s could not be converted once and for all: %s", source.path, error)
    finally:
        _remove(part)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors of which no two share memory, as the format demands."""
    seen: set[int] = set()
    apart = {}
    for key, tensor in tensors.items():
        place = tensor.untyped_storage().data_ptr()
        apart[key] = tensor.clone() if place in seen else tensor
        apart[key] = apart[key].contiguous()
        seen.add(place)
    return apart


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink(missing_ok=True)
