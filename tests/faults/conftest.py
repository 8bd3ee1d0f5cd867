"""The fork server of the session, and runs through it."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # its modules find each other by name; tests are no packages

from fork_server import Ended, ForkServer  # noqa: E402

SERVER: list[ForkServer] = []


def _prepare() -> Callable[[dict[str, Any]], int]:
    import child
    import small_runs

    small_runs.prepare()
    return child.work


def pytest_collection_finish(session: pytest.Session) -> None:
    """Start the server before any test runs, because of autograd (see `fork_server`)."""
    wanted = any(HERE in item.path.parents for item in session.items)
    if wanted and hasattr(os, "fork") and not session.config.option.collectonly:
        SERVER.append(ForkServer(_prepare))


def pytest_unconfigure() -> None:
    while SERVER:
        SERVER.pop().close()


@dataclass
class Bench:
    """Runs of small algorithms in children, and what they leave."""

    server: ForkServer
    root: Path
    whole: dict[tuple[str, ...], tuple[dict[str, Any], list[str], float]] = field(
        default_factory=dict
    )

    def run(
        self,
        algorithm: str,
        folder: Path,
        *,
        fault: dict[str, Any] | None = None,
        mood: str = "well",
        at: int = 0,
        pipeline: Path | None = None,
        passed: Path | None = None,
        **train: Any,
    ) -> Ended:
        """One child: the run in `folder` begins or goes on, until it ends or the fault ends it."""
        request = {
            "algorithm": algorithm,
            "folder": str(folder),
            "fault": fault,
            "mood": mood,
            "at": at,
            "pipeline": str(pipeline) if pipeline else None,
            "passed": str(passed) if passed else None,
            "train": train,
        }
        return self.server.run(request)

    def uninterrupted(
        self, algorithm: str, *, mood: str = "well", pipeline: Path | None = None, **train: Any
    ) -> tuple[dict[str, Any], list[str], float]:
        """What the run leaves that nothing happens to, the names of its events, its seconds."""
        from leftovers import leftovers

        key = (algorithm, mood, str(pipeline), str(train))
        if key not in self.whole:
            folder = Path(tempfile.mkdtemp(prefix=f"{algorithm}-", dir=self.root)) / "run"
            passed = folder.parent / "passed.json"
            ended = self.run(
                algorithm, folder, mood=mood, pipeline=pipeline, passed=passed, **train
            )
            assert ended.status == 0, ended.said
            events = json.loads(passed.read_text(encoding="utf-8"))
            self.whole[key] = (leftovers(folder), events, ended.seconds)
        return self.whole[key]


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    """The fork server, where this system can fork."""
    if not SERVER:
        pytest.skip("needs os.fork")
    yield Bench(SERVER[0], tmp_path_factory.mktemp("faults"))
