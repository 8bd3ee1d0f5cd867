"""How long the command line takes to answer: wall and CPU time of seven cold processes each.

    python tests/benchmarks/bench_startup.py

Nothing is asserted: wall time is the machine's as much as ours. The bars (help within 0.4 s, a
config with typos within 1 s) are held in CPU time by tests/cli/test_startup.py.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = "from diffusion_align.cli import main; main()"
ANSWERS = {
    "--help": ("--help",),
    "config with typos": ("train", "demo", "train.learning_rte=1", "modle.id=x"),
}


def measure(words: tuple[str, ...]) -> tuple[float, float]:
    """(wall, CPU) seconds of one process."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    subprocess.run(
        [sys.executable, "-c", PROGRAM, *words],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "TERM": "dumb"},
        capture_output=True,
    )
    wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    """Print a line per answer and clock: least, median and greatest."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--runs", type=int, default=7)
    runs = parser.parse_args().runs
    print(f"{'answer':<20}{'clock':<8}{'min':>8}{'median':>8}{'max':>8}   seconds of {runs} runs")
    for name, words in ANSWERS.items():
        columns = zip(*(measure(words) for _ in range(runs)))
        for clock, seconds in zip(("wall", "CPU"), columns):
            spread = (min(seconds), statistics.median(seconds), max(seconds))
            print(f"{name:<20}{clock:<8}" + "".join(f"{value:>8.3f}" for value in spread))


if __name__ == "__main__":
    main()
