"""Learning curves as a picture, for `bench_learning.py --plot FILE`. Needs matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

Curve = Sequence[tuple[float, float]]
POINTS = 60


def plot(
    runs: Mapping[str, Sequence[Curve]], last: int, what: str, calls: float | None, file: Path
) -> None:
    """Mean over seeds of what each config gained, with a band of one standard deviation.

    Args:
        runs: config -> (calls, reward) of each seed's iterations.
        last: iterations of the running mean.
        what: the reward's name.
        calls: where the picture ends; None is the longest run.
        file: to write; its suffix chooses the format.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, curves in runs.items():
        end = min(min(curve[-1][0] for curve in curves), calls or np.inf)
        start = max(curve[min(last, len(curve)) - 1][0] for curve in curves)
        grid = np.linspace(start, end, POINTS)
        values = np.stack([np.interp(grid, *_smooth(curve, last)) for curve in curves])
        mean = values.mean(axis=0)
        (line,) = axes.plot(grid / 1000, mean, label=f"{name} ({len(curves)} seeds)")
        if len(curves) > 1:
            std = values.std(axis=0, ddof=1)
            axes.fill_between(
                grid / 1000, mean - std, mean + std, alpha=0.15, color=line.get_color()
            )
    axes.set(xlabel="thousand denoiser calls", ylabel=f"{what}, mean of {last} iterations")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def _smooth(curve: Curve, last: int) -> tuple[np.ndarray, np.ndarray]:
    """Running mean over the last iterations, from the first full window on."""
    at, values = np.asarray(curve, dtype=float).T
    window = min(last, len(values))
    means = np.convolve(values, np.full(window, 1 / window), mode="valid")
    return at[window - 1 :], means
