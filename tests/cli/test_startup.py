"""The real command line in its own process: how fast it answers and what it must not import."""

from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest

HELP_BUDGET = 0.4
TYPO_BUDGET = 1.0
ROOT = Path(__file__).resolve().parents[2]
# The command line as the console script runs it; then what was imported, told on stderr's last
# line.
PROGRAM = """
import sys
from diffusion_align.cli import main
try:
    main()
finally:
    heavy = ("torch", "diffusers", "transformers", "numpy")
    print([name for name in heavy if name in sys.modules], file=sys.stderr)
"""


def run(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    path = {"PYTHONPATH": str(ROOT), "PATH": "", "TERM": "dumb"}
    command = [sys.executable, "-c", PROGRAM, *words]
    return subprocess.run(command, cwd=folder, env=path, capture_output=True, text=True)


def seconds(*words: str) -> float:
    """CPU seconds of the fastest of three, which a busy machine changes less than wall time."""
    spent = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        run(*words)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(spent)


@pytest.mark.parametrize("words", [(), ("--help",), ("train", "--help"), ("--version",)])
def test_help_imports_nothing_heavy(words: tuple[str, ...]) -> None:
    assert run(*words).stderr.splitlines()[-1] == "[]"


def test_help_is_there_within_its_budget() -> None:
    assert seconds("--help") <= HELP_BUDGET


def test_typos_are_answered_within_a_second() -> None:
    assert seconds("train", "demo", "train.learning_rte=1", "modle.id=x") <= TYPO_BUDGET


@pytest.mark.parametrize("words", [("rewards",), ("models",), ("algorithms",), ("config",)])
def test_lists_need_no_torch(words: tuple[str, ...]) -> None:
    done = run(*words)
    assert done.returncode == 0
    assert "torch" not in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_typos_are_answered_before_torch_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text(
        "model:\n  id: tinysd\nprompts:\n  source: animals\nreward: aestetic\n"
        "algorithm:\n  name: ddpo\ntrain:\n  learning_rte: 1e-4\n",
        encoding="utf-8",
    )
    done = run("train", "mine.yaml", "sede=3", folder=tmp_path)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "torch" not in done.stderr.splitlines()[-1]
    assert done.stdout == ""
    for head in (
        "mine.yaml:2  model.id  unknown model 'tinysd'",
        "mine.yaml:5  reward  unknown reward 'aestetic'",
        "mine.yaml:9  train.learning_rte  unknown key",
        "command line  sede  unknown key",
        "4 problems found, nothing was loaded.",
    ):
        assert head in done.stderr
    assert list(tmp_path.iterdir()) == [config]


def test_debug_shows_the_traceback() -> None:
    done = run("train", "dmeo", "--debug")
    assert "Traceback" in done.stderr
    assert "did you mean  demo ?" in done.stderr
