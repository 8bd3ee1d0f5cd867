"""How clear the gradient of an online method is: signal against noise, for the same calls.

    python tests/benchmarks/bench_gradient_noise.py --configs ddpo_tiny_published ddpo_tiny_fast

The untouched policy collects N iterations, none of which is learnt from, and the gradient g_i of
each whole iteration is kept. Iterations are independent, so that for i != j the mean of g_i . g_j
estimates |E g|^2 without bias, and the mean of |g_i|^2 less that the noise. Their ratio grows with
the samples of an iteration; what is compared is the ratio per 10,000 calls. The interval is the
jackknife's over iterations.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import numpy as np
import torch
from scipy import stats

CALLS = 10_000


def gradients(name: str, overrides: Sequence[str], iterations: int) -> tuple[torch.Tensor, float]:
    """[N, parameters] float64, and calls per iteration."""
    from diffusion_align.assemble.loading import load_policy, load_rewards
    from diffusion_align.assemble.named import load_algorithm, training_prompts
    from diffusion_align.config import load_config

    config = load_config(name, overrides)
    assert config.lora is not None, "the gradient of an adapter is measured"
    policy = load_policy(config)
    reward = load_rewards([config.reward], policy.device)[config.reward]
    method = load_algorithm(config, policy, reward, training_prompts(config))
    parameters = policy.trainable_parameters()
    found, spent = [], []
    for iteration in range(iterations):
        batch = method.collect(iteration)
        spent.append(float(batch.metrics["cost/calls"]))
        for parameter in parameters:
            parameter.grad = None
        for minibatch in method.minibatches(batch):
            for loss, _ in method.losses(minibatch, 1.0):
                loss.backward()
        parts = [p.grad.flatten() for p in parameters if p.grad is not None]
        found.append(torch.cat(parts).double())
    # The first iteration also pays for the replay check.
    return torch.stack(found), (spent[-1] - spent[0]) / (iterations - 1)


def clarity(products: np.ndarray, kept: np.ndarray) -> float:
    """|E g|^2 / noise of one iteration, from the products g_i . g_j of the kept ones."""
    part = products[np.ix_(kept, kept)]
    count = len(kept)
    own = np.trace(part) / count
    signal = (part.sum() - np.trace(part)) / (count * (count - 1))
    return float(signal / (own - signal))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", nargs="+", required=True)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="overrides")
    parser.add_argument("--calls", type=int, default=100_000, help="spent on each config")
    arguments = parser.parse_args()
    for name in arguments.configs:
        _, calls = gradients(name, arguments.overrides, 2)
        count = max(3, round(arguments.calls / calls))
        found, calls = gradients(name, arguments.overrides, count)
        # Adam divides by each parameter's own spread, so it is measured in these units.
        found = found / (found.square().mean(dim=0).sqrt() + 1e-30)
        products = (found @ found.T).numpy()
        every = np.arange(count)
        whole = clarity(products, every) * CALLS / calls
        left_out = [clarity(products, np.delete(every, i)) * CALLS / calls for i in every]
        error = np.sqrt((count - 1) * np.var(left_out))
        width = float(stats.t.ppf(0.975, count - 1)) * error
        print(
            f"{name}: {count} iterations of {calls:,.0f} calls; signal / noise per {CALLS:,} "
            f"calls {whole:.4f} [{whole - width:.4f}, {whole + width:.4f}]",
            flush=True,
        )


if __name__ == "__main__":
    main()
