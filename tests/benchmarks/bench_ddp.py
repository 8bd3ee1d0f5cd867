"""What a second process is worth: bare network calls per second, two processes against one.

    python tests/benchmarks/bench_ddp.py [--rounds 3] [--iterations 4]

Trains `tiny-sd` (LoRA, DDPO) for one iteration at a time, on one process with one thread and on two
with one thread each, on two idle cores. The bar: of the time in the bare network (forwards and
backwards, the exchange of gradients included, as hooks see them), two processes do at least 0.8 of
twice what one does. Whole iterations are printed beside it. Rounds alternate, so that whatever else
the machine does falls on both; the median counts.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

BAR = 0.8
PROMPTS = ["a red circle", "a blue square", "a green triangle", "a yellow circle"]


def work(environment: dict[str, str], folder: str, iterations: int, answers: Any) -> None:
    """One process: train and put (seconds in the network, seconds of all) of each iteration."""
    os.environ.update(environment)
    import torch

    torch.set_num_threads(1)
    import reward_models
    from diffusion_align.algorithms.ddpo import DDPO
    from diffusion_align.algorithms.options import DDPOOptions
    from diffusion_align.policy import Policy
    from diffusion_align.reporting.console import Quiet
    from diffusion_align.sampling.options import SamplingOptions
    from diffusion_align.training.loop import train
    from diffusion_align.training.options import TrainOptions
    from diffusion_align.training.setup import Machinery

    policy = Policy.load("tiny-sd", lora_rank=8)
    spent = {"network": 0.0, "since": 0.0}

    def before(module: Any, inputs: Any) -> None:
        spent["since"] = time.perf_counter()

    def after(module: Any, inputs: Any, output: Any) -> None:
        spent["network"] += time.perf_counter() - spent["since"]

    policy.denoiser.register_forward_pre_hook(before)
    policy.denoiser.register_forward_hook(after)
    backward = Machinery.backward

    def timed(machinery: Machinery, loss: Any) -> None:
        began = time.perf_counter()
        backward(machinery, loss)
        spent["network"] += time.perf_counter() - began

    Machinery.backward = timed  # type: ignore[method-assign, assignment]
    algorithm = DDPO(
        policy,
        reward_models.load("tiny-aesthetic"),
        PROMPTS,
        options=DDPOOptions(prompts_per_iteration=4, samples_per_prompt=8, train_batch_size=16),
        sampling=SamplingOptions(steps=8, guidance_scale=1.0, batch_size=16),
    )
    collect, marks = algorithm.collect, []

    def marked(iteration: int) -> Any:
        marks.append((time.perf_counter(), spent["network"]))
        return collect(iteration)

    algorithm.collect = marked  # type: ignore[method-assign]
    options = TrainOptions(
        steps=2 * (iterations + 2), sample_every=0, checkpoint_every=0, log_every=10**6
    )
    train(algorithm, options=options, output=Path(folder) / "run", reporter=Quiet())
    # The first iteration also checks the replay; the last has no mark behind it.
    pairs = list(pairwise(marks[1:]))
    answers.put([(b[1] - a[1], b[0] - a[0]) for a, b in pairs])


def measure(size: int, iterations: int) -> tuple[float, float]:
    """Median seconds of an iteration: in the network (the slowest process's), and all of it."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    answers = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        processes = []
        for rank in range(size):
            environment = {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(size),
                "LOCAL_WORLD_SIZE": str(size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "OMP_WAIT_POLICY": "PASSIVE",
            }
            target = (environment, folder, iterations, answers)
            processes.append(context.Process(target=work, args=target))
            processes[-1].start()
        found = [answers.get(timeout=600) for _ in range(size)]
        for process in processes:
            process.join()
    rows = list(zip(*found))
    network = statistics.median(max(rank[0] for rank in row) for row in rows)
    whole = statistics.median(max(rank[1] for rank in row) for row in rows)
    return network, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=4)
    arguments = parser.parse_args()
    print(f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the beginning")
    ratios: list[tuple[float, float]] = []
    for number in range(arguments.rounds):
        one, two = measure(1, arguments.iterations), measure(2, arguments.iterations)
        ratios.append((one[0] / two[0] / 2, one[1] / two[1] / 2))
        print(
            f"round {number + 1}: one process {one[0]:.3f} s in the network, {one[1]:.3f} s in all;"
            f" two {two[0]:.3f} s, {two[1]:.3f} s"
        )
    network, whole = (statistics.median(column) for column in zip(*ratios))
    verdict = "meets" if network >= BAR else "misses"
    print(f"of twice one process: network {network:.2f} ({verdict} {BAR}), iteration {whole:.2f}")


if __name__ == "__main__":
    main()
