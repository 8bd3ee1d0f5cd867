"""Reward against denoiser calls: curves of configs over seeds, and who gets there with fewer calls.

    python tests/benchmarks/bench_learning.py --out /tmp/learning \\
        --configs ddpo_tiny_published ddpo_tiny_fast rwr_tiny --seeds 2 3 4
    python tests/benchmarks/bench_learning.py --out /tmp/learning --show
    ... --set reward=compressibility --set evaluation.rewards=[taste]     (the same for all configs)
    ... --configs draft_tiny "draft_tiny algorithm.preset=refl"     (settings of one of them)

Runs follow one another; each leaves one line in OUT/learning.jsonl and is skipped when it is
there. A run that was cut short goes on from its last checkpoint. A call is one denoiser forward of
one sample, a backward two more, a guidance pair twice (`cost/calls`).

Curves are those of the pictures that each config trains on and looks at, drawn as it says. The
models that come out are then compared with one another, and with the untouched one, as the first
config's evaluation draws (`judged.py`; OUT/judged.jsonl): on the prompts trained on and on those
held out, all on the same noise.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from judged import Judged, judge, split, standing
from judged import known as known_judged
from plotted import plot

UNTOUCHED = "untouched"

Curve = list[tuple[float, float]]
"""(calls, value), in the order of training."""

HELD_OUT = "heldout/"


@dataclass(frozen=True)
class Run:
    """One finished run. heldout: name -> curve; its first point is the untouched model."""

    config: str
    seed: int
    overrides: list[str]
    trained_on: str
    seconds: float
    reward: Curve
    heldout: dict[str, Curve]

    def final(self, last: int) -> float:
        """Mean training reward of the last iterations."""
        return float(np.mean([value for _, value in self.reward[-last:]]))

    @property
    def calls(self) -> float:
        """Of the whole run."""
        return self.reward[-1][0]


def measure(name: str, seed: int, overrides: Sequence[str], out: Path) -> Run:
    """Train one config with one seed, or go on with what is there."""
    from diffusion_align.assemble import train_run
    from diffusion_align.config import load_config
    from diffusion_align.training.run_folder import RunFolder

    folder = _folder(name, seed, overrides, out)
    fixed = [f"seed={seed}", f"output={folder}", "evaluation.report=false"]
    source, own = split(name)
    config = load_config(source, [*own, *overrides, *fixed])
    train_run(config, resume=RunFolder(folder).holds_a_run())
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").open(encoding="utf-8")]
    return read(rows, name, seed, list(overrides), config.reward)


def read(
    rows: Sequence[dict[str, Any]], name: str, seed: int, overrides: list[str], trained_on: str
) -> Run:
    """A run from the rows of its metrics.jsonl: one point per iteration, one per look."""
    by_iteration: dict[int, tuple[float, float]] = {}
    heldout: dict[str, Curve] = {}
    for row in rows:
        calls = float(row.get("cost/calls", 0.0))
        if "reward/mean" in row:
            by_iteration[int(row["iteration"])] = (calls, float(row["reward/mean"]))
        for key, value in row.items():
            if key.startswith(HELD_OUT) and value is not None:
                heldout.setdefault(key.removeprefix(HELD_OUT), []).append((calls, float(value)))
    reward = [by_iteration[iteration] for iteration in sorted(by_iteration)]
    return Run(name, seed, overrides, trained_on, float(rows[-1]["seconds"]), reward, heldout)


def known_runs(path: Path) -> list[Run]:
    """What was measured before."""
    if not path.exists():
        return []
    runs = []
    for line in path.read_text(encoding="utf-8").splitlines():
        found = json.loads(line)
        found["reward"] = [tuple(point) for point in found["reward"]]
        found["heldout"] = {n: [tuple(p) for p in c] for n, c in found["heldout"].items()}
        runs.append(Run(**found))
    return runs


def table(runs: Sequence[Run], configs: Sequence[str], last: int) -> str:
    """Final reward, cost and held-out scores of each config: mean +- std over seeds."""
    lines = []
    for name in configs:
        mine = [run for run in runs if run.config == name]
        if not mine:
            continue
        seconds = np.mean([run.seconds for run in mine])
        calls = np.mean([run.calls for run in mine])
        first = _spread([run.reward[0][1] for run in mine])
        final = _spread([run.final(last) for run in mine])
        lines.append(
            f"{name}: {len(mine)} seeds, {calls:,.0f} calls, {seconds:,.0f} s; "
            f"{mine[0].trained_on} {first} -> {final}"
        )
        for key in mine[0].heldout:
            start = _spread([run.heldout[key][0][1] for run in mine])
            end = _spread([run.heldout[key][-1][1] for run in mine])
            lines.append(f"    held out  {key:20s} {start} -> {end}")
    return "\n".join(lines)


def curves(runs: Sequence[Run], configs: Sequence[str], last: int, points: int = 10) -> str:
    """Training reward (running mean of `last` iterations) at equal numbers of calls."""
    longest = max(run.calls for run in runs)
    grid = np.linspace(longest / points, longest, points)
    width = max(24, *(len(name) + 1 for name in configs))
    lines = ["calls".ljust(width) + "".join(f"{calls:>16,.0f}" for calls in grid)]
    for name in configs:
        mine = [run for run in runs if run.config == name]
        cells = []
        for calls in grid:
            alive = [run for run in mine if run.calls >= calls]
            values = [_running(run, calls, last) for run in alive]
            cells.append(_spread(values) if values else "-")
        lines.append(name.ljust(width) + "".join(f"{cell:>16s}" for cell in cells))
    return "\n".join(lines)


def compared(
    runs: Sequence[Run], judged: Sequence[Judged], configs: Sequence[str]
) -> Iterator[str]:
    """Calls and models of each config against those of the first, and of all against none."""
    first = configs[0]
    base = np.mean([run.calls for run in runs if run.config == first])
    for name in configs:
        calls = np.mean([run.calls for run in runs if run.config == name])
        yield "\n".join([f"{name} against the untouched model", *standing(judged, name, UNTOUCHED)])
        if name != first:
            share = f"{calls:,.0f} / {base:,.0f} = {calls / base:.3f} of its calls"
            yield "\n".join([f"{name} against {first}: {share}", *standing(judged, name, first)])


def judge_missing(
    runs: Sequence[Run], judged: list[Judged], by: str, overrides: list[str], out: Path
) -> None:
    """Judge the runs, and the untouched model on their noise, that were not judged before."""
    done = {(j.config, j.seed) for j in judged}
    wanted = [(run.config, run.seed, folder_of(run, out) / "final") for run in runs]
    untouched = [(UNTOUCHED, seed, None) for seed in sorted({run.seed for run in runs})]
    for name, seed, adapter in [*untouched, *wanted]:
        if (name, seed) in done:
            continue
        found = judge(name, seed, overrides, adapter, by)
        with (out / "judged.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(found)) + "\n")
        judged.append(found)


def folder_of(run: Run, out: Path) -> Path:
    """Where a run lies."""
    return _folder(run.config, run.seed, run.overrides, out)


def _running(run: Run, calls: float, last: int) -> float:
    before = [value for at, value in run.reward if at <= calls] or [run.reward[0][1]]
    return float(np.mean(before[-last:]))


def _spread(values: Sequence[float]) -> str:
    if len(values) < 2:
        return f"{np.mean(values):.4g}"
    return f"{np.mean(values):.4g} +- {np.std(values, ddof=1):.2g}"


def _folder(name: str, seed: int, overrides: Sequence[str], out: Path) -> Path:
    source, own = split(name)
    return out / "runs" / f"{Path(source).stem}-seed{seed}{_suffix([*own, *overrides])}"


def _suffix(overrides: Sequence[str]) -> str:
    kept = "".join(c if c.isalnum() or c in "=.+-" else "_" for c in ",".join(overrides))
    if len(kept) > 80:  # file systems end a name at 255
        kept = hashlib.sha256(kept.encode()).hexdigest()[:12]
    return f"-{kept}" if kept else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--configs", nargs="+", default=["ddpo_tiny_published", "ddpo_tiny_fast"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--last", type=int, default=5, help="iterations that a final reward means")
    parser.add_argument("--plot", type=Path, help="draw the curves into this file")
    parser.add_argument("--plot-calls", type=float, help="as far as this many calls")
    parser.add_argument("--show", action="store_true", help="train nothing, print what is there")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "learning.jsonl"
    runs = known_runs(path)
    done = {(run.config, run.seed, tuple(run.overrides)) for run in runs}
    for seed in [] if arguments.show else arguments.seeds:
        for name in arguments.configs:
            if (name, seed, tuple(arguments.overrides)) in done:
                continue
            run = measure(name, seed, arguments.overrides, arguments.out)
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(vars(run)) + "\n")
            runs.append(run)
    chosen = [
        r for r in runs if r.overrides == arguments.overrides and r.config in arguments.configs
    ]
    if not chosen:
        raise SystemExit(f"no run of these configs and settings in {path}")
    for part in (table, curves):
        print(part(chosen, arguments.configs, arguments.last), end="\n\n")
    if arguments.plot:
        found = {n: [r.reward for r in chosen if r.config == n] for n in arguments.configs}
        present = {n: c for n, c in found.items() if c}
        plot(present, arguments.last, chosen[0].trained_on, arguments.plot_calls, arguments.plot)
    judged = [
        j
        for j in known_judged(arguments.out / "judged.jsonl")
        if j.overrides == arguments.overrides and j.sampler == arguments.configs[0]
    ]
    if not arguments.show:
        judge_missing(chosen, judged, arguments.configs[0], arguments.overrides, arguments.out)
    for lines in compared(chosen, judged, arguments.configs):
        print(lines, end="\n\n")


if __name__ == "__main__":
    main()
