"""How a result was made, kept beside it, so that it is not continued in another way.

`scores.jsonl.how.json` holds what the rows themselves do not show: the frames that were looked at
and how their scores were pooled, whether sub-scores were kept, and size and time of the files of
rewards that were given by path (one that was trained anew at the same path is another reward).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from reward_models.base import RewardError
from reward_models.catalogue import components, existing_file, is_file
from reward_models.table_files import read_bytes, write_whole

FileState = tuple[int, int]
"""Size in bytes and time of the last change in nanoseconds."""

FIX = "name another file for the result, or remove this one"


@dataclass(frozen=True)
class Making:
    """What rows must have in common beside their rewards.

    Args:
        frames, pool: as `clips.ClipView` takes them.
        parts: whether sub-scores are kept.
        files: of rewards given by path, by the name they were given under.
    """

    frames: str
    pool: str
    parts: bool
    files: Mapping[str, FileState]

    def difference(self, now: Making) -> str:
        """What is another now, in words; "" where nothing is."""
        found = [
            f"--{option} {old}, now {new}"
            for option, old, new in (
                ("frames", self.frames, now.frames),
                ("pool", self.pool, now.pool),
            )
            if old != new
        ]
        if self.parts != now.parts:
            found.append("--parts, now without" if self.parts else "no --parts, now with")
        changed = [name for name, state in now.files.items() if self.files.get(name) != state]
        found += [f"an earlier {name}, which has changed since" for name in changed]
        return f"made with {', and '.join(found)}" if found else ""


def record_of(result: Path) -> Path:
    """Where it is written how a result was made."""
    return result.with_name(f"{result.name}.how.json")


def read_record(result: Path) -> Making | None:
    """How a result was made; None where nobody wrote it down.

    Raises:
        RewardError: what stands there is something else.
    """
    path = record_of(result)
    if not path.exists():
        return None
    try:
        entry = json.loads(read_bytes(path))
        frames, pool, parts, files = (entry[key] for key in ("frames", "pool", "parts", "files"))
        states = {str(name): (int(size), int(time)) for name, (size, time) in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RewardError(
            f"does not say how {result.name} was made", where=str(path), fix=FIX
        ) from error
    return Making(str(frames), str(pool), bool(parts), states)


def write_record(result: Path, making: Making) -> None:
    """Write down how a result is made, whole or not at all; makes its folder."""
    text = json.dumps(asdict(making), indent=1, sort_keys=True)
    write_whole(record_of(result), f"{text}\n".encode())


def reward_files(names: Sequence[str]) -> dict[str, FileState]:
    """Size and time of the files behind those rewards (terms of sums too) that are given by path.

    Names of another kind, such as the keys of a caller's own table of rewards, have none.
    """
    found: dict[str, FileState] = {}
    for name in names:
        try:
            for component in components(name):
                if is_file(component):
                    status = existing_file(component).stat()
                    found[component] = (status.st_size, status.st_mtime_ns)
        except (RewardError, OSError):
            continue
    return found
