"""Why a resumed run may not be, bit for bit, the run that was never stopped."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffusion_align.algorithms.base import Algorithm
from diffusion_align.training.probe import InformedProbe, Probe
from diffusion_align.training.run_folder import RunFolder, changed_environment


def reservations(
    algorithm: Algorithm[Any, Any],
    folder: RunFolder,
    lost: Sequence[str],
    *,
    device: str,
    processes: int = 1,
    probe: Probe | None = None,
) -> list[str]:
    """One line for each reason; empty where the run is exact.

    Args:
        algorithm: one that asks a reward has it as attribute `reward`.
        folder: its env.json is that of the sitting before.
        lost: random state that could not be put back.
        device, processes: of this sitting.
        probe: held-out rewards decide which weights are the best, and when a run ends early.
    """
    lines = list(lost)
    info = getattr(getattr(algorithm, "reward", None), "info", None)
    if info is not None and not getattr(info, "deterministic", True):
        lines.append(f"reward {info.name} is asked again, and may answer differently")
    heldout = probe.infos() if isinstance(probe, InformedProbe) else {}
    lines += [
        f"held-out reward {name} is asked again, and may answer differently"
        for name, judge in heldout.items()
        if not judge.deterministic and (info is None or name != info.name)
    ]
    found = changed_environment(folder, device, processes)
    lines += [f"another environment, {change}" for change in found]
    return [f"not bit for bit the run without a stop: {line}" for line in lines]
