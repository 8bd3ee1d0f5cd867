"""Share of an iteration's wall time outside denoiser, VAE and reward calls (the bar is 3 %).

    python tests/benchmarks/bench_overhead.py --model tiny-sd --batch 16
    python tests/benchmarks/bench_overhead.py --model PATH_OF_A_PIPELINE --batch 4

Everything is measured in the same run: hooks on the network take the time of its forwards, a hook
on its output splits every backward into the loss's part (ours) and the network's part, `decode` and
`score` are timed around the call. The first iteration (captures prompts, checks the replay) is left
out; the figures are medians of the next five. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import reward_models
from diffusion_align import DDPO, DDPOOptions, Policy, SamplingOptions, TrainOptions, train
from diffusion_align.reporting.console import Quiet
from diffusion_align.training.setup import Machinery

PARTS = ("denoiser forward", "denoiser backward", "VAE", "reward")


class Meter:
    """Seconds by part, one dict per iteration."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[float] = []
        self._rows: list[dict[str, float]] = []
        self._forward_began = 0.0
        self._gradient_arrived: float | None = None

    def now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def iteration(self) -> None:
        """A new iteration begins here."""
        self._marks.append(self.now())
        self._rows.append(dict.fromkeys(PARTS, 0.0))

    def add(self, part: str, seconds: float) -> None:
        if self._rows:
            self._rows[-1][part] += seconds

    def around(self, part: str, call: Callable[..., Any]) -> Callable[..., Any]:
        """`call`, timed as `part`."""

        def timed(*args: Any, **options: Any) -> Any:
            began = self.now()
            try:
                return call(*args, **options)
            finally:
                self.add(part, self.now() - began)

        return timed

    def before_forward(self, module: torch.nn.Module, inputs: Any) -> None:
        self._forward_began = self.now()

    def after_forward(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.add("denoiser forward", self.now() - self._forward_began)
        tensor = output[0] if isinstance(output, tuple) else output.sample
        if tensor.requires_grad:
            tensor.register_hook(self._arrived)

    def _arrived(self, gradient: torch.Tensor) -> None:
        self._gradient_arrived = self.now()

    def backward(self, machinery: Machinery, loss: torch.Tensor) -> None:
        """In place of `Machinery.backward`."""
        self._gradient_arrived = None
        machinery._accelerator.backward(loss)
        if self._gradient_arrived is not None:
            self.add("denoiser backward", self.now() - self._gradient_arrived)

    def finished(self) -> list[tuple[float, dict[str, float]]]:
        """(wall seconds, seconds by part) of every whole iteration but the first."""
        walls = [after - before for before, after in zip(self._marks, self._marks[1:])]
        return list(zip(walls, self._rows))[1:]


def measure(
    policy: Policy, reward: Any, *, batch: int, steps: int | None, iterations: int, output: Path
) -> Meter:
    """Train `iterations` + 2 iterations with a meter on every call."""
    meter = Meter(policy.device)
    network = policy.denoiser
    handles = [
        network.register_forward_pre_hook(meter.before_forward),
        network.register_forward_hook(meter.after_forward),
    ]
    prompts = max(1, 2 * batch // 4)
    algorithm = DDPO(
        policy,
        _Timed(reward, meter),
        # As many prompts as an iteration takes: all are encoded in the first, as after a long run.
        [f"a red circle number {i}" for i in range(prompts)],
        options=DDPOOptions(
            prompts_per_iteration=prompts,
            samples_per_prompt=4,
            train_batch_size=batch,
        ),
        sampling=SamplingOptions(steps=steps, batch_size=batch),
    )
    collect, decode = algorithm.collect, policy.decode

    def marked(iteration: int) -> Any:
        meter.iteration()
        return collect(iteration)

    algorithm.collect = marked  # type: ignore[method-assign]
    policy.decode = meter.around("VAE", decode)  # type: ignore[method-assign]
    plain = Machinery.backward
    Machinery.backward = lambda self, loss: meter.backward(self, loss)  # type: ignore[method-assign]
    options = TrainOptions(
        steps=(iterations + 2) * algorithm.minibatch_count(), checkpoint_every=0, sample_every=0
    )
    try:
        train(algorithm, options=options, output=output, reporter=Quiet())
    finally:
        Machinery.backward = plain  # type: ignore[method-assign]
        for handle in handles:
            handle.remove()
    return meter


class _Timed:
    """A reward whose every score is timed."""

    def __init__(self, reward: Any, meter: Meter) -> None:
        self.info = reward.info
        self.score = meter.around("reward", reward.score)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-sd")
    parser.add_argument("--reward", default="compressibility")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=None)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    policy = Policy.load(arguments.model, lora_rank=arguments.rank, device=arguments.device)
    with tempfile.TemporaryDirectory() as folder:
        meter = measure(
            policy,
            reward_models.load(arguments.reward),
            batch=arguments.batch,
            steps=arguments.steps,
            iterations=arguments.iterations,
            output=Path(folder) / "run",
        )
    rows = meter.finished()[: arguments.iterations]
    print(
        f"{arguments.model}, batch {arguments.batch}, {arguments.threads} threads, {len(rows)} it."
    )
    for part in PARTS:
        seconds = statistics.median(row[part] for _, row in rows)
        share = statistics.median(row[part] / wall for wall, row in rows)
        print(f"{part:20s} {seconds:9.3f} s {share:8.2%}")
    outside = [1 - sum(row.values()) / wall for wall, row in rows]
    wall = statistics.median(wall for wall, _ in rows)
    print(f"{'everything else':20s} {wall * statistics.median(outside):9.3f} s", end=" ")
    print(
        f"{statistics.median(outside):8.2%}   (bar 3 %; {min(outside):.2%} to {max(outside):.2%})"
    )
    print(f"{'iteration':20s} {wall:9.3f} s")


if __name__ == "__main__":
    main()
