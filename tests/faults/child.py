"""What a forked child does: one run, perhaps resumed, perhaps with a fault."""

from __future__ import annotations

import json
import resource
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import moments
import small_runs

from diffusion_align.errors import UserError
from diffusion_align.reporting.console import Console
from diffusion_align.training.loop import train
from diffusion_align.training.run_folder import RunFolder
from reward_models.base import RewardError

SAID, INTERRUPTED, DONE = 2, 130, 0


def work(request: dict[str, Any]) -> int:
    """Run `algorithm` in `folder`: on where there is a run already, else from the beginning.

    Request: algorithm, folder, fault (a `Fault` as a dict, or None), mood and at (of the reward),
    pipeline (a folder, or None), train (changes of its options), passed (a file to write the
    names of all events to, or None).

    Returns:
        The exit status, as the command line has it: 2 for an error that a person was told.
    """
    folder = Path(request["folder"])
    fault = moments.Fault(**request["fault"]) if request["fault"] else None
    happening = moments.Moments(fault, folder)
    moments.install(happening)
    run = small_runs.RUNS[request["algorithm"]]
    pipeline = Path(request["pipeline"]) if request["pipeline"] else None
    algorithm = run.build(small_runs.Reward(request["mood"], request["at"]), pipeline)
    status = DONE
    try:
        result = train(
            algorithm,
            options=replace(run.train, **request["train"]),
            output=folder,
            resume=RunFolder(folder).holds_a_run(),
            seed=7,
            reporter=Console(sys.stderr, live=False),
            probe=small_runs.Look(algorithm.policy) if run.looks else None,
        )
        status = INTERRUPTED if result.interrupted else DONE
    except KeyboardInterrupt:
        status = INTERRUPTED
    except (UserError, RewardError) as error:
        sys.stderr.write(f"error: {error}\n")
        status = SAID
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    if request["passed"]:
        Path(request["passed"]).write_text(json.dumps(happening.names), encoding="utf-8")
    return status
